"""Where a node runs: the one small interface of all targets, and what they share.

A node's state lies in one folder, `.samepage/nodes/<name>/`; removing the folder's node leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from appliance.errors import ApplianceError, UnknownName, nearest
from appliance.model import frozen_map

GUEST_PORTS = (22, 80, 443)
RECORD = "node.json"
REQUEST_FILE = "request.json"
HOPELESS = (b"Freezing execution", b"Kernel panic", b"The appliance cannot start")
HEALTH_FILE = "/run/samepage/health.json"
RELEASE_FILE = "/run/samepage/release.json"
UPGRADE_KEY = "samepage.upgrade-key"  # the credential: a public key whose bundles the node takes

State = Literal["running", "stopped", "absent"]
Kind = Literal["iso", "usb", "disk", "install", "layers"]
Firmware = Literal["bios", "uefi"]
DEFAULT_MEMORY = 2048  # MiB


class NodeError(ApplianceError):
    """A node did not start, did not become healthy, or cannot be reached."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `up` is asked for. `image` is an ISO, a disk image or, for containers, empty; `memory` is in MiB."""

    name: str
    image: Path
    kind: Kind = "iso"
    memory: int = DEFAULT_MEMORY
    firmware: Firmware = "bios"
    credentials: Mapping[str, bytes] = field(default_factory=frozen_map)
    deadline: float = 900.0  # seconds until the node must be healthy
    hardware: Mapping[str, str] = field(default_factory=frozen_map)  # qemu: nic=e1000, disk=ahci, cpus=1


@dataclass(frozen=True, slots=True)
class Instance:
    """A node that was started: what is needed to find, enter and remove it, also from another process."""

    name: str
    target: str
    folder: Path
    address: str
    ports: Mapping[str, int]  # guest port -> host port
    details: Mapping[str, str]  # the target's own: process, sockets, container

    @property
    def url(self) -> str:
        port = self.ports.get("443", 443)
        return f"https://{self.address}" + ("" if port == 443 else f":{port}") + "/"

    @property
    def console_log(self) -> Path:
        """What the node wrote to its console since it was started."""
        return self.folder / "console.log"


class Target(ABC):
    """One kind of place to run nodes in."""

    name: str

    @abstractmethod
    def up(self, request: Request, folder: Path) -> Instance:
        """Start a node and return at once. On any failure nothing is left behind. Raises NodeError, HostError.

        The node is recorded (`save`) before its process starts, so that a killed builder loses no track of it.
        """

    @abstractmethod
    def down(self, instance: Instance) -> None:
        """End the node and remove all it used outside its folder. Does nothing where it is gone already."""

    @abstractmethod
    def state(self, instance: Instance) -> State: ...

    @abstractmethod
    def how_it_ended(self, instance: Instance) -> str:
        """What became of a node whose state is no longer "running"; follows its name in a message."""

    @abstractmethod
    def command(self, instance: Instance, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The host's command line that runs `words` (empty: a shell) on the node."""

    @abstractmethod
    def connection(self, instance: Instance) -> tuple[str, tuple[str, ...]]:
        """How testinfra reaches the node: host specification and extra pytest options."""

    def execute(
        self, instance: Instance, words: Sequence[str], *, input: bytes | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the node; never raises for the command's own failure."""
        from appliance.run import run

        return run(self.command(instance, words), input=input, timeout=timeout, check=False)

    def hang_up(self, instance: Instance) -> None:  # noqa: B027 - most targets have nothing to do
        """Give up a connection that commands share, which may not notice that the node started anew."""

    def console(self, instance: Instance) -> str:
        """What the node wrote to its console since it was started."""
        try:
            return instance.console_log.read_bytes().decode(errors="replace").rstrip()
        except OSError:
            return ""

    def reachable(self, instance: Instance) -> bool:
        """Whether commands can be run on the node yet."""
        return self.execute(instance, ["true"]).returncode == 0


# --- state of this checkout's nodes ------------------------------------------------------------------------------


def nodes_folder(project: Path) -> Path:
    return project / ".samepage" / "nodes"


def save(instance: Instance) -> None:
    """Records the node in its folder, whole or not at all."""
    record = {
        "name": instance.name, "target": instance.target, "address": instance.address, "ports": dict(instance.ports),
        "details": dict(instance.details),
    }  # fmt: skip
    temporary = instance.folder / (RECORD + ".new")
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(instance.folder / RECORD)


def load(folder: Path) -> Instance | None:
    """The node recorded in the folder, if any."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Instance(
        name=record["name"], target=record["target"], folder=folder, address=record["address"],
        ports=frozen_map(record["ports"]), details=frozen_map(record["details"]),
    )  # fmt: skip


def save_request(request: Request, folder: Path) -> None:
    """Keeps what the node was started with, so that a copy has the same hardware."""
    record = {
        "image": str(request.image.resolve()), "kind": request.kind, "memory": request.memory,
        "firmware": request.firmware, "hardware": dict(request.hardware),
    }  # fmt: skip
    (folder / REQUEST_FILE).write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")


def load_request(folder: Path) -> Request:
    """What `save_request` kept; the name and credentials are the caller's."""
    record: dict[str, Any] = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    return Request(
        name="", image=Path(record["image"]), kind=record["kind"], memory=record["memory"], firmware=record["firmware"],
        hardware=frozen_map(record["hardware"]),
    )  # fmt: skip


def instances(project: Path) -> list[Instance]:
    """All recorded nodes of the checkout by name."""
    folder = nodes_folder(project)
    found = (load(entry) for entry in sorted(folder.iterdir())) if folder.is_dir() else iter(())
    return [instance for instance in found if instance]


def find(project: Path, name: str) -> Instance:
    """The node of that name. Raises NodeError naming the nearest."""
    known = {instance.name: instance for instance in instances(project)}
    if name in known:
        return known[name]
    if not known:
        raise NodeError("no node was started here", hint="start one with: ./build.py up")
    raise UnknownName(f"no node is called {name!r}", hint=nearest(name, known))


def target_of(name: str) -> Target:
    """The target with that name; imports only what it needs."""
    if name == "qemu":
        from appliance.targets.qemu import Qemu

        return Qemu()
    if name == "docker":
        from appliance.targets.docker import Docker

        return Docker()
    raise UnknownName(f"no target is called {name!r}", hint="the targets are qemu and docker")


def bring_up(target: Target, request: Request, project: Path) -> Instance:
    """Start a node under its name. Raises NodeError when one of that name runs already."""
    folder = nodes_folder(project) / request.name
    old = load(folder) if folder.is_dir() else None
    if old is not None and target_of(old.target).state(old) == "running":
        raise NodeError(
            f"the node {request.name!r} is running already",
            hint=f"end it with: ./build.py down --name {request.name}, or start another with --name",
        )
    if old is not None:
        bring_down(old)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        instance = target.up(request, folder)
        save(instance)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return instance


def bring_down(instance: Instance) -> None:
    """End a node and remove everything of it."""
    target_of(instance.target).down(instance)
    shutil.rmtree(instance.folder, ignore_errors=True)
    for parent in (instance.folder.parent, instance.folder.parent.parent):
        try:
            parent.rmdir()
        except OSError:
            break


def read_release(target: Target, instance: Instance) -> bytes:
    """The manifest of the release that the node runs. Raises NodeError."""
    done = target.execute(instance, ["cat", RELEASE_FILE], timeout=60)
    if done.returncode == 0:
        return done.stdout
    raise NodeError(
        f"the node {instance.name!r} does not say which release it runs\n"
        + _indent(done.stderr.decode(errors="replace").strip()),
        hint="look at it with: ./build.py status, and ./build.py logs --console",
    )


# --- health ------------------------------------------------------------------------------------------------------

# Waits on the node itself, so that one connection serves the whole wait. Ends with 0 and the health record, or with 3
# and the journal of the units that failed.
WAIT_SCRIPT = f"""
end=$(( $(cut -d. -f1 /proc/uptime) + $1 ))
while :; do
  if [ -s {HEALTH_FILE} ]; then cat {HEALTH_FILE}; exit 0; fi
  failed=$(systemctl list-units --state=failed --plain --no-legend --no-pager 2>/dev/null | cut -d' ' -f1)
  if [ -n "$failed" ]; then
    echo "failed: "$failed
    for unit in $failed; do journalctl -b -u "$unit" -n 30 --no-pager -o cat; done
    exit 3
  fi
  if [ "$(cut -d. -f1 /proc/uptime)" -ge "$end" ]; then
    echo "still starting: "$(systemctl list-jobs --plain --no-legend --no-pager | tr -s ' ' | cut -d' ' -f2)
    exit 4
  fi
  sleep 1
done
"""


def wait_healthy(
    target: Target,
    instance: Instance,
    deadline: float,
    tick: Callable[[float], None] = lambda _passed: None,
    pause: float = 1.0,
) -> Mapping[str, Any]:
    """Wait until the node says that every probe is good, at most `deadline` seconds. Returns its health record.

    Raises NodeError at once when the node ended, a unit failed or the node gave up, with the reason from its journal.
    """
    started = time.monotonic()

    def left() -> float:
        return deadline - (time.monotonic() - started)

    def ended() -> str:
        runs = target.state(instance) == "running"
        return "" if runs else f"{target.how_it_ended(instance)} while it started"

    def failure(what: str) -> NodeError:
        return NodeError(f"the node {instance.name!r} {what}\n{tail(instance.console_log)}", hint=LOGS_HINT)

    while not target.reachable(instance):
        tick(deadline - left())
        halt = stopped(instance.console_log) and "stopped while it started"
        late = left() <= 0 and f"could not be reached within {deadline:.0f} s"
        if what := ended() or halt or late:
            raise failure(what)
        time.sleep(pause)
    while left() > 0:
        slice_ = max(1, min(20, int(left())))
        done = target.execute(instance, ["sh", "-c", WAIT_SCRIPT, "wait", str(slice_)], timeout=left() + 60)
        tick(deadline - left())
        text = done.stdout.decode(errors="replace").strip()
        if done.returncode == 0:
            return judge(instance.name, json.loads(text))
        if done.returncode == 3:
            units, _, journal = text.partition("\n")
            raise NodeError(
                f"on {instance.name!r} units failed ({units.removeprefix('failed: ')})\n{_indent(journal)}",
                hint=LOGS_HINT,
            )
        if what := ended():
            raise failure(what)
    raise NodeError(
        f"the node {instance.name!r} was not healthy within {deadline:.0f} s\n{_indent(text)}", hint=LOGS_HINT
    )


LOGS_HINT = "give it longer with --timeout, or look inside with: ./build.py up --keep-on-error, then ./build.py logs"


def judge(name: str, health: Mapping[str, Any]) -> Mapping[str, Any]:
    """The health record itself when it is good. Raises NodeError naming the probes that are not."""
    if health.get("healthy"):
        return health
    bad = [
        f"{recipe}: {probe['name']}: {probe['detail']}"
        for recipe, entry in sorted(health.get("recipes", {}).items())
        for probe in entry.get("probes", [])
        if not probe["ok"]
    ]
    raise NodeError(f"the node {name!r} is not healthy\n" + _indent("\n".join(bad)), hint=LOGS_HINT)


def tail(file: Path, lines: int = 20) -> str:
    """The last lines of a console, without what moves a terminal's cursor."""
    try:
        text = file.read_bytes()[-16384:].decode(errors="replace")
    except OSError:
        return ""
    plain = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])|\r", "", text)
    return _indent("\n".join([line for line in plain.splitlines() if line.strip()][-lines:]))


def stopped(file: Path) -> bool:
    """Whether the console says that the guest will never come up."""
    try:
        return any(sign in file.read_bytes()[-16384:] for sign in HOPELESS)
    except OSError:
        return False


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def process_runs(pid: int, marker: str) -> bool:
    """Whether process `pid` lives and has `marker` on its command line (numbers are used again)."""
    try:
        return marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_for_end(pid: int, marker: str, seconds: float) -> bool:
    """Wait at most so long for a process that is not our child to end."""
    end = time.monotonic() + seconds
    while process_runs(pid, marker):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def runtime_folder() -> Path:
    """A fresh short-named folder for sockets, whose paths may not be longer than 107 bytes."""
    import tempfile

    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if len(base) > 50 or not os.access(base, os.W_OK):
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="samepage-", dir=base))
