"""The states of an upgrade, in order. Part of the node's own code.

Each function below that has the name of a state brings the node into it; `run` calls one after the other and writes the
journal before each. What fails before the commit is undone: the old release with the old data, as if nothing had been.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from appliance.node.release import boot_record
from appliance.node.upgrade import changes, journal, judging, mounts, records, services, trial
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.judging import Failed, Shut
from appliance.node.upgrade.node import Node
from appliance.node.upgrade.records import Held

CALLED_OFF = "it was called off"
BROKEN_OFF = "the upgrade's process was ended"
RESTARTED = "the machine was restarted, or lost its power, in mid-upgrade"
BLAMELESS = (CALLED_OFF, BROKEN_OFF, RESTARTED)  # messages that say nothing against the release
BEFORE = ("hold", "snapshot")  # states that do not depend on it, such as a request that took too long

Report = Callable[[str, int, int], None]
"""Told the state, the bytes done and the bytes there are (0 and 0 where there is nothing to count)."""


class Outcome(NamedTuple):
    """How a run ended. `name` is a key of request.STATUSES."""

    name: str
    journal: Journal
    reason: str = ""
    message: str = ""
    seconds: float = 0.0


class Job:
    """One run: the node and the releases as they are, and the journal as it grows."""

    __slots__ = ("began", "changed", "in_boot", "journal", "new", "node", "old", "report")

    def __init__(
        self, node: Node, old: Held, new: Held, journal: Journal, report: Report,
        changed: frozenset[str] = frozenset(), *, in_boot: bool = False,
    ) -> None:  # fmt: skip
        """`in_boot`: the front door's units have not been started yet."""
        self.node, self.old, self.new, self.journal, self.report = node, old, new, journal, report
        self.changed, self.in_boot = changed, in_boot
        self.began = time.monotonic()

    @property
    def root(self) -> str:
        return self.node.root

    def enter(self, state: str) -> None:
        self.journal = self.journal.at(state)
        journal.write(self.root, self.journal)
        self.report(state, 0, 0)


# --- the states ------------------------------------------------------------------------------------------------------


def hold(job: Job) -> None:
    """Clients wait: what they have sent is answered, nothing new is taken, no connection is refused."""
    if job.journal.with_data:
        if job.journal.depth != "live":
            services.shorten_stop()
        if job.journal.depth == "soft-reboot":
            trial.ready()
            services.forget_failures()
        for door in services.doors(job.node.description):
            services.hold(door, job.node.settings.hold_seconds)


def snapshot(job: Job) -> None:
    """From here on a power-on boots the old release with the data as it is now, whatever becomes of the original."""
    begun = job.journal
    if not begun.with_data:
        return
    source, copy = (begun.running_data, begun.old_data)
    if begun.new_data != begun.running_data:  # the data that the other release left behind; it is kept as it is
        source, copy = begun.spare_data, begun.new_data
    services.run("btrfs", "subvolume", "snapshot", _data(job, source), _data(job, copy))
    records.put(job.root, records.select(job.old, begun.old_data))


def switch(job: Job) -> None:
    """Put the new release in the old one's place, or restart into it."""
    begun, node = job.journal, job.node
    new_trees = node.trees(job.new)
    if begun.depth == "live":
        services.stop(begun.units)
        mounts.swap(node.trees(job.old), new_trees, node.identity)
        trial.show_release(node.manifest_bytes(job.new))
        return
    if begun.depth == "soft-reboot":
        mounts.build_next_root(new_trees, node.identity, node.root, node.device, begun.new_data)
        trial.arm(begun.deadline)
        trial.soft_reboot(node.manifest_bytes(job.new), trial=True)
        return
    more = f"{trial.WORD}={begun.deadline}"
    records.put(job.root, {records.TRY: boot_record(job.new.manifest, begun.new_data, job.new.id, more)})
    trial.boot_once(node.device)
    trial.reboot()


def migrate(job: Job) -> None:
    """Units take over the new files; components bring their databases to the new schema as they start."""
    if job.journal.depth == "live":
        services.take_over(_behind_door(job), job.changed)


def health(job: Job) -> None:
    """Every probe but the front door's must succeed."""
    judging.wait_healthy(job.node.settings.gate_seconds, behind_door=job.journal.with_data or job.in_boot)


def commit(job: Job) -> None:
    """The one rename that makes the new release and its data what a power-on boots."""
    begun = job.journal
    folder = f"{records.RELEASES}/{{}}/{records.DATA_FILE}"
    files: dict[str, bytes | None] = {}
    if begun.with_data:
        files[folder.format(begun.old)] = b"%d\n" % begun.old_data
    files[records.PREVIOUS] = boot_record(job.old.manifest, begun.old_data, job.old.id)
    files |= records.select(job.new, begun.new_data)
    records.put(job.root, files)
    records.put(job.root, {records.TRY: None, folder.format(begun.new): None})


def open_door(job: Job) -> None:
    """Clients go on. Once the door has served, the data is never put back: it may hold what they were told is stored.

    Raises Shut where the door does not open, Failed where it opens and is not healthy.
    """
    begun = job.journal
    if not begun.with_data and not job.in_boot:
        return
    job.journal = begun._replace(opened=True)
    journal.write(job.root, job.journal)
    if job.in_boot:
        services.notify("READY=1")  # the door's units wait for this
    else:
        for door in services.doors(changes.read_node("/")):
            _open_one(door, begun.units.get(door.unit, "none"))
    judging.wait_open()
    judging.wait_healthy(job.node.settings.gate_seconds, behind_door=False)


def _open_one(door: services.Door, action: str) -> None:
    try:
        if action in ("reload", "restart"):
            services.take_over({door.unit: action}, ())
        else:
            services.release(door)
    except (services.ServiceError, OSError) as error:
        if not services.serves(door.unit):
            raise Shut(str(error)) from error


ORDER: Mapping[str, Callable[[Job], None]] = {
    "hold": hold, "snapshot": snapshot, "switch": switch, "migrate": migrate, "health": health, "commit": commit,
    "open": open_door,
}  # fmt: skip


def run(job: Job, start: str = "hold") -> Outcome:
    """Go through the states from `start` on. Returns how it ended; whatever fails before the commit is undone."""
    for state in list(ORDER)[list(ORDER).index(start) :]:
        if state == job.journal.stop_before:
            return _stopped(job, state)
        try:
            job.enter(state)
            ORDER[state](job)
        except Exception as error:  # whatever it is: a fault in this program must not leave the node half-way either
            if services.restarting():
                return _outcome(job, "restarting")
            return undo(job, state, said(error)) if state != "open" else _after_commit(job, error)
        if state == "switch" and job.journal.depth != "live":
            return _outcome(job, "restarting", message=f"trying release {job.new.manifest.version}")
    return finish(job)


def _stopped(job: Job, state: str) -> Outcome:
    job.journal = job.journal._replace(stopped=True)
    journal.write(job.root, job.journal)
    return _outcome(job, "stopped", message=f"stopped before {state}")


def finish(job: Job, message: str = "") -> Outcome:
    """The upgrade is over: remember it, and forget what only it needed. `message`: what is wrong nevertheless."""
    begun = job.journal = job.journal._replace(message=message)
    trial.end()
    remember(job, "committed")
    if begun.spare_data and begun.spare_data not in (begun.new_data, begun.old_data):
        _remove_data(job, begun.spare_data)
    return _outcome(job, "committed", message)


def said(error: Exception) -> str:
    known = isinstance(error, (services.ServiceError, Failed, OSError))
    return str(error) if known else f"{type(error).__name__}: {error}"


# --- when something fails --------------------------------------------------------------------------------------------


def undo(job: Job, state: str, reason: str) -> Outcome:
    """Back to the old release and the old data, from whatever state has been entered."""
    begun = job.journal = job.journal._replace(failed=True, reason=state, message=reason)
    with suppress(OSError):  # no room, perhaps: what is undone is undone all the same
        journal.write(job.root, begun)
    job.report("undo", 0, 0)
    try:
        if state in ("plan", "hold", "snapshot") or (state == "switch" and begun.depth != "live" and not _tried(job)):
            return _call_off(job)
        if not begun.with_data and begun.depth == "live":
            return _swap_back(job)
    except Exception as error:  # the old release shall run, the long way round if need be
        job.journal = begun._replace(message=f"{reason}\nundoing it: {said(error)}")
    return restart_old(job)


def _tried(job: Job) -> bool:
    """Whether the new release was restarted into, and runs."""
    return job.node.running.id == job.new.id and not os.path.ismount(mounts.NEXT_ROOT)


def _call_off(job: Job) -> Outcome:
    """The old release still runs, with its data: open the door and forget the rest."""
    begun, data = job.journal, job.node.data
    if begun.state == "switch":
        mounts.drop_next_root()
        _show_old(job)
        trial.end()
    choose_old(job, data)  # before clients are told that something is stored in it
    for door in services.doors(job.node.description) if begun.with_data else ():
        services.release(door)
    remove_new_data(job, data)
    remember(job, "failed")
    return _outcome(job, "failed", begun.message, begun.reason)


def _swap_back(job: Job) -> Outcome:
    """The old release's files take the place of the new one's, as they came."""
    begun = job.journal
    choose_old(job, job.node.data)
    _show_old(job)
    back = {unit: _BACK.get(action, action) for unit, action in begun.units.items()}
    services.stop(back)
    services.forget_failures()
    services.take_over(back, job.changed)
    remember(job, "rolled-back")
    return _outcome(job, "rolled-back", begun.message, begun.reason)


_BACK = {"start": "stop", "stop": "start"}


def _show_old(job: Job) -> None:
    mounts.swap(mounts.Trees("", "", ""), job.node.trees(job.old), job.node.identity)
    trial.show_release(job.node.manifest_bytes(job.old))


def choose_old(job: Job, data: int) -> None:
    """From here on a power-on boots the old release with that data, and no record says that it has left data behind."""
    left = f"{records.RELEASES}/{job.old.id}/{records.DATA_FILE}"
    files: dict[str, bytes | None] = records.select(job.old, data)
    before = records.read_record(job.root, records.PREVIOUS)
    if before is not None and before.release == job.old.id:
        files[records.PREVIOUS] = boot_record(job.old.manifest, data, job.old.id)
    files |= {name: None for name in (records.TRY, left) if os.path.lexists(os.path.join(job.root, name))}
    records.put(job.root, files)


def restart_old(job: Job) -> Outcome:
    """Leave a release that was tried: the old one starts with the old data, and what was done since is forgotten."""
    begun, node, old = job.journal, job.node, job.old
    choice = records.choose(job.root)
    if choice is None or (choice.release, choice.data) != (old.id, begun.old_data):
        with suppress(OSError):
            records.put(job.root, records.select(old, begun.old_data))
    try:
        if begun.depth == "reboot":
            trial.reboot()
        else:
            mounts.build_next_root(node.trees(old), node.identity, node.root, node.device, begun.old_data)
            trial.arm(begun.deadline)
            services.forget_failures()
            trial.soft_reboot(node.manifest_bytes(old), trial=False)
    except (services.ServiceError, OSError):
        if not services.restarting():
            trial.reboot()
    return _outcome(job, "rolled-back", begun.message, begun.reason)


def _after_commit(job: Job, error: Exception) -> Outcome:
    """Go back from a release that is committed, because its front door fails.

    The data is what it was before where the door did not open at all, so that no client was told anything; otherwise it
    is what clients have worked with since, and where the old release could not read that, the new one stays.
    """
    begun, data = job.journal, job.journal.new_data
    if _is_shut(job, error):
        data = begun.old_data
        for door in services.doors(changes.read_node("/")):
            services.shut(door.unit)
    elif not isinstance(error, Failed) or job.old.manifest.schema_level != job.new.manifest.schema_level:
        return finish(job, said(error))
    begun = job.journal = begun._replace(
        state="commit", old_data=data, opened=False, failed=True, reason="open", message=said(error)
    )
    records.put(job.root, {journal.JOURNAL: journal.dump(begun), **records.select(job.old, data)})
    job.report("undo", 0, 0)
    return restart_old(job)


def _is_shut(job: Job, error: Exception) -> bool:
    """Whether no client was served, for certain: a door that has served may have failed since."""
    if isinstance(error, Failed):
        return isinstance(error, Shut)
    with suppress(services.ServiceError):
        return job.journal.with_data and not all(
            services.serves(door.unit) for door in services.doors(changes.read_node("/"))
        )
    return False


# --- small things ----------------------------------------------------------------------------------------------------


def _behind_door(job: Job) -> dict[str, str]:
    """What happens to units before the door opens; its own come last."""
    shut = {door.unit for door in services.doors(job.node.description)} if job.journal.with_data else set()
    return {unit: action for unit, action in job.journal.units.items() if unit not in shut}


def _data(job: Job, number: int) -> str:
    return os.path.join(job.root, records.DATA, str(number))


def _remove_data(job: Job, number: int) -> None:
    if os.path.isdir(_data(job, number)):
        services.run("btrfs", "subvolume", "delete", _data(job, number))


def remove_new_data(job: Job, kept: int) -> None:
    """After a failure: the data that the tried release worked on, or was to."""
    for number in {job.journal.new_data, job.journal.old_data, job.journal.running_data} - {kept}:
        if number != job.journal.spare_data:
            _remove_data(job, number)


def remember(job: Job, outcome: str) -> None:
    begun = job.journal
    entry = {
        "time": int(time.time()), "action": begun.action, "class": begun.depth, "from": begun.old, "to": begun.new,
        "digest": job.new.digest, "outcome": outcome, "state": begun.reason, "reason": begun.message,
        "seconds": max(0, int(time.time()) - begun.started), "units": dict(begun.units),
        "data": begun.new_data if outcome == "committed" else begun.old_data,
        "blameless": begun.message in BLAMELESS or begun.reason in BEFORE,
    }  # fmt: skip
    journal.add_history(job.root, entry)
    journal.remove(job.root)


def _outcome(job: Job, name: str, message: str = "", reason: str = "") -> Outcome:
    return Outcome(name, job.journal, reason, message, round(time.monotonic() - job.began, 2))
