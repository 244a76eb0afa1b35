"""The states of an upgrade, in order. Part of the node's own code.

Each function below that has the name of a state brings the node into it; `run` calls one after the other and writes the
journal before each. What fails before the commit is undone: the old release with the old data, as if nothing had been.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from appliance.node.plan import classify, touched_units
from appliance.node.release import boot_record
from appliance.node.upgrade import changes, journal, mounts, records, services, trial
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.node import Node
from appliance.node.upgrade.records import Held

Report = Callable[[str, int, int], None]
"""Told the state, the bytes done and the bytes there are (0 and 0 where there is nothing to count)."""


class Failed(Exception):
    """A state could not be reached; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `name` is a key of request.STATUSES."""

    name: str
    journal: Journal
    reason: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen. `changed` are the paths that differ, of a live upgrade."""

    journal: Journal
    old: Held
    new: Held
    needs: str  # the class that the difference asks for; `journal.depth` may be deeper
    changed: frozenset[str] = frozenset()


@dataclass(slots=True)
class Job:
    """One run: the node and the releases as they are, and the journal as it grows."""

    node: Node
    old: Held
    new: Held
    journal: Journal
    report: Report
    changed: frozenset[str] = frozenset()
    in_boot: bool = False  # the front door's units have not been started yet
    began: float = field(default_factory=time.monotonic)

    @property
    def root(self) -> str:
        return self.node.root

    def enter(self, state: str) -> None:
        self.journal = self.journal.at(state)
        journal.write(self.root, self.journal)
        self.report(state, 0, 0)


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(
    node: Node, new: Held, *, action: str = "upgrade", apply: str = "auto", data: str = "keep", stop_before: str = ""
) -> Plan:
    """What leads from the running release to `new`. `data`: "restore" takes the data that `new` left behind.

    Raises OSError where layers cannot be looked at.
    """
    old = node.running
    needs = classify(old.manifest, new.manifest, node.name)
    restore = data == "restore" and new.data is not None
    least = "soft-reboot" if restore else "live"
    depth = max(needs, least, apply if apply in journal.CLASSES else "live", key=journal.CLASSES.index)
    units: Mapping[str, str] = {}
    changed: frozenset[str] = frozenset()
    with_data = True
    if needs in ("nothing", "live"):
        changed, units, nodes = _differences(node, old, new)
        schema = old.manifest.schema_level != new.manifest.schema_level
        with_data = depth != "live" or schema or changes.concerns_data(nodes, units)
    spare = max(records.data_numbers(node.root), default=0) + 1
    begun = Journal(
        state="plan", action=action, depth=depth, old=old.id, new=new.id, running_data=node.data,
        old_data=node.data if restore or not with_data else spare,
        new_data=spare if restore else node.data,
        spare_data=new.data or 0, with_data=with_data, started=int(time.time()), stop_before=stop_before,
        deadline=node.settings.trial_seconds, units=dict(units) if depth == "live" else {},
    )  # fmt: skip
    return Plan(begun, old, new, "live" if needs == "nothing" else needs, changed)


def _differences(
    node: Node, old: Held, new: Held
) -> tuple[frozenset[str], Mapping[str, str], list[Mapping[str, object]]]:
    """Paths that differ, what happens to units, and node.json of both; both releases have the same base."""
    before, after = node.layers(old), node.layers(new)
    kinds = [kind for kind in ("app", "config") if before[kind] != after[kind]]
    mounts.keep_config(node.trees(old))
    places = mounts.show(node.trees(new), kinds)
    try:
        changed: set[str] = set()
        other: Mapping[str, object] = node.description
        if "config" in places:
            changed |= changes.changed_paths(mounts.CONFIG, places["config"])
            other = changes.read_node(places["config"])
        if "app" in places:
            changed |= changes.changed_paths(mounts.APP, places["app"], mounts.APP)
        units = touched_units(node.description, other, changed)
        return frozenset(changed), units, [node.description, other]
    finally:
        mounts.hide()


# --- the states ------------------------------------------------------------------------------------------------------


def hold(job: Job) -> None:
    """Clients wait: what they have sent is answered, nothing new is taken, no connection is refused."""
    if job.journal.with_data:
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
    wait_healthy(job, behind_door=job.journal.with_data)


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
    """Clients go on. Once that was allowed, the data is never put back: it may hold what they were told is stored."""
    begun = job.journal
    if not begun.with_data:
        return
    job.journal = replace(begun, opened=True)
    journal.write(job.root, job.journal)
    if job.in_boot:
        services.notify("READY=1")  # the door's units wait for this
        return
    for door in services.doors(changes.read_node("/")):
        action = begun.units.get(door.unit, "none")
        if action in ("reload", "restart"):
            services.take_over({door.unit: action}, ())
        else:
            services.release(door)


def look_through_door(job: Job) -> str:
    """What is wrong with the front door now that clients use it; empty when nothing is."""
    if not job.journal.with_data:
        return ""
    shut = services.wait_running([door.unit for door in services.doors(changes.read_node("/"))], _DOOR_SECONDS)
    if shut:
        raise Failed(f"{shut} does not start\n{services.last_words([shut])}".rstrip())
    try:
        wait_healthy(job, behind_door=False)
    except Failed as failure:
        return str(failure)
    return ""


ORDER: Mapping[str, Callable[[Job], None]] = {
    "hold": hold, "snapshot": snapshot, "switch": switch, "migrate": migrate, "health": health, "commit": commit,
    "open": open_door,
}  # fmt: skip
_DOOR_SECONDS = 60.0


def run(job: Job, start: str = "hold") -> Outcome:
    """Go through the states from `start` on. Returns how it ended; whatever fails before the commit is undone."""
    for state in list(ORDER)[list(ORDER).index(start) :]:
        if state == job.journal.stop_before:
            return _stopped(job, state)
        job.enter(state)
        try:
            ORDER[state](job)
            trouble = look_through_door(job) if state == "open" else ""
        except (services.ServiceError, Failed, OSError) as error:
            if state == "open":
                return _leave(job, job.journal.old_data, str(error))
            if state == "switch" and services.restarting():
                return _outcome(job, "restarting")
            return undo(job, state, str(error))
        if trouble and job.old.manifest.schema_level == job.new.manifest.schema_level:
            return _leave(job, job.journal.new_data, trouble)
        if state == "switch" and job.journal.depth != "live":
            return _outcome(job, "restarting", message=f"trying release {job.new.manifest.version}")
    return finish(job)


def _stopped(job: Job, state: str) -> Outcome:
    job.journal = replace(job.journal, stopped=True)
    journal.write(job.root, job.journal)
    return _outcome(job, "stopped", message=f"stopped before {state}")


def finish(job: Job) -> Outcome:
    """The upgrade is over: remember it, and forget what only it needed."""
    begun = job.journal
    trial.end()
    remember(job, "committed")
    if begun.spare_data and begun.spare_data not in (begun.new_data, begun.old_data):
        _remove_data(job, begun.spare_data)
    return _outcome(job, "committed")


# --- when something fails --------------------------------------------------------------------------------------------


def undo(job: Job, state: str, reason: str) -> Outcome:
    """Back to the old release and the old data, from whatever state before the commit has been entered."""
    begun = job.journal = replace(job.journal, failed=True, reason=state, message=reason)
    journal.write(job.root, begun)
    job.report("undo", 0, 0)
    if state in ("hold", "snapshot") or (state == "switch" and begun.depth != "live"):
        return _call_off(job)
    if begun.with_data or begun.depth != "live":
        return restart_old(job)
    _show_old(job)
    back = {unit: _BACK.get(action, action) for unit, action in begun.units.items()}
    services.stop(back)
    services.forget_failures()
    services.take_over(back, job.changed)
    remember(job, "rolled-back")
    return _outcome(job, "rolled-back", reason, state)


_BACK = {"start": "stop", "stop": "start"}


def _call_off(job: Job) -> Outcome:
    """The old release still runs, with its data: open the door and forget the rest."""
    begun = job.journal
    if begun.state == "switch":
        mounts.drop_next_root()
        _show_old(job)
        trial.end()
    for door in services.doors(job.node.description) if begun.with_data else ():
        services.release(door)
    records.put(job.root, {records.TRY: None, **records.select(job.old, begun.running_data)})
    remove_new_data(job, begun.running_data)
    remember(job, "failed")
    return _outcome(job, "failed", begun.message, begun.reason)


def _show_old(job: Job) -> None:
    mounts.swap(mounts.Trees("", "", ""), job.node.trees(job.old), job.node.identity)
    trial.show_release(job.node.manifest_bytes(job.old))


def restart_old(job: Job) -> Outcome:
    """Leave a release that was tried: the old one starts with the old data, and what was done since is forgotten."""
    begun, node = job.journal, job.node
    old = job.old
    if begun.depth == "reboot":
        trial.reboot()
    else:
        mounts.build_next_root(node.trees(old), node.identity, node.root, node.device, begun.old_data)
        trial.arm(begun.deadline)
        trial.soft_reboot(node.manifest_bytes(old), trial=False)
    return _outcome(job, "rolled-back", begun.message, begun.reason)


def _leave(job: Job, data: int, reason: str) -> Outcome:
    """Go back from a release that is committed, because its front door fails.

    `data` is what it was before where the door did not open at all, so that no client was told anything; otherwise it
    is what clients have worked with since.
    """
    begun = job.journal = replace(
        job.journal, state="commit", old_data=data, opened=False, failed=True, reason="open", message=reason
    )
    records.put(job.root, {journal.JOURNAL: journal.dump(begun), **records.select(job.old, data)})
    job.report("undo", 0, 0)
    return restart_old(job)


def wait_healthy(job: Job, *, behind_door: bool) -> None:
    """Wait until the node is healthy. Raises Failed with what is not. `behind_door`: the door's own probes wait."""
    from appliance.node import health as probes

    description = changes.read_node("/")
    recipes = probes.load_recipes()
    if behind_door:
        units = {door.unit for door in services.doors(description)}
        for name in changes.recipes_of(description, units):
            recipes.pop(name, None)
    found, _ = probes.wait_healthy(recipes, job.node.settings.gate_seconds)
    if not found.healthy:
        bad = [f"{one.name}: {one.detail}" for one in found.outcomes() if not one.ok]
        lines = services.last_words(found.bad_units)
        raise Failed("\n".join([f"not healthy: {'; '.join(bad)}", *([lines] if lines else [])]))


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
    }  # fmt: skip
    journal.add_history(job.root, entry)
    journal.remove(job.root)


def _outcome(job: Job, name: str, message: str = "", reason: str = "") -> Outcome:
    return Outcome(name, job.journal, reason, message, round(time.monotonic() - job.began, 2))
