"""Nodes that are upgraded, as the tests see them: a frozen one that is woken for each test, and clients that use it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from appliance.errors import CommandError
from appliance.targets import base, machinestate, qemu
from appliance.targets.qmp import Qmp
from tests.boot.samepage_site import Client, Site

TARGET = qemu.Qemu()
TOOL = "/opt/samepage/bin/samepage-upgrade-node"
DEADLINE = 900.0  # seconds an upgrade may take on a slow machine that does other work too
COOKIES = "cookies.json"  # of a signed-in administrator, beside the frozen node
CONNECTION = "samepage-console-health@"  # the console asks now and then; one unit per question
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass
class Machine:
    """A running node. `cookies` are those of a signed-in administrator."""

    instance: base.Instance
    cookies: Mapping[str, str] = field(default_factory=dict)
    _told: str = ""  # on the consoles of earlier power-ons

    @property
    def url(self) -> str:
        return self.instance.url.rstrip("/")

    def run(self, command: str, *, input: bytes | None = None, timeout: float = DEADLINE) -> tuple[int, str, str]:
        """Status, output and messages of a shell command, run as root."""
        done = TARGET.execute(self.instance, ["sh", "-c", command], input=input, timeout=timeout)
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def ssh(self, command: str, *, input: bytes | None = None) -> str:
        """What a command prints; fails the test when the command fails."""
        status, out, messages = self.run(command, input=input)
        assert status == 0, f"{command}: {out}{messages}"
        return out

    def put(self, file: Path | bytes, place: str) -> str:
        content = file if isinstance(file, bytes) else file.read_bytes()
        self.ssh(f"mkdir -p $(dirname {place}) && cat >{place}", input=content)
        return place

    def tool(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Exit status and JSON of samepage-upgrade-node."""
        status, out, messages = self.run(f"{TOOL} {' '.join(words)} --json")
        assert out, messages
        return status, json.loads(out)

    def upgrade(self, bundle: Path, *words: str) -> tuple[int, dict[str, Any]]:
        """Install a bundle from the host, and where that needs a restart, wait until it is over."""
        place = self.put(bundle, f"/state/{bundle.name}")
        status, found = self.tool("install", place, *words)
        if found["outcome"] == "restarting":
            return status, self.over()
        return status, found

    def over(self) -> dict[str, Any]:
        """Wait until no upgrade is unfinished; the last entry of the history."""
        TARGET.hang_up(self.instance)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if TARGET.state(self.instance) == "stopped":
                self.power_on()
            if TARGET.reachable(self.instance):
                out = ""
                with suppress(CommandError):  # the connection may hang in the old userspace
                    out = self.run(f"{TOOL} status --json", timeout=120)[1]
                found = json.loads(out) if out.rstrip().endswith("}") else {}
                if found.get("unfinished", "") is None and found.get("last"):
                    return dict(found["last"])
            else:
                TARGET.hang_up(self.instance)
            time.sleep(1)
        raise AssertionError(f"the upgrade did not end\n{base.tail(self.instance.console_log, 40)}")

    def end_at_restart(self) -> None:
        """From now on a restart of the machine ends QEMU.

        After a reset QEMU searches what it has translated of the programs before, and a boot takes twice as long.
        """
        with Qmp(Path(self.instance.details["sockets"]) / "qmp") as qmp:
            qmp.execute("set-action", reboot="shutdown")

    def power_on(self) -> None:
        """Start the machine anew that has ended."""
        folder = self.instance.folder
        self._told += self.instance.console_log.read_text(errors="replace")
        TARGET.down(self.instance)
        (folder / "known_hosts").unlink(missing_ok=True)  # it will answer on another port
        request = replace(base.load_request(folder), name=self.instance.name)
        key = (folder / "id_ed25519.pub").read_bytes()
        self.instance = qemu.start(request, folder, {"ssh.authorized_keys.root": key})
        self.end_at_restart()

    def status(self) -> dict[str, Any]:
        found = self.tool("status")[1]
        assert found["status"] == 0, found
        return found

    def wait_healthy(self) -> None:
        base.wait_healthy(TARGET, self.instance, DEADLINE)

    def boot(self) -> str:
        return self.ssh(f"cat {BOOT_ID}").strip()

    def invocations(self) -> dict[str, str]:
        """The invocation of every service that runs, but those of single connections: a new one after each start."""
        listed = self.ssh("systemctl show -p Id -p InvocationID -p ActiveState '*.service'")
        found = {}
        for block in listed.strip().split("\n\n"):
            facts = dict(line.partition("=")[::2] for line in block.splitlines())
            if facts.get("ActiveState") == "active" and not facts["Id"].startswith(CONNECTION):
                found[facts["Id"]] = facts["InvocationID"]
        return found

    def titles(self) -> set[str]:
        """Titles of all items in the database."""
        sql = "select title from items"
        command = f"su -s /bin/sh samepage -c \"psql -X -A -t -h /run/postgresql samepage -c '{sql}'\""
        quick = f"setpriv --reuid 820 --regid 820 --clear-groups psql -X -A -t -h /run/postgresql samepage -c '{sql}'"
        status, out, _ = self.run(quick)
        return set((out if status == 0 else self.ssh(command)).split("\n")) - {""}

    def client(self) -> Client:
        return Client(self.url, dict(self.cookies), timeout=DEADLINE)

    def log(self) -> str:
        return self._told + self.instance.console_log.read_text(errors="replace")

    def stop(self) -> None:
        TARGET.down(self.instance)
        shutil.rmtree(self.instance.folder, ignore_errors=True)


def freeze_node(image: Path, folder: Path) -> Path:
    """Boot a disk, sign in, write one item, and freeze the node; the folder of the frozen one."""
    home = folder / "node"
    home.mkdir()
    request = base.Request("node", image, kind="disk")
    key = TARGET._make_key(home)
    qemu.prepare_disks(request, home)
    base.save_request(request, home)
    machine = Machine(qemu.start(request, home, {"ssh.authorized_keys.root": key}))
    try:
        machine.wait_healthy()
        administrator = Site(machine.url, machine.ssh).administrator()
        administrator.call("Items.create", title="before", body="written before any upgrade")
        machine.ssh("sync")
        machinestate.freeze(machine.instance, folder / "frozen")
        (folder / COOKIES).write_text(json.dumps(administrator.cookies))
    except BaseException:
        TARGET.down(machine.instance)
        raise
    return folder / "frozen"


def wake_node(frozen: Path, project: Path, name: str) -> Machine:
    """A copy of the frozen node, as soon as it answers."""
    cookies = json.loads((frozen.parent / COOKIES).read_text())
    machine = Machine(machinestate.wake(frozen, project, name), cookies)
    machine.end_at_restart()
    while not TARGET.reachable(machine.instance):
        time.sleep(0.1)
    return machine


@dataclass
class Load:
    """Clients that read and write through the front door without a pause, each request on a connection of its own."""

    machine: Machine
    every: float = 1.0  # seconds between the beginnings of requests
    at_once: int = 16  # requests under way; an emulated node would have more than it can answer for minutes otherwise
    written: list[str] = field(default_factory=list)  # titles that the node has said are stored
    failures: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._begin(self._drive)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in list(self._threads):
            thread.join(DEADLINE)

    def _begin(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _drive(self) -> None:
        number = 0
        while not self._stop.is_set():
            if sum(thread.is_alive() for thread in self._threads) <= self.at_once:  # this one is among them
                self._begin(self._one, number)
                number += 1
            time.sleep(self.every)

    def _one(self, number: int) -> None:
        began = time.monotonic()
        title = f"load {id(self)} {number}"
        try:
            if number % 2:
                self.machine.client().call("Items.create", title=title, body="written under load")
                self.written.append(title)
            else:
                self.machine.client().call("Items.getList", query="", limit=1, offset=0)
        except Exception as error:  # whatever a client may see is what this counts
            self.failures.append(f"request {number} after {time.monotonic() - began:.1f} s: {error!r}")
        self.waits.append(time.monotonic() - began)

    def figures(self) -> str:
        waits = sorted(self.waits) or [0.0]
        return f"{len(waits)} requests, longest wait {waits[-1]:.1f} s, median {waits[len(waits) // 2]:.2f} s"


def changed(before: Mapping[str, str], after: Mapping[str, str], but: Sequence[str] = ()) -> set[str]:
    """Services that were started anew, stopped or added."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    passing = ("samepage-upgrade", "samepage-console-health@", "systemd-tmpfiles-clean", "user@", "ssh@")
    return {name for name in names if not name.startswith(passing)} - set(but)
