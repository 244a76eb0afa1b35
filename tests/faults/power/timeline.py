"""Holds what is found at every cut against what one operation may pass through, in its order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.faults.power.btrfs import Subvolume
from tests.faults.power.checks import Look, Viewer, Violation
from tests.faults.power.cuts import Cut, after_flushes, replay
from tests.faults.power.logwrites import Entry
from tests.faults.power.replay import Disk

LIVE, SNAPSHOT, OTHER = "live", "snapshot", "other"


@dataclass(frozen=True, slots=True)
class State:
    """What boots: a release, and which data as seen from the operation's beginning."""

    release: str
    data: str  # LIVE: the data that ran then; SNAPSHOT: a snapshot of it; OTHER: anything else

    def __str__(self) -> str:
        return f"{self.release} with {self.data} data"


@dataclass(frozen=True, slots=True)
class Mark:
    """At that length of the log it was known that the operation had come to `state` or further."""

    offset: int
    state: State


@dataclass(frozen=True, slots=True)
class Operation:
    """One upgrade, rollback or clean-up within a log, and the states it may pass, in this order, none twice."""

    name: str
    first: int  # index of the entry it begins with
    last: int  # index behind its last entry
    states: tuple[State, ...]
    marks: tuple[Mark, ...] = ()
    tried: State | None = None  # what may be booted once before
    comes_back: bool = False  # the snapshot is what runs in the end, so it changes


@dataclass
class Findings:
    """What one operation's cuts showed."""

    flushes: int = 0
    others: int = 0
    newer: int = 0  # cuts at which GRUB saw a newer transaction than Linux
    tried: int = 0  # cuts after which a release is tried
    changes: list[tuple[int, State]] = field(default_factory=list)  # number of flushed entries, and what booted then

    def __str__(self) -> str:
        passed = " -> ".join(str(state) for _flushed, state in self.changes)
        special = f"{self.newer} between superblocks, {self.tried} with a trial"
        return f"{self.flushes} flushes, {self.others} other cuts ({special}): {passed}"


class Judge:
    """Judges the looks at an operation's cuts, which come in the log's order. Raises Violation."""

    def __init__(self, operation: Operation, log: Sequence[Entry]) -> None:
        self.operation = operation
        self.findings = Findings()
        self._begin: Subvolume | None = None
        self._snapshot = ""
        self._rank = 0  # at the last flush
        self._pending: list[tuple[Cut, int]] = []  # cuts since then
        self._floors = [(index_at(log, mark.offset), operation.states.index(mark.state)) for mark in operation.marks]

    def see(self, cut: Cut, look: Look) -> None:
        rank = self._rank_of(look)
        floor = max((least for index, least in self._floors if cut.position >= index), default=0)
        if rank < floor:
            raise Violation(f"{self._name(rank)} boots, although it had come to {self._name(floor)}")
        if rank < self._rank:
            raise Violation(f"{self._name(rank)} boots again, after {self._name(self._rank)} did")
        if cut.how == "flush":
            self._settle(rank)
            self.findings.flushes += 1
            if not self.findings.changes or self.findings.changes[-1][1] != self.operation.states[rank]:
                self.findings.changes.append((cut.flushed, self.operation.states[rank]))
        else:
            self._pending.append((cut, rank))
            self.findings.others += 1
        self.findings.newer += look.newer
        self.findings.tried += look.tried is not None

    def finish(self) -> Findings:
        """Raises Violation where the operation did not come to its last state."""
        self._settle(len(self.operation.states) - 1)
        last = self.operation.states[-1]
        if not self.findings.changes or self.findings.changes[-1][1] != last:
            raise Violation(f"{self.operation.name} ended, but {last} does not boot")
        return self.findings

    def _settle(self, rank: int) -> None:
        """No cut may be further than the flush behind it."""
        for cut, found in self._pending:
            if found > rank:
                raise Violation(f"{cut}: {self._name(found)} boots, and {self._name(rank)} after the next flush")
        self._pending.clear()
        self._rank = rank

    def _rank_of(self, look: Look) -> int:
        """How far the operation has come."""
        state = self._state(look.choice.release, look.data)
        if look.choice.record != "selected":
            raise Violation(f"the selected record is broken, so that {state} boots")
        if state not in self.operation.states:
            raise Violation(f"{state} boots, which is none of: {', '.join(map(str, self.operation.states))}")
        if look.tried and look.tried_data:
            self._check_trial(self._state(look.tried.release, look.tried_data), look)
        if state.data == SNAPSHOT and not self.operation.comes_back:
            if self._snapshot and self._snapshot != look.content:
                raise Violation("the snapshot of the data is not what it was")
            self._snapshot = look.content
        return self.operation.states.index(state)

    def _check_trial(self, state: State, look: Look) -> None:
        if state != self.operation.tried:
            raise Violation(f"{state} is tried, instead of {self.operation.tried}")
        if look.tried_data == look.data:
            raise Violation(f"{state} is tried on the very data that the power-on after it boots")

    def _state(self, release: str, data: Subvolume) -> State:
        if self._begin is None:
            self._begin = data
        if data.uuid == self._begin.uuid:
            return State(release, LIVE)
        return State(release, SNAPSHOT if data.parent == self._begin.uuid else OTHER)

    def _name(self, rank: int) -> str:
        return str(self.operation.states[rank])


def index_at(log: Sequence[Entry], offset: int) -> int:
    """How many entries were complete when the log had that length."""
    return bisect_right(log, offset, key=lambda entry: entry.end)


def prove(
    disk: Disk, viewer: Viewer, log: Sequence[Entry], operation: Operation, others: Iterable[Cut] = (),
    visit: Callable[[Cut, Look], None] = lambda _cut, _look: None,
) -> Findings:  # fmt: skip
    """Judge a cut right before the operation, one after each of its flushes, and `others`; `visit` is called at each.

    The disk must not be further than the operation's first entry. Raises Violation that names the cut.
    """
    judge = Judge(operation, log)
    before = after_flushes(log, 0, operation.first)[-1:] or [Cut(0, 0)]
    for cut in replay(disk, log, [*before, *after_flushes(log, operation.first, operation.last), *others]):
        try:
            look = viewer.look()
            judge.see(cut, look)
        except Violation as error:
            raise Violation(f"{operation.name}, {cut}: {error}") from error
        visit(cut, look)
    return judge.finish()
