"""Figures, the goals they are held against, and the table and JSON made of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

Verdict = Literal["met", "missed", ""]


def median(values: Sequence[float]) -> float:
    """The median. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values were measured")
    return statistics.median(values)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of ratios taken pair by pair (a run beside its neighbour), so that a drift of the machine cancels.

    Raises ValueError for no values, unequal numbers of them, or a peer that took no time.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    if any(value <= 0 for value in theirs):
        raise ValueError("a ratio to nothing has no meaning")
    return median([mine / other for mine, other in zip(ours, theirs, strict=True)])


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value: `unit` is 's', 'CPU s', 'KB', 'MB' (10^6 bytes) or 'x' (ratio); `goal`: the most it may be.

    What could not be measured is not a number; `note` says why.
    """

    bench: str
    name: str
    value: float
    unit: str
    goal: float | None = None
    runs: tuple[float, ...] = ()
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.goal is None:
            return ""
        return "met" if self.value <= self.goal else "missed"


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of the benchmarks found; `failures` maps a benchmark that could not run to its reason."""

    machine: dict[str, str]
    figures: tuple[Figure, ...]
    failures: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Stable JSON with a verdict per figure."""
        figures = [
            {**asdict(one), "value": None if math.isnan(one.value) else one.value, "verdict": one.verdict}
            for one in self.figures
        ]
        value = {"machine": self.machine, "figures": figures, "failures": self.failures}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"


def of_runs(
    bench: str, name: str, runs: Sequence[float], unit: str, goal: float | None = None, note: str = ""
) -> Figure:
    """The figure for several runs: their median."""
    return Figure(bench, name, median(runs), unit, goal, tuple(runs), note)


def number(value: float, unit: str) -> str:
    """A value with as many digits as it deserves."""
    if math.isnan(value):
        return "missing"
    digits = 2 if unit == "x" or abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def spread(runs: Sequence[float]) -> str:
    """How far the runs lie apart, empty for a single one."""
    return f"{min(runs):.3g}-{max(runs):.3g} of {len(runs)}" if len(runs) > 1 else ""


def table(figures: Iterable[Figure]) -> str:
    """The figures as aligned text, one line each, in the order given."""
    lines = [("benchmark", "what", "value", "goal", "", "runs", "note")]
    for one in figures:
        goal = "" if one.goal is None else f"<= {number(one.goal, one.unit)}"
        lines.append(
            (one.bench, one.name, number(one.value, one.unit), goal, one.verdict, spread(one.runs), one.note)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = {2, 3}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
