"""Everything that a node reads from others, and what it left itself before a power cut, with any content.

Whatever stands there, a parser answers with a value or with its own refusal, in bounded memory, and no name that comes
out of it leads outside the state partition. What is signed is fuzzed behind its signature, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NASTY = [
    "", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "a\nb", "a'b", "$(reboot)", "-rf", "~",
    "x" * 300, "a b", "1.0.partial", "CON", "\u202e", "\ud800", "é", "%2e%2e%2f", "1.0\n",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from([1 << 50, (1 << 50) + 1, 10**400, -(10**30)])
    | st.floats() | st.sampled_from(NASTY) | st.text(max_size=6) | st.sampled_from(["f" * 64, "F" * 64, "0" * 16])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few of them changed, taken out, put in or repeated."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        end = min(len(found), at + draw(st.integers(0, 40)))
        what = draw(st.sampled_from(["change", "remove", "insert", "repeat", "cut"]))
        if what == "change" and at < len(found):
            found[at] = draw(st.integers(0, 255))
        elif what == "remove":
            del found[at:end]
        elif what == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif what == "repeat":
            found[at:at] = found[at:end]
        elif what == "cut" and draw(st.booleans()):
            del found[at:]
    return bytes(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, child in children for found in places(child, (*path, key))]


@st.composite
def bent(draw: st.DrawFn, value: Any) -> Any:
    """The JSON value with one to three of its parts replaced, removed, or joined by others."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(places(found)))
        if not where:
            continue
        place = found
        for key in where[:-1]:
            place = place[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "replace":
            place[where[-1]] = draw(VALUES)
        elif what == "remove":
            del place[where[-1]]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=5))] = draw(VALUES)
        else:
            place.append(draw(VALUES))
    return found


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def stays(folder: str, name: str | Path) -> bool:
    """Whether a name that is joined to the folder stays below it."""
    path = str(Path(folder) / name)
    return os.path.normpath(path).startswith(folder + "/") and "\0" not in path and "\n" not in path
