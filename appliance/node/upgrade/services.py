"""Units of the running node: stopping, starting, reloading, and the front door. Part of the node's own code.

The front door is what clients connect to: units with `hold` in node.json, which names two signals. At the first one the
service answers what it has taken and takes nothing new, while its listening sockets stay open, so clients wait in them;
that has happened once only its main process is left. The second one ends that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

CGROUPS = "/sys/fs/cgroup/system.slice"
BEFORE_HOLD = "samepage-before-hold.target"
_UNITS = "/etc/systemd/system/"
_TMPFILES = "/etc/tmpfiles.d/"
_SYSCTL = "/etc/sysctl.d/"
_MINUTE = 60
_STARTS = 3  # of the front door; after so many in vain it is given up
_LOOK, _ASK = 0.05, 1.0  # seconds between looks at a unit's processes, and between questions to the service manager


class ServiceError(Exception):
    """A unit did not do what it was told; the message has its last words."""


class Door(NamedTuple):
    unit: str
    hold: signal.Signals
    release: signal.Signals


def doors(node: Mapping[str, Any]) -> list[Door]:
    """The front door's units, out of node.json."""
    found = []
    for unit, entry in sorted(node.get("units", {}).items()):
        if names := entry.get("hold"):
            hold, release = (signal.Signals[f"SIG{name}"] for name in names)
            found.append(Door(unit, hold, release))
    return found


def run(*words: str, timeout: float = 10 * _MINUTE) -> str:
    """A program's output. Raises ServiceError with what it said, also when it takes longer than `timeout` seconds."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{words[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise ServiceError(f"{' '.join(words[:6])} ended with status {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


def systemctl(*words: str) -> str:
    return run("systemctl", "--no-ask-password", *words)


def restarting() -> bool:
    """Whether the system is on its way down, so that the next start decides."""
    try:
        return systemctl("is-system-running").strip() == "stopping"
    except ServiceError as error:
        return "stopping" in str(error)


# --- the front door --------------------------------------------------------------------------------------------------


def shorten_stop() -> None:
    """Have done what would make the stop long, such as a database's checkpoint, before clients wait for it."""
    with suppress(ServiceError):  # it will take longer
        systemctl("start", BEFORE_HOLD)
    os.sync()  # as the service manager does in the end


def main_process(unit: str) -> int:
    """Process id of a running unit, 0 where it does not run."""
    found = systemctl("show", "-p", "MainPID", "--value", unit).strip()
    return int(found or 0)


def hold(door: Door, seconds: float) -> None:
    """Let the front door finish what it has taken and take nothing new. Raises ServiceError when that takes longer."""
    main = main_process(door.unit)
    if not main:
        return
    os.kill(main, door.hold)
    deadline = time.monotonic() + seconds
    while (left := processes(door.unit) - {main}) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        raise ServiceError(f"{door.unit} still serves after {seconds:.0f} s")


def release(door: Door) -> None:
    """End the hold."""
    if main := main_process(door.unit):
        os.kill(main, door.release)


def processes(unit: str) -> set[int]:
    """Process ids of a unit, from its control group: the service manager is not asked."""
    try:
        with open(f"{CGROUPS}/{unit}/cgroup.procs", encoding="ascii") as file:
            return {int(line) for line in file}
    except OSError:
        return set()


def notify(message: str) -> None:
    """Tell the service manager something about this process's own unit."""
    import socket

    target = os.environ.get("NOTIFY_SOCKET", "")
    if target:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + target[1:] if target[0] == "@" else target)
            sock.send(message.encode())


def wait_serving(unit: str, seconds: float) -> bool:
    """Whether a unit of the front door begins to serve: it has more than its main process then, as `hold` has it.

    False when that does not come in time, or the unit fails once and again.
    """
    begun = asked = time.monotonic()
    first = ""
    while not (len(processes(unit)) > 1 and serves(unit)):
        if (now := time.monotonic()) >= asked:  # seldom: clients wait, and asking takes time from what they wait for
            asked = now + _ASK
            facts = systemctl("show", "-p", "ActiveState", "-p", "NRestarts", unit)
            found = dict(line.partition("=")[::2] for line in facts.splitlines())
            restarts = found.get("NRestarts") or "0"
            first = first or restarts
            if found.get("ActiveState") == "failed" or int(restarts) - int(first) >= _STARTS:
                return False
        if now - begun > seconds:
            return False
        time.sleep(_LOOK)
    return True


def serves(unit: str) -> bool:
    main = main_process(unit)
    return bool(main and processes(unit) - {main})


def shut(unit: str) -> None:
    """Keep a unit of the front door from starting after all; its sockets stay, and clients wait in them."""
    with suppress(ServiceError):
        systemctl("stop", unit)


# --- units -----------------------------------------------------------------------------------------------------------


def names(units: Mapping[str, str], action: str) -> list[str]:
    """Units with that action; templates are no units that could be told anything."""
    return [unit for unit, what in units.items() if what == action and "@." not in unit]


def stop(units: Mapping[str, str]) -> None:
    """Stop the units that the other release does not have, while their files are still there."""
    if gone := names(units, "stop"):
        systemctl("stop", *gone)


def take_over(units: Mapping[str, str], changed: Iterable[str]) -> None:
    """Make systemd and the units work with the files that are there now. Raises ServiceError that names what failed."""
    paths = list(changed)
    if any(path.startswith(_UNITS) for path in paths):
        systemctl("daemon-reload")
    if made := [path for path in paths if path.startswith(_TMPFILES) and os.path.exists(path)]:
        run("systemd-tmpfiles", "--create", *made)
    if set_ := [path for path in paths if path.startswith(_SYSCTL) and os.path.exists(path)]:
        run("/usr/lib/systemd/systemd-sysctl", *set_)
    for verb in ("restart", "start", "reload"):
        if chosen := names(units, verb):
            _tell(verb, chosen)


def _tell(verb: str, units: list[str]) -> None:
    if verb == "restart":
        with suppress(ServiceError):  # one that is not loaded
            forget_failures(*units)  # and how often they were started: who pushes often restarts often
    try:
        systemctl("reload-or-restart" if verb == "reload" else verb, *units)
    except ServiceError as error:
        raise ServiceError(f"{error}\n{last_words(units)}".rstrip()) from error


def last_words(units: Iterable[str], lines: int = 8) -> str:
    """The end of the journal of the units that have failed, or, where none is marked so any more, of all of them."""
    known = list(units)
    failed = [unit for unit in known if _is_failed(unit)]
    found = []
    with suppress(ServiceError):
        run("journalctl", "--sync")
    for unit in failed or known:
        with suppress(ServiceError):
            words = run("journalctl", "-b", "-q", "--no-pager", "-o", "cat", "-n", str(lines), "-u", unit)
            found.append(words.strip())
    return "\n".join(filter(None, found))


def _is_failed(unit: str) -> bool:
    try:
        return systemctl("show", "-p", "ActiveState", "--value", unit).strip() == "failed"
    except ServiceError:
        return False


def forget_failures(*units: str) -> None:
    """Forget that these units, or all, have failed, and how often they were started; that says nothing of a release."""
    systemctl("reset-failed", *units)
