"""What happens to an unfinished upgrade after a restart, or after its process was ended. Part of the node's own code.

A restart finds the new release (a trial: it is judged, then committed or left), or the old one (whatever happened, it
is what a power-on boots, so the rest is forgotten). An ended process is undone, or finished where it had committed.
"""

from __future__ import annotations

import os
from contextlib import suppress

from appliance.node.upgrade import engine, journal, judging, mounts, records, services, trial
from appliance.node.upgrade.engine import Job, Outcome, Report
from appliance.node.upgrade.journal import Journal, JournalError
from appliance.node.upgrade.node import STATE, Node, look
from appliance.node.upgrade.request import STATES

_FORCED = frozenset({"/etc/systemd/system/"})  # stands for paths that nobody remembers
_SILENT = {
    "reboot": "the release did not become healthy in its time, or its kernel stopped: the machine restarted by itself",
    "soft-reboot": "the release did not become healthy in its time: the machine restarted by itself",
}


def job_of(node: Node, begun: Journal, report: Report, *, in_boot: bool = False) -> Job:
    """The unfinished upgrade. Raises JournalError where a release that it names is gone."""
    try:
        old, new = node.held[begun.old], node.held[begun.new]
    except KeyError as error:
        raise JournalError(f"the journal names release {error}, which is not here") from error
    return Job(node, old, new, begun, report, changed=_FORCED, in_boot=in_boot)


def after_boot(report: Report) -> Outcome | None:
    """Finish or forget what the restart interrupted. Returns None where nothing was unfinished.

    The front door's units wait until this says READY=1 to the service manager.
    """
    try:
        node = look()
        mounts.keep_config(node.trees(node.running))
        begun = journal.read(node.root)
        if begun is None:
            return None
        job = job_of(node, begun, report, in_boot=True)
    except JournalError as error:
        set_aside(str(error))
        return None
    runs = (node.running.id, node.data)
    if runs != (begun.new, begun.new_data):
        return _old_runs(job, runs)
    if begun.failed:  # it was left, but the way back was interrupted before the old release was chosen
        return engine.restart_old(job)
    if begun.opened:
        services.notify("READY=1")
        return engine.finish(job)
    if begun.stopped:  # a restart ends that
        job.journal = begun._replace(stopped=False, stop_before="")
    return engine.run(job, "health" if begun.committed or begun.depth == "live" else "migrate")


def _old_runs(job: Job, runs: tuple[str, int]) -> Outcome:
    """The trial is over, or never began: keep what runs, and remember why."""
    begun = job.journal
    if runs == (begun.old, begun.old_data) or runs == (begun.old, begun.running_data):
        with suppress(OSError):  # no room, perhaps: the release runs all the same
            engine.choose_old(job, runs[1])
        _let_clients_in(job)
        if not begun.opened:
            engine.remove_new_data(job, runs[1])
    else:  # GRUB found neither of the two in order and took the one before
        _let_clients_in(job)
        records.put(job.root, records.select(job.node.running, job.node.data))
    tried = begun.failed or STATES.index(begun.state) >= STATES.index("switch")
    message = begun.message or (_SILENT[begun.depth] if tried and begun.depth in _SILENT else engine.RESTARTED)
    job.journal = begun._replace(failed=True, reason=begun.reason or begun.state, message=message)
    outcome = "rolled-back" if tried else "failed"
    engine.remember(job, outcome)
    return Outcome(outcome, job.journal, job.journal.reason, message)


def _let_clients_in(job: Job) -> None:
    """Open the front door once what is behind it serves: clients wait at it, and would be sent away otherwise.

    Nothing is judged. A release that ran before is let serve even where it is not healthy in time.
    """
    trial.end()  # its time was for the restart; how long the services take now is not for the watchdog
    with suppress(Exception):
        judging.wait_healthy(job.node.settings.gate_seconds, behind_door=True)
    services.notify("READY=1")


def after_end(report: Report) -> Outcome | None:
    """Undo, or finish, what an ended process left in this boot. Returns None where nothing is to be done."""
    if services.restarting():
        return None
    try:
        node = look()
        begun = journal.read(node.root)
        if begun is None or begun.stopped:
            return None
        job = job_of(node, begun, report)
    except JournalError as error:
        set_aside(str(error))
        return None
    if begun.state in ("stage", "plan"):
        journal.remove(node.root)
        return None
    if node.running.id == begun.old and node.data not in (begun.running_data, begun.new_data):
        return _old_runs(job, (begun.old, node.data))  # after a restart whose gate did not come to its end
    if begun.failed:
        return engine.undo(job, begun.reason or begun.state, begun.message)
    choice = records.choose(node.root)
    if choice is not None and (choice.release, choice.data) == (begun.new, begun.new_data):
        return engine.run(job, "open")
    state = "health" if begun.state in ("commit", "open") else begun.state
    return engine.undo(job, state, engine.BROKEN_OFF)


def set_aside(reason: str) -> None:
    """A journal that cannot be used: what runs stays what a power-on boots."""
    node = look()
    path = os.path.join(node.root, journal.JOURNAL)
    os.replace(path, path + ".bad")
    records.put(node.root, records.select(node.running, node.data))
    services.notify("READY=1")
    trial.end()
    mounts.drop_next_root()
    journal.add_history(node.root, {"outcome": "failed", "reason": reason, "action": "upgrade"})


def drop_unfinished_files(root: str = STATE) -> None:
    """Remove what a process that was killed while it staged has left; whole files and parts of downloads stay."""
    for folder in (records.LAYERS, records.KERNELS, records.RELEASES):
        for place, _, names in os.walk(os.path.join(root, folder), topdown=False):
            for name in (one for one in names if records.PARTIAL in os.path.join(place, one)):
                os.unlink(os.path.join(place, name))
            if place != os.path.join(root, folder) and not os.listdir(place):
                os.rmdir(place)
