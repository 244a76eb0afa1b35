"""Runs a node whose disk's writes are logged, while a client writes rows, and notes what was known when."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.targets import base, qemu
from tests.boot.samepage_site import Client, Failed, Site
from tests.faults.power.boots import settled
from tests.faults.power.exported import block_devices
from tests.faults.power.logwrites import Entry
from tests.faults.power.timeline import SNAPSHOT, Mark, Operation, State, index_at
from tests.upgrade.machines import TARGET, TOOL, Machine

PAUSE = 0.2  # seconds between two rows
TRIAL_SECONDS = 1200  # that a release may take to come up, or to fail and give way
# Commits btrfs' transactions as often as a busy system may, and without waiting for data that is still to be written:
# what was written without care is then on the disk in part.
HURRY = """
import fcntl, os, time
state = os.open("/state", os.O_RDONLY)
while True:
    fcntl.ioctl(state, 0x80089418, bytearray(8))  # BTRFS_IOC_START_SYNC
    time.sleep(1)
"""
BOTTOM = "disk.qcow2"


@dataclass(frozen=True, slots=True)
class Row:
    """An item that the node said it keeps, and the log's length when the answer was there."""

    title: str
    offset: int


class Writer(threading.Thread):
    """Creates items one after the other until it is told to stop. What gets no good answer is left at that."""

    def __init__(self, client: Client, offset: Callable[[], int], prefix: str) -> None:
        super().__init__(daemon=True)
        self._client, self._offset, self._prefix = client, offset, prefix
        self._stopping = threading.Event()
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def run(self) -> None:
        number = 0
        while not self._stopping.wait(PAUSE):
            number += 1
            title = f"{self._prefix} {number}"
            try:
                self._client.call("Items.create", title=title)
            except (OSError, Failed, AssertionError) as error:
                self.failures.append(f"{title}: {error!r}")
                continue
            self.rows.append(Row(title, self._offset()))

    def stop(self) -> None:
        self._stopping.set()
        self.join(120)


@dataclass(frozen=True, slots=True)
class Done:
    """An operation that was carried out, by lengths of the log."""

    name: str
    begin: int
    end: int
    states: tuple[State, ...]
    marks: tuple[Mark, ...]
    tried: State | None
    comes_back: bool

    def operation(self, log: Sequence[Entry]) -> Operation:
        first, last = index_at(log, self.begin), index_at(log, self.end)
        return Operation(self.name, first, last, self.states, self.marks, self.tried, self.comes_back)


@dataclass
class Recording:
    """A running node and what is known of its disk's log."""

    machine: Machine
    log: Path
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)  # what a rollback took away, by its name

    def offset(self) -> int:
        return self.log.stat().st_size

    @contextmanager
    def writing(self, prefix: str) -> Iterator[None]:
        """Rows are written as long as the body runs."""
        client = Site(self.machine.url, self.machine.ssh).administrator()
        writer = Writer(client, self.offset, prefix)
        writer.start()
        try:
            yield
        finally:
            writer.stop()
            self.rows += writer.rows
            self.failures += writer.failures

    def hurry(self) -> None:
        """Have transactions committed at short intervals, until the node starts anew."""
        begin = f"systemd-run --quiet --collect --unit=hurry python3 -c {shlex.quote(HURRY)}"
        self.machine.ssh(f"systemctl --quiet is-active hurry || {begin}")

    def carry_out(
        self, name: str, words: Sequence[str], states: tuple[State, ...], outcome: str = "committed", *,
        tried: State | None = None,
    ) -> None:  # fmt: skip
        """Run samepage-upgrade-node with these words to the end of the operation, and fail unless it ends like that.

        `states` are those that a power cut may boot, in their order.
        """
        begin, marks = self.offset(), list[Mark]()

        def event(state: str) -> None:
            if state == "switch" and len(states) > 1 and states[1].data == SNAPSHOT:
                marks.append(Mark(self.offset(), states[1]))
            if state == "open":
                marks.append(Mark(self.offset(), states[-1]))

        found = self._tool(words, event)
        if found.get("outcome") == "restarting":
            found = settled(self.machine, TRIAL_SECONDS)["last"]
        assert found.get("outcome", "") == outcome, f"{name}: {found}"
        marks.append(Mark(self.offset(), states[-1]))
        self.machine.wait_healthy()
        comes_back = len(states) > 1 and outcome != "committed"
        self.done.append(Done(name, begin, self.offset(), states, tuple(marks), tried, comes_back))

    def lose_since(self, name: str) -> None:
        """The operation carried out last brought back the data of before the one with that name."""
        begin = next(one.begin for one in self.done if one.name == name)
        self.lost[self.done[-1].name] = (begin, self.done[-1].end)

    def rows_at(self, offset: int, name: str, *, ended: bool) -> set[str]:
        """Titles that the node must have after a power cut at that length of the log, during an operation.

        `ended`: what boots is the operation's last state.
        """
        names = [one.name for one in self.done]
        past = names[: names.index(name) + ended]
        gone = [self.lost[one] for one in past if one in self.lost]
        return {
            row.title for row in self.rows
            if row.offset <= offset and not any(begin < row.offset <= end for begin, end in gone)
        }  # fmt: skip

    def _tool(self, words: Sequence[str], event: Callable[[str], None]) -> dict[str, Any]:
        """What the tool says at its end; `event` is called when it comes into a state."""
        command = f"{TOOL} {' '.join(words)} --yes --json --progress-fd 2"
        argv = TARGET.command(self.machine.instance, ["sh", "-c", command])
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            said, last = b"", ""
            for line in process.stderr:
                said += line
                state = str(json.loads(line).get("state")) if line.startswith(b"{") else ""
                if state and state != last:
                    event(state)
                last = state
            answer = process.stdout.read()
        assert answer, said.decode(errors="replace")
        found: dict[str, Any] = json.loads(answer)
        return found


@contextmanager
def record(name: str, disk: Path) -> Iterator[Recording]:
    """Boots a copy-on-write copy of a raw disk with its writes logged; yields once it is healthy."""
    folder = Path(tempfile.mkdtemp(prefix=f"samepage-{name}-"))
    log = folder / "writes.log"
    log.touch()
    request = base.Request(name, disk, kind="disk", hardware={"disk": "none"})
    key = TARGET._make_key(folder)
    qemu.prepare_disks(request, folder)
    extra = [word for value in block_devices(folder / BOTTOM, "qcow2", log) for word in ("-blockdev", value)]
    extra += ["-device", "virtio-blk-pci,drive=logged,bootindex=1,write-zeroes=off"]
    machine = Machine(qemu.start(request, folder, {"ssh.authorized_keys.root": key}, extra))
    try:
        machine.wait_healthy()
        yield Recording(machine, log)
    finally:
        TARGET.down(machine.instance)
        shutil.rmtree(folder, ignore_errors=True)
