"""The one place that prints: progress and messages on stderr, results on stdout.

Plain text where stderr is no terminal or NO_COLOR is set; TeamCity blocks and GitHub groups where those run the build.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Style = Literal["auto", "plain", "rich", "none"]


class Progress(Protocol):
    """What a long stage reports to; `total` of 0 means unknown. Units are 'bytes', 'packages', 'files' or 's'."""

    def update(self, done: float, total: float, unit: str) -> None: ...


def teamcity_escape(text: str) -> str:
    """Text as a value of a TeamCity service message."""
    pairs = {"|": "||", "'": "|'", "[": "|[", "]": "|]", "\n": "|n", "\r": "|r"}
    return "".join(pairs.get(sign, sign) for sign in text)


@dataclass(slots=True)
class StageTime:
    name: str
    seconds: float
    reason: str  # why it ran; empty when its result was reused


@dataclass(slots=True)
class Console:
    """Reporter of one run. `style` is the value of --progress; `explain` prints why each step ran."""

    style: Style = "auto"
    explain: bool = False
    stages: list[StageTime] = field(default_factory=list)
    _last: float = 0.0
    _active: list[_StageProgress] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether progress may redraw its line."""
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        return self.style == "rich" or (self.style == "auto" and sys.stderr.isatty() and not plain)

    def note(self, text: str) -> None:
        """A line for the user on stderr."""
        if self.style != "none":
            self._clear()
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A warning; shown in every style."""
        self._clear()
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """The failure that ends the run; shown in every style."""
        self._clear()
        if "TEAMCITY_VERSION" in os.environ:
            print(f"##teamcity[buildProblem description='{teamcity_escape(text)[:4000]}']", file=sys.stderr)
        print(f"error: {text}", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        """A line of the command's result on stdout."""
        print(text, flush=True)

    def result_json(self, value: Any) -> None:
        print(json.dumps(value, indent=2, sort_keys=True), flush=True)

    @contextmanager
    def stage(self, name: str, reason: str = "") -> Iterator[Progress]:
        """One step of the pipeline with its time; `reason` says why it runs. Shows that time passes."""
        started = time.monotonic()
        if "TEAMCITY_VERSION" in os.environ:
            self.note(f"##teamcity[blockOpened name='{teamcity_escape(name)}']")
        elif os.environ.get("GITHUB_ACTIONS") == "true":
            self.note(f"::group::{name}")
        self.note(f"{name} ..." + (f"  ({reason})" if reason and self.explain else ""))
        progress = _StageProgress(self, name, started)
        done = threading.Event()
        self._active.append(progress)
        ticker = threading.Thread(target=progress.tick, args=(done,), daemon=True)
        ticker.start()
        self._last = started if not self.live else 0.0
        how = "failed after"
        try:
            yield progress
            how = "done in"
        finally:
            done.set()
            ticker.join()
            self._active.remove(progress)
            seconds = time.monotonic() - started
            self.stages.append(StageTime(name, seconds, reason))
            self.note(f"{name}: {how} {seconds:.1f} s")
            if "TEAMCITY_VERSION" in os.environ:
                self.note(f"##teamcity[blockClosed name='{teamcity_escape(name)}']")
            elif os.environ.get("GITHUB_ACTIONS") == "true":
                self.note("::endgroup::")

    def reused(self, name: str) -> None:
        """A step whose result was still good."""
        self.stages.append(StageTime(name, 0.0, ""))
        if self.explain:
            self.note(f"{name}: unchanged, reused")

    def _clear(self) -> None:
        if self.live and self._last:
            print("\r\033[K", end="", file=sys.stderr)
            self._last = 0.0

    def _draw(self, text: str) -> None:
        now = time.monotonic()
        every = 0.1 if self.live else 15.0
        if self.style == "none" or now - self._last < every:
            return
        self._last = now
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)


@dataclass(slots=True, eq=False)
class _StageProgress:
    console: Console
    name: str
    started: float
    amount: str = ""

    def update(self, done: float, total: float, unit: str) -> None:
        if unit == "bytes":
            self.amount = f"{done / 1e6:.0f}" + (f" of {total / 1e6:.0f}" if total else "") + " MB, "
        elif unit == "s":
            self.amount = f"at most {total:.0f} s, " if total else ""
        else:
            self.amount = f"{done:.0f}" + (f" of {total:.0f}" if total else "") + f" {unit}, "
        self.draw()

    def draw(self) -> None:
        self.console._draw(f"{self.name}: {self.amount}{time.monotonic() - self.started:.0f} s")

    def tick(self, done: threading.Event) -> None:
        """Redraws while nothing is reported; only the innermost stage does."""
        while not done.wait(1.0):
            if self.console._active and self.console._active[-1] is self:
                self.draw()
