"""The order of release versions. Part of the node's own code."""

from __future__ import annotations

import re

_PARTS = re.compile(r"[0-9]+|[A-Za-z]+|~")


def order(version: str) -> tuple[tuple[int, int, str], ...]:
    """A key to sort versions by: numbers by value, words by alphabet, '~' before the end, as Debian does.

    2026.9 < 2026.10~rc1 < 2026.10 < 2026.10.1
    """
    parts = []
    for part in _PARTS.findall(version):
        if part == "~":
            parts.append((0, 0, ""))
        elif part.isdigit():
            parts.append((3, int(part), ""))
        else:
            parts.append((2, 0, part))
    return (*parts, (1, 0, ""))
