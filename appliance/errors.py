"""Every way the builder can refuse, and the collector that reports all faults of a tree at once.

Exit statuses of the builder: 0 done, 1 the work failed, 2 the input or the usage is wrong, 3 something on the host is
missing, 130 cancelled.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


class ApplianceError(Exception):
    """A failure the user can act on. `hint` is the action to take; `status` the exit status."""

    status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class HostError(ApplianceError):
    """The host lacks a program, a permission, memory or disk space."""

    status = 3


class CommandError(ApplianceError):
    """A program that the builder ran failed; the message holds a command that can be pasted."""


class UnknownName(ApplianceError):
    """The command line names something that does not exist."""

    status = 2


class LockError(ApplianceError):
    """The lock does not fit the recipes or the archive."""

    status = 2


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing wrong with the input: file relative to the project, 1-based line (0: whole file), dotted key."""

    file: str
    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        key = f": {self.key}" if self.key else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{key}: {self.message}{hint}"


class InputError(ApplianceError):
    """All faults found in one run, sorted by place."""

    status = 2

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(sorted(set(faults)))
        count = len(self.faults)
        total = f"{count} fault{'s' if count != 1 else ''}; nothing was built"
        super().__init__("\n".join([total, *map(str, self.faults)]))


@dataclass(slots=True)
class Faults:
    """Collects faults while a tree is read, so that one run reports all of them."""

    found: list[Fault] = field(default_factory=list)

    def add(self, file: str, line: int, key: str, message: str, hint: str = "") -> None:
        self.found.append(Fault(file, line, key, message, hint))

    def check(self) -> None:
        """Raise InputError if anything was found."""
        if self.found:
            raise InputError(self.found)


def nearest(word: str, valid: Iterable[str], otherwise: str = "") -> str:
    """A hint that names the valid value closest to `word`; when none is close `otherwise`, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if otherwise:
        return otherwise
    return f"valid here: {', '.join(names)}" if names else "nothing is valid here"
