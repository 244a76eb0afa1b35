"""The journal of an unfinished upgrade, and the history of the finished ones. Part of the node's own code.

`journal.json` exists exactly while an upgrade is unfinished: it is written before each state is entered, and whoever
finds it (the next boot, the next call) finishes the upgrade or undoes it. `history.jsonl` has a line per finished one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from appliance.node.upgrade import records
from appliance.node.upgrade.request import STATES

CLASSES = ("nothing", "live", "soft-reboot", "reboot")
FOLDER = "upgrade"
JOURNAL, HISTORY = f"{FOLDER}/journal.json", f"{FOLDER}/history.jsonl"
_LIMIT = 1 << 20  # bytes of the journal
_HISTORY_LIMIT = 8 << 20
_KEPT = 500  # lines of history
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,254}\Z")
_UNIT = re.compile(r"[A-Za-z0-9@:._\\-]{1,255}\Z")


class JournalError(ValueError):
    """The journal is not what it should be; the message names the key."""


class Journal(NamedTuple):
    """An unfinished upgrade. `old` and `new` are ids of releases; data are numbers of data subvolumes.

    Until the commit a power-on boots `old` with `old_data`, after it `new` with `new_data`. `spare_data` is removed
    when the upgrade has succeeded, 0 for none.
    """

    state: str  # the one that was entered last
    action: str  # "upgrade" or "rollback"
    depth: str  # one of CLASSES
    old: str
    new: str
    running_data: int  # /var when the upgrade began
    old_data: int
    new_data: int
    started: int  # seconds since 1970
    spare_data: int = 0
    with_data: bool = True  # whether data is protected: the door is held and a snapshot taken
    stop_before: str = ""
    stopped: bool = False
    opened: bool = False  # whether clients may have been served by the new release
    failed: bool = False  # it is being undone
    reason: str = ""
    message: str = ""
    deadline: int = 600  # seconds a trial may take until the watchdog ends it
    units: Mapping[str, str] = MappingProxyType({})

    def at(self, state: str) -> Journal:
        return self._replace(state=state)

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self._asdict(), "units": dict(self.units)}

    @property
    def committed(self) -> bool:
        return self.state == "open"


def dump(journal: Journal) -> bytes:
    return (json.dumps(journal.facts(), sort_keys=True, indent=1) + "\n").encode()


def parse(content: bytes) -> Journal:
    """The journal. Raises JournalError that names the first key which is wrong."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise JournalError(f"the journal is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise JournalError("the journal is no object")
    if unknown := value.keys() - set(Journal._fields):
        raise JournalError(f"the journal has an unknown key {min(unknown)!r:.60}")
    for name, kind in _KINDS.items():
        if name in value and type(value[name]) is not kind:
            raise JournalError(f"the journal: {name} is no {kind.__name__}")
    try:
        journal = Journal(**value)
    except TypeError as error:
        raise JournalError(f"the journal lacks a key: {error}") from error
    _check(journal)
    return journal


_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("state", "action", "depth", "old", "new", "stop_before", "reason", "message"), str),
    **dict.fromkeys(("running_data", "old_data", "new_data", "spare_data", "started", "deadline"), int),
    **dict.fromkeys(("with_data", "stopped", "opened", "failed"), bool),
    "units": dict,
}


def _check(journal: Journal) -> None:
    for name, choices in (("state", STATES), ("action", ("upgrade", "rollback")), ("depth", CLASSES)):
        if getattr(journal, name) not in choices:
            raise JournalError(f"the journal: {name} is none of {', '.join(choices)}")
    if journal.stop_before not in ("", *STATES):
        raise JournalError("the journal: stop_before is no state")
    for name in ("old", "new"):
        if not _ID.match(getattr(journal, name)):
            raise JournalError(f"the journal: {name} is no release")
    numbers = (journal.running_data, journal.old_data, journal.new_data, journal.spare_data)
    if not all(0 <= one < 10**9 for one in numbers) or not 0 < journal.deadline < 65536:
        raise JournalError("the journal: a number is out of its range")
    for unit, action in journal.units.items():
        if not _UNIT.match(unit) or action not in ("start", "stop", "reload", "restart", "none"):
            raise JournalError(f"the journal: units has {unit!r:.60}")


def read(root: str) -> Journal | None:
    """The unfinished upgrade's journal, None where no upgrade is unfinished. Raises JournalError."""
    content = records.read_small(os.path.join(root, JOURNAL), _LIMIT)
    if content is None:
        if os.path.exists(os.path.join(root, JOURNAL)):
            raise JournalError("the journal cannot be read")
        return None
    return parse(content)


def write(root: str, journal: Journal) -> None:
    records.put(root, {JOURNAL: dump(journal)})


def remove(root: str) -> None:
    records.put(root, {JOURNAL: None})


# --- history ---------------------------------------------------------------------------------------------------------


def add_history(root: str, entry: Mapping[str, Any]) -> None:
    """Append a finished upgrade; the file as a whole is replaced, so that no line is ever torn."""
    lines = [json.dumps(one, sort_keys=True) for one in (*read_history(root), entry)]
    records.put(root, {HISTORY: ("\n".join(lines[-_KEPT:]) + "\n").encode()})


def read_history(root: str) -> list[dict[str, Any]]:
    """The finished upgrades, oldest first; what cannot be read is left out."""
    content = records.read_small(os.path.join(root, HISTORY), _HISTORY_LIMIT) or b""
    found = []
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def failed_before(root: str, release: str) -> dict[str, Any] | None:
    """The history of the last try of a release (by its manifest's digest), where that failed."""
    for entry in reversed(read_history(root)):
        if entry.get("digest") == release:
            return entry if entry.get("outcome") in ("failed", "rolled-back") else None
    return None
