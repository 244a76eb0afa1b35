"""Which moments are looked at, and what a disk may hold then."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from tests.faults.power.logwrites import Entry
from tests.faults.power.replay import BLOCK, Blocks, Disk, block_count

SMALL = 5  # writes without a flush of which every choice is tried where it matters


@dataclass(frozen=True, slots=True)
class Cut:
    """One power cut: what is on the disk of the log's first `position` entries."""

    position: int  # that many entries were complete
    flushed: int  # that many of them are on the disk for good
    kept: tuple[int, ...] = ()  # indexes of the later ones that are on the disk, too
    torn: Mapping[int, Blocks] = field(default_factory=dict)  # those of them that are there in part: which blocks
    how: str = "flush"

    def __str__(self) -> str:
        lost = self.position - self.flushed - len(self.kept)
        return f"cut after entry {self.position} ({self.how}; {lost} unflushed entries lost, {len(self.torn)} torn)"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was written between two flushes."""

    first: int  # index of its first entry
    end: int  # index of the flush that ends it, or the log's length
    writes: tuple[int, ...]  # entries that change the disk and may be lost


def epochs(log: Sequence[Entry], first: int = 0, last: int | None = None) -> list[Epoch]:
    """The epochs of log[first:last]."""
    found: list[Epoch] = []
    begin, writes = first, list[int]()
    for entry in log[first:last]:
        if entry.flush:
            found.append(Epoch(begin, entry.index, tuple(writes)))
            begin, writes = entry.index + 1, []
        elif entry.changes and not entry.durable:
            writes.append(entry.index)
    found.append(Epoch(begin, len(log) if last is None else last, tuple(writes)))
    return found


def after_flushes(log: Sequence[Entry], first: int = 0, last: int | None = None) -> list[Cut]:
    """A cut right behind every flush in log[first:last]."""
    return [Cut(entry.index + 1, entry.index + 1) for entry in log[first:last] if entry.flush]


def reordered(
    log: Sequence[Entry], count: int, seed: int, *, first: int = 0, last: int | None = None, near: Iterable[int] = ()
) -> list[Cut]:
    """`count` different cuts within log[first:last] that lose a part of what no flush has followed.

    `near` are indexes of entries that matter most: of small epochs around them every choice is taken, and half of the
    other cuts fall there. Fewer cuts come back only where there are fewer.
    """
    dice = random.Random(seed)
    every = [epoch for epoch in epochs(log, first, last) if _loses(log, epoch)]
    close = [epoch for epoch in every if any(epoch.first - 200 <= index <= epoch.end + 200 for index in near)]
    found: dict[tuple[object, ...], Cut] = {}
    small = sorted((epoch for epoch in close if 1 < len(epoch.writes) <= SMALL), key=lambda one: _distance(one, near))
    for cut in _all_choices(log, small):
        if len(found) < count // 2:
            found.setdefault(_identity(cut), cut)
    for attempt in range(20 * count):
        if len(found) >= count or not every:
            break
        epoch = dice.choice(close if close and attempt % 2 else every)
        random_cut = _choose(log, epoch, dice)
        if random_cut is not None:
            found.setdefault(_identity(random_cut), random_cut)
    return list(found.values())


def _loses(log: Sequence[Entry], epoch: Epoch) -> bool:
    """Whether a part of the epoch can be lost and another part kept."""
    return len(epoch.writes) > 1 or any(block_count(log[index]) > 1 for index in epoch.writes)


def _distance(epoch: Epoch, near: Iterable[int]) -> int:
    return min((abs(epoch.end - index) for index in near), default=0)


def _identity(cut: Cut) -> tuple[object, ...]:
    return cut.flushed, cut.kept, tuple((index, tuple(blocks)) for index, blocks in sorted(cut.torn.items()))


def _durable(log: Sequence[Entry], first: int, end: int) -> set[int]:
    return {entry.index for entry in log[first:end] if entry.durable and entry.changes}


def _all_choices(log: Sequence[Entry], small: Iterable[Epoch]) -> Iterator[Cut]:
    for epoch in small:
        always = _durable(log, epoch.first, epoch.end)
        for size in range(1, len(epoch.writes)):
            for kept in combinations(epoch.writes, size):
                yield Cut(epoch.end, epoch.first, tuple(sorted({*kept, *always})), how="every choice")


def _choose(log: Sequence[Entry], epoch: Epoch, dice: random.Random) -> Cut | None:
    """A random cut within an epoch; None where this one would lose nothing."""
    count = dice.randint(1, len(epoch.writes))
    done = epoch.writes[:count]
    position = done[-1] + 1
    order = dice.sample(done, count)
    how = dice.choice(("one lost", "one kept", "shuffled", "torn"))
    kept = {"one lost": order[1:], "one kept": order[:1]}.get(how, order[: dice.randint(0, count)])
    torn: dict[int, Blocks] = {}
    if how == "torn":
        for index in kept:
            blocks = block_count(log[index])
            if blocks > 1 and dice.random() < 0.7:
                torn[index] = sorted(dice.sample(range(blocks), dice.randint(1, blocks - 1)))
    if (len(kept) == count and not torn) or not kept:
        return None
    always = _durable(log, epoch.first, position)
    return Cut(position, epoch.first, tuple(sorted({*kept, *always})), torn, how)


def replay(disk: Disk, log: Sequence[Entry], cuts: Iterable[Cut]) -> Iterator[Cut]:
    """Brings the disk into the state of one cut after the other, and yields each while the disk is in it."""
    done = 0
    for cut in sorted(cuts, key=lambda one: (one.flushed, one.how != "flush", one.position)):
        for entry in log[done : cut.flushed]:
            disk.apply(entry)
        done = max(done, cut.flushed)
        with disk.trial():
            for index in cut.kept:
                disk.apply(log[index], cut.torn.get(index))
            yield cut


__all__ = ["BLOCK", "Cut", "Epoch", "after_flushes", "epochs", "reordered", "replay"]
