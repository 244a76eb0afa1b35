"""What the recorded node goes through, and which states a power cut may boot meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.power.made import FIRST, Releases
from tests.faults.power.recording import Recording
from tests.faults.power.timeline import LIVE, OTHER, SNAPSHOT, State


@dataclass(frozen=True, slots=True)
class Step:
    """One call of samepage-upgrade-node. `restores`: the name of the step whose data is brought back."""

    name: str
    states: tuple[State, ...]
    bundle: tuple[str, str] = ("", "")  # from one release to another
    words: tuple[str, ...] = ()
    outcome: str = "committed"
    tried: State | None = None
    restores: str = ""

    def command(self) -> Sequence[str]:
        return self.words or ("install", place(*self.bundle))


def place(start: str, goal: str) -> str:
    """Where a bundle lies on the node."""
    return f"/state/{start}-to-{goal}.bundle"


def _upgrade(name: str, start: str, goal: str, tried: State | None = None) -> Step:
    """With data: the old release with a snapshot is what boots in between."""
    return Step(name, (State(start, LIVE), State(start, SNAPSHOT), State(goal, LIVE)), (start, goal), tried=tried)


def _fails(name: str, start: str, goal: str, tried: State | None = None) -> Step:
    states = (State(start, LIVE), State(start, SNAPSHOT))
    return Step(name, states, (start, goal), outcome="rolled-back", tried=tried)


LIVE_STEP = Step("live", (State(FIRST, LIVE), State("1.1", LIVE)), (FIRST, "1.1"))
LIVE_DATA_STEP = _upgrade("live-with-data", "1.1", "1.2")
SOFT_STEP = _upgrade("soft-reboot", "1.2", "1.3")

SHORT = (LIVE_STEP, LIVE_DATA_STEP, SOFT_STEP)
FULL = (
    LIVE_STEP,
    LIVE_DATA_STEP,
    Step(
        "rollback-live-keep", (State("1.2", LIVE), State("1.2", SNAPSHOT), State("1.1", LIVE)),
        words=("rollback", "--data=keep"),
    ),
    _upgrade("live-again", "1.1", "1.2"),
    SOFT_STEP,
    Step(
        "rollback-soft-reboot", (State("1.3", LIVE), State("1.2", OTHER)), words=("rollback",), restores="soft-reboot"
    ),
    _fails("fails-soft-reboot", "1.2", "1.5"),
    _fails("fails-reboot", "1.2", "1.6", tried=State("1.6", LIVE)),
    _upgrade("reboot", "1.2", "1.4", tried=State("1.4", LIVE)),
    Step(
        "rollback-reboot", (State("1.4", LIVE), State("1.2", OTHER)), words=("rollback",),
        tried=State("1.2", OTHER), restores="reboot",
    ),
    Step(
        "download", (State("1.2", LIVE),),
        words=("install", place("1.2", "1.5"), "--download-only", "--retry"), outcome="downloaded",
    ),
    Step("cleanup", (State("1.2", LIVE),), words=("cleanup",), outcome=""),
)  # fmt: skip


def play(steps: Sequence[Step], releases: Releases, recording: Recording) -> None:
    """Carry out every step on the recorded node, while rows are written."""
    for step in steps:
        if step.bundle[0]:
            recording.machine.put(releases.bundle(*step.bundle), place(*step.bundle))
    with recording.writing("row"):
        for step in steps:
            recording.hurry()
            recording.carry_out(step.name, step.command(), step.states, step.outcome, tried=step.tried)
            if step.restores:
                recording.lose_since(step.restores)
