"""What a verification found: steps (boot, install, health) and checks, as the plugin writes and the reports read them.

The plugin appends one JSON object per line to a file while it runs, so that a report can be made of a run that died.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passed", "failed", "error", "skipped"]
RED: tuple[Outcome, ...] = ("failed", "error")


@dataclass(frozen=True, slots=True)
class Step:
    """Something that had to happen before the checks. Times are seconds since the epoch."""

    name: str
    start: float
    finish: float
    ok: bool
    detail: str = ""  # why it failed: probes, journal

    @property
    def seconds(self) -> float:
        return self.finish - self.start


@dataclass(frozen=True, slots=True)
class Check:
    """One check and how it ended. `id` is pytest's, relative to the project."""

    id: str
    recipe: str
    name: str
    title: str  # the check's own words: the first line of its docstring
    outcome: Outcome
    start: float
    finish: float
    detail: str = ""  # the failure, or why it was skipped
    output: str = ""  # what it printed and what the log holds
    cut: bool = False  # it overran its deadline

    @property
    def seconds(self) -> float:
        return self.finish - self.start


@dataclass(frozen=True, slots=True)
class Results:
    """One verification of one node."""

    host: str
    steps: tuple[Step, ...] = ()
    checks: tuple[Check, ...] = ()
    node: Mapping[str, Any] = field(default_factory=dict)  # the node's node.json
    health: Mapping[str, Any] = field(default_factory=dict)  # the health command's JSON
    release: str = ""

    def count(self, *outcomes: Outcome) -> int:
        return sum(check.outcome in outcomes for check in self.checks)

    def by_recipe(self) -> dict[str, list[Check]]:
        """The checks of each recipe, recipes in the order in which they were checked."""
        groups: dict[str, list[Check]] = {}
        for check in self.checks:
            groups.setdefault(check.recipe, []).append(check)
        return groups

    @property
    def ok(self) -> bool:
        """Green: every step succeeded, no check is red, and there was at least one that passed."""
        return all(step.ok for step in self.steps) and not self.count(*RED) and self.count("passed") > 0

    @property
    def span(self) -> tuple[float, float]:
        """First start and last finish."""
        starts = [step.start for step in self.steps] + [check.start for check in self.checks]
        finishes = [step.finish for step in self.steps] + [check.finish for check in self.checks]
        return min(starts, default=0.0), max(finishes, default=0.0)

    def summary(self) -> dict[str, Any]:
        """For `--json`: the counts, every step, and what is red or skipped with its reason."""
        start, finish = self.span
        return {
            "ok": self.ok, "host": self.host, "node": self.node.get("name", ""), "release": self.release,
            "tests": len(self.checks), "passed": self.count("passed"), "failed": self.count("failed"),
            "errors": self.count("error"), "skipped": self.count("skipped"), "seconds": round(finish - start, 3),
            "steps": [{**asdict(step), "seconds": round(step.seconds, 3)} for step in self.steps],
            "red": [_brief(check) for check in self.checks if check.outcome in RED],
            "left_out": [_brief(check) for check in self.checks if check.outcome == "skipped"],
        }  # fmt: skip


def _brief(check: Check) -> dict[str, Any]:
    return {"id": check.id, "recipe": check.recipe, "detail": check.detail, "cut": check.cut}


def append(file: Path, event: str, **values: Any) -> None:
    """Add one event to the plugin's record."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"event": event, **values}) + "\n")


def read_steps(file: Path | None) -> list[Step]:
    """The steps that ran before the verification, from a JSON list of {name, start, finish, seconds, ok, detail}."""
    if file is None or not file.exists():
        return []
    return [
        Step(entry["name"], entry["start"], entry["finish"], entry["ok"], entry.get("detail", ""))
        for entry in json.loads(file.read_text(encoding="utf-8"))
    ]


def gather(host: str, steps: Iterable[Step], events: Path, now: float) -> Results:
    """Put the plugin's record together. A check that began and never ended is an error, as is one that never began."""
    all_steps, checks = list(steps), dict[str, Check]()
    known: dict[str, dict[str, str]] = {}
    begun: dict[str, float] = {}
    node: dict[str, Any] = {}
    health: dict[str, Any] = {}
    release = ""
    ended = False
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    for line in lines:
        values = json.loads(line)
        match values.pop("event"):
            case "node":
                node, health, release = values["node"], values["health"], values["release"]
            case "step":
                all_steps.append(Step(**values))
            case "collected":
                known = {entry["id"]: entry for entry in values["checks"]}
            case "begin":
                begun[values["id"]] = values["start"]
            case "check":
                checks[values["id"]] = Check(**values)
            case "end":
                ended = True
    for id_, entry in known.items():
        if id_ not in checks:
            why = "the run ended in the middle of this check" if id_ in begun else "the run ended before this check"
            named = (entry["id"], entry["recipe"], entry["name"], entry["title"])
            checks[id_] = Check(*named, "error", begun.get(id_, now), now, why)
    if not ended:
        all_steps.append(Step("run the checks", now, now, False, "the run of the checks ended early; see the log"))
    return Results(host, tuple(all_steps), tuple(checks.values()), node, health, release)
