"""Carries out one request: fetch, stage, plan, run. Part of the node's own code.

It runs as samepage-upgrade.service, so that neither a lost connection nor an impatient user ends it in the middle. A
ring of the bell starts it, the request comes in a file, what happens goes out as lines of JSON to another.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from appliance.node.refusals import Ending, Refusal
from appliance.node.upgrade import engine, journal, planning, records, resume, services, trial
from appliance.node.upgrade.bell import ring
from appliance.node.upgrade.engine import Job, Outcome
from appliance.node.upgrade.judging import Failed
from appliance.node.upgrade.node import INCOMING, STATE, Node, look
from appliance.node.upgrade.request import (
    CANCELLED,
    EVENTS,
    FAILED,
    FOLDER,
    REQUEST,
    STATUSES,
    WORKING,
    Request,
    alone,
    parse_request,
)  # fmt: skip
from appliance.node.upgrade.services import ServiceError

_BELL = 3  # descriptor that systemd passes, see sd_listen_fds(3)
_PATIENCE = 10.0  # seconds between the first ring and the request
_MOMENT = 1.0  # seconds; the command line looks whether the lock is free


class Unfinished(Refusal):
    reason = "unfinished"
    hint = "say samepage-upgrade-node commit to go on with it, or rollback to undo it"


class Cancelled(Exception):
    """Somebody wants it no more, and nothing has happened yet."""


class Reporter:
    """Writes events, and notices that somebody wants to cancel."""

    __slots__ = ("_last", "cancelled", "write")

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self.write, self.cancelled = write, False
        self._last = ("", 0, 0.0)

    def __call__(self, state: str, done: int, total: int) -> None:
        """Raises Cancelled where that was asked for and nothing has happened yet."""
        if self.cancelled and state in ("fetch", "stage", "plan", "verify"):
            raise Cancelled
        then, percent, when = self._last
        now, share = time.monotonic(), done * 100 // total if total else 0
        if state != then or (share != percent and (now - when > 0.2 or done == total)):
            self._last = (state, share, now)
            self.write({"state": state, "done": done, "total": total})

    def to(self, state: str) -> Callable[[int, int], None]:
        return lambda done, total: self(state, done, total)


# --- the process -----------------------------------------------------------------------------------------------------


def main(mode: str) -> int:
    """`work`, `gate` or `recover`: see the units. Returns the exit status, 0 for every ending that is one."""
    return {"work": work, "gate": gate, "recover": recover}[mode]()


def gate() -> int:
    """After a restart: judge the release, or finish what the restart interrupted."""
    try:
        with alone(WORKING):
            outcome = resume.after_boot(_log)
            if outcome is not None:
                begun = outcome.journal
                print(f"upgrade from {begun.old} to {begun.new}: {outcome.name} {outcome.message}".strip())
            if outcome is not None and outcome.name in ("committed", "rolled-back", "failed"):
                _clean()
        if outcome is not None and outcome.name == "stopped":
            _wait_for_word()
    except Exception:
        if os.path.exists(trial.MARK):  # a release whose own judge fails: the door stays shut, the old one comes back
            trial.reboot()
            raise
        services.notify("READY=1")
        raise
    services.notify("READY=1")
    return 0


def _wait_for_word() -> None:
    """Keep the front door shut until somebody goes on with the upgrade that was stopped."""
    with suppress(journal.JournalError):
        while (begun := journal.read(STATE)) is not None and not begun.opened:
            time.sleep(0.5)


def recover() -> int:
    """After the death of the process that upgraded."""
    with alone(WORKING):
        outcome = resume.after_end(_log)
        resume.drop_unfinished_files()
    if os.environ.get("EXIT_CODE") == "killed" and os.path.exists(REQUEST):  # the dead process had not taken it
        ring()  # another one will; where it failed by itself, so would that
        return 0
    end = {"status": FAILED, "outcome": "failed", "reason": "died", "message": engine.BROKEN_OFF}
    if outcome is not None:
        end |= {"status": STATUSES[outcome.name], "outcome": outcome.name}
    with open(EVENTS, "ab", buffering=0) as out:
        out.write(json.dumps({"state": "end", **end}).encode() + b"\n")
    return 0


def _log(state: str, _done: int, _total: int) -> None:
    print(state, flush=True)


def _clean() -> None:
    from appliance.node.upgrade import cleaning

    if services.restarting():
        return
    with suppress(Exception):  # what stays behind is found the next time; the upgrade has ended as it has
        cleaning.clean(look(), _log)


def work(bell: int = _BELL) -> int:
    """Wait for a request, carry it out and write how it ended. `bell`: a descriptor to wait at."""
    os.makedirs(FOLDER, mode=0o700, exist_ok=True)
    with open(EVENTS, "ab", buffering=0) as out:

        def write(event: Mapping[str, Any]) -> None:
            out.write(json.dumps(event).encode() + b"\n")

        reporter, waits = Reporter(write), True

        def cancel(_number: int, _frame: object) -> None:
            reporter.cancelled = True
            if waits:
                raise SystemExit(0)

        for number in (signal.SIGINT, signal.SIGTERM):  # a stop of the unit, too: a restart must find the end written
            signal.signal(number, cancel)
        deadline = time.monotonic() + _PATIENCE
        while True:
            waits = False  # from here on a signal calls off what is about to be taken
            if (content := take_request()) is not None:
                break
            waits = True
            if reporter.cancelled or not _rings(bell, deadline):
                return 0
        started = time.monotonic()
        end = answer(content, reporter)
        write({"state": "end", "seconds": round(time.monotonic() - started, 2), **end})
    while _heard(bell, 0.0):  # rings for this request would start another process
        pass
    if os.path.exists(REQUEST):  # somebody asked meanwhile, and was not heard by that
        ring()
    return 0


def take_request() -> bytes | None:
    """The request, which is taken away: until then whoever asked may take it back. None where there is none."""
    content = records.read_small(REQUEST, 1 << 20)
    try:
        os.unlink(REQUEST)
    except FileNotFoundError:
        return None
    return content or b""


def _rings(bell: int, deadline: float) -> bool:
    """Wait for the bell: it rings before the command line has loaded itself, and again with the request."""
    from appliance.node.upgrade import obtain  # noqa: F401 - most requests need it, and there is time now

    return _heard(bell, max(0.0, deadline - time.monotonic()))


def _heard(bell: int, seconds: float) -> bool:
    return bool(select.select([bell], [], [], seconds)[0] and os.read(bell, 4096))


def answer(content: bytes, reporter: Reporter) -> dict[str, Any]:
    """Carry the request out; how it ended, as the command line shows it."""
    try:
        with alone(WORKING, _MOMENT):
            return carry_out(parse_request(content), reporter)
    except Ending as ending:
        return ending.result()
    except Cancelled:
        return dict(CANCELLED)
    except (OSError, ValueError, Failed, ServiceError) as error:
        return Ending(str(error)).result()


def carry_out(request: Request, reporter: Reporter) -> dict[str, Any]:
    """One request, from the locks on. Raises a Refusal, Cancelled, OSError."""
    node = look()
    begun = journal.read(node.root)
    if begun is not None and not begun.stopped:
        undone = resume.after_end(reporter)
        if services.restarting():
            begun = undone.journal if undone is not None else begun
            message = "an upgrade that was interrupted ends first; try again after the restart"
            return _result("restarting", node, begun=begun, message=message)
        node, begun = look(), None
    if request.verb == "commit":
        return _continue(node, begun, reporter, request)
    if request.verb == "rollback":
        return _roll_back(node, begun, request, reporter)
    if begun is not None:
        raise Unfinished(f"an upgrade to release {begun.new} was stopped before {begun.stop_before}")
    return _install(node, request, reporter)


# --- install ---------------------------------------------------------------------------------------------------------


def _install(node: Node, request: Request, reporter: Reporter) -> dict[str, Any]:
    from appliance.node.upgrade import obtain

    downgrade = request.allow_downgrade
    chain = obtain.chain(node, request.source, obtain.trust(), reporter, allow_downgrade=downgrade)
    if not chain.files and chain.goal == node.running.digest:
        return _result("nothing", node, message=f"release {node.running.manifest.version} is the newest")
    before = journal.failed_before(node.root, chain.goal)
    if before and not before.get("blameless") and not request.retry and not request.source:
        message = f"release {before['to']} was tried and did not stay: {before.get('reason', '')}".strip(": ")
        return _result("nothing", node, message=message, hint="say --retry to try it again")
    if request.stop_before == "stage":
        return _result("stopped", node, message="stopped before stage")
    new = obtain.stage_all(node, chain, reporter, allow_downgrade=downgrade)
    if new is None:
        return _result("nothing", node, message=f"release {node.running.manifest.version} runs already")
    _clear_incoming(chain.files)
    node = node._replace(held=records.held_releases(node.root))
    if request.download_only:
        return _result("downloaded", node, new=new.id, message=f"release {new.id} is on this node")
    return _upgrade(node, new.id, request, reporter)


def _clear_incoming(files: Sequence[str]) -> None:
    for file in files:
        if os.path.dirname(file) == INCOMING:
            with suppress(OSError):
                os.unlink(file)


def _upgrade(node: Node, name: str, request: Request, reporter: Reporter, action: str = "upgrade") -> dict[str, Any]:
    new = node.held[name]
    reporter("plan", 0, 0)
    restore = action == "rollback" and request.data == "restore"
    planned = planning.plan(
        node, new, action=action, apply=request.apply, data="restore" if restore else "keep",
        stop_before=request.stop_before,
    )  # fmt: skip
    begun = planned.journal
    reporter.write({"state": "planned", **_facts(node, planned.new.id, begun)})
    if request.stop_before == "plan":
        return _result("planned", node, new=name, begun=begun)
    if request.apply in journal.CLASSES and request.apply != "nothing":
        depth = journal.CLASSES.index
        if depth(request.apply) < depth(planned.needs):
            message = f"release {new.id} is on this node, and needs a {planned.needs}"
            return _result("staged", node, new=name, begun=begun, message=message)
    if reporter.cancelled:
        raise Cancelled
    job = Job(node, planned.old, planned.new, begun, reporter, planned.changed)
    return _ended(node, engine.run(job))


def _ended(node: Node, outcome: Outcome) -> dict[str, Any]:
    if outcome.name == "committed":
        _clean()
    return _result(outcome.name, node, begun=outcome.journal, message=outcome.message, reason=outcome.reason)


# --- commit and rollback ---------------------------------------------------------------------------------------------


def _continue(
    node: Node, begun: journal.Journal | None, reporter: Reporter, request: Request
) -> dict[str, Any]:
    """Go on with an upgrade that was stopped."""
    if begun is None:
        return _result("nothing", node, message="no upgrade was stopped here")
    state = begun.stop_before
    begun = begun._replace(stopped=False, stop_before=request.stop_before)
    job = resume.job_of(node, begun, reporter)
    if begun.depth == "live":  # what differs does so both ways
        job.changed = planning.plan(node, job.new if node.running.id != begun.new else job.old).changed or job.changed
    return _ended(node, engine.run(job, state))


def _roll_back(
    node: Node, begun: journal.Journal | None, request: Request, reporter: Reporter
) -> dict[str, Any]:
    """Undo a stopped upgrade, or go back to the release before this one."""
    if begun is not None:
        job = resume.job_of(node, begun._replace(stopped=False), reporter)
        return _ended(node, engine.undo(job, begun.state, engine.CALLED_OFF))
    name = request.to or previous(node)
    if not name or name not in node.held:
        known = ", ".join(sorted(node.held.keys() - {node.running.id})) or "none"
        raise NoSuchRelease(f"this node has no release {name or 'before this one'}; there are: {known}")
    if name == node.running.id:
        return _result("nothing", node, message=f"release {name} runs already")
    if request.data == "restore" and node.held[name].data is None:
        request = request._replace(data="keep")  # nothing was written that it could not read
    return _upgrade(node, name, request, reporter, "rollback")


class NoSuchRelease(Refusal):
    reason = "no-such-release"
    hint = "samepage-upgrade-node status shows the releases that are here"


def previous(node: Node) -> str:
    """The release that the last boot record before this one names; empty where there is none."""
    record = records.read_record(node.root, records.PREVIOUS)
    if record is not None and record.release != node.running.id and record.release in node.held:
        return record.release
    return ""


# --- results ---------------------------------------------------------------------------------------------------------


def _facts(node: Node, new: str, begun: journal.Journal) -> dict[str, Any]:
    return {
        "from": node.running.id if begun.old == node.running.id else begun.old, "to": new, "class": begun.depth,
        "units": {unit: what for unit, what in begun.units.items() if what != "none"},
        "data": "kept" if begun.new_data == begun.running_data else "restored", "holds": begun.with_data,
        "schema": [node.held[one].manifest.schema_level for one in (begun.old, new) if one in node.held],
    }  # fmt: skip


def _result(
    outcome: str, node: Node, *, new: str = "", begun: journal.Journal | None = None, message: str = "",
    reason: str = "", hint: str = "",
) -> dict[str, Any]:  # fmt: skip
    facts = _facts(node, begun.new, begun) if begun else {"from": node.running.id, "to": new or node.running.id}
    return {
        "status": STATUSES[outcome], "outcome": outcome, "reason": reason, "message": message, "hint": hint, **facts
    }  # fmt: skip
