"""Runs a node whose disk's writes are logged, while a client writes rows and notes when each was acknowledged."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from appliance.run import run
from appliance.targets import base, qemu
from tests.boot.conftest import TARGET, Node
from tests.boot.samepage_site import Client, Failed, Site
from tests.faults.power.exported import block_devices

PAUSE = 0.2  # seconds between two rows


@dataclass(frozen=True, slots=True)
class Row:
    """An item that the node said it keeps, and the log's length when the answer was there."""

    title: str
    offset: int


class Writer(threading.Thread):
    """Creates items one after the other until it is told to stop. What gets no answer, or a bad one, is tried anew."""

    def __init__(self, client: Client, log: Path, prefix: str) -> None:
        super().__init__(daemon=True)
        self._client, self._log, self._prefix = client, log, prefix
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
            self.rows.append(Row(title, self._log.stat().st_size))

    def stop(self) -> list[Row]:
        self._stopping.set()
        self.join(120)
        return self.rows


@dataclass
class Recording:
    """A running node and what is known of its disk's log."""

    node: Node
    first: Path  # the disk before its first logged write; never written
    log: Path
    rows: list[Row] = field(default_factory=list)

    def offset(self) -> int:
        return self.log.stat().st_size

    @contextmanager
    def writing(self, client: Client, prefix: str) -> Iterator[Writer]:
        """Rows are written as long as the body runs."""
        writer = Writer(client, self.log, prefix)
        writer.start()
        try:
            yield writer
        finally:
            self.rows += writer.stop()

    def site(self) -> Site:
        return Site(self.node.url, self.node.ssh)


@contextmanager
def record(name: str, disk: Path) -> Iterator[Recording]:
    """Boots a copy-on-write copy of a raw disk with its writes logged; yields once it is healthy."""
    folder = Path(tempfile.mkdtemp(prefix=f"samepage-{name}-"))
    log = folder / "writes.log"
    log.touch()
    request = base.Request(name, disk, kind="disk", hardware={"disk": "none"})
    key = TARGET._make_key(folder)
    qemu.prepare_disks(request, folder)
    extra = [word for value in block_devices(folder / "disk.qcow2", "qcow2", log) for word in ("-blockdev", value)]
    extra += ["-device", "virtio-blk-pci,drive=logged,bootindex=1,write-zeroes=off"]
    node = Node(qemu.start(request, folder, {"ssh.authorized_keys.root": key}, extra))
    try:
        node.wait()
        yield Recording(node, disk, log)
    finally:
        TARGET.down(node.instance)
        shutil.rmtree(folder, ignore_errors=True)


def copy_disk(image: Path, target: Path) -> Path:
    """A copy that stays sparse."""
    run(["cp", "--sparse=always", image, target])
    return target


def now() -> float:
    return time.monotonic()
