"""Lines in compiled modules: found where they are, moved as told, and cheap in a delta."""

from __future__ import annotations

import dis
import marshal
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from appliance import bytecode
from appliance.node.lines import Shift, lines, shifted
from appliance.shift import line_shifts
from tests.unit.test_delta import round_trip

SOURCE = Path(dis.__file__).read_text()  # some module with classes, functions, generators and comprehensions
HEAD = 16  # bytes of a compiled module's file in front of its code


def compiled(source: str) -> bytes:
    return bytecode.compiled(source.encode(), "/usr/lib/module.py")


def first_lines(module: bytes) -> list[int]:
    """Of all code objects of a module that lie in functions and classes, with a line anywhere."""

    def walk(code: types.CodeType) -> Iterator[int]:
        yield code.co_firstlineno
        for one in code.co_consts:
            if isinstance(one, types.CodeType):
                yield from walk(one)

    return sorted(walk(marshal.loads(module[HEAD:])))


def with_lines(source: str, at: int, count: int) -> str:
    """The source with empty lines in front of the first definition at or behind a line."""
    found = source.splitlines(keepends=True)
    at = next(number for number, line in enumerate(found) if number >= at and line.startswith(("def ", "class ")))
    return "".join([*found[:at], "\n" * count, *found[at:]])


def test_every_line_of_a_module_is_found() -> None:
    module = compiled(SOURCE)
    found, there = Counter(line for _, line in lines(module)), Counter(first_lines(module))
    assert not there - found
    assert (found - there).total() < 10  # what only looks like one


def test_lines_move_by_the_last_shift_before_them() -> None:
    old, new = compiled(SOURCE), compiled(with_lines(with_lines(SOURCE, 300, 7), 100, 2))
    shifts = line_shifts(new, old)
    assert [shift.by for shift in shifts] == [2, 9]
    assert first_lines(shifted(old, shifts)) == first_lines(new)


def test_a_line_more_in_a_module_costs_little(tmp_path: Path) -> None:
    old, new = compiled(SOURCE), compiled(with_lines(SOURCE, 10, 1))
    assert len(round_trip(tmp_path, new, old)) < 120  # of some 40 KB, with 60 functions that all moved


def test_no_shift_changes_nothing() -> None:
    module = compiled(SOURCE)
    assert line_shifts(module, module) == ()
    assert shifted(module, ()) == module


NOISE = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from([b"name", b"\7\0\0\0s\2\0\0\0", b"\0", b"s"]), max_size=40).map(b"".join),
)


@given(NOISE, st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(-(1 << 40), 1 << 40)), max_size=4))
def test_any_bytes_keep_their_size(noise: bytes, moved: list[tuple[int, int]]) -> None:
    shifts = [Shift(*one) for one in sorted(moved)]
    assert len(shifted(noise, shifts)) == len(noise)


@given(NOISE, NOISE)
def test_shifts_are_found_between_any_bytes(new: bytes, old: bytes) -> None:
    shifts = line_shifts(new, old)
    assert list(shifts) == sorted(shifts)
