"""Line numbers in compiled Python modules, which all change behind a line that was added to their source.

A code object in the marshal format (https://github.com/python/cpython/blob/3.13/Python/marshal.c, `w_complex_object`)
holds, one behind the other, its qualified name, the line it begins at, a 32-bit little-endian number, and a string
object with its table of lines: `s`, and its length in 32 bits. So a number between a byte that is not zero and such a
beginning is taken for a line. It need not be one: who shifts lines and who made a delta of what comes out go by the
same rule, and bytes that happen to look so only make the delta larger.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_SHIFTS = 1 << 12  # of one module
_BEHIND = re.compile(rb"\0s..\0\0", re.DOTALL)  # the highest byte of a line, and the beginning of its table
_HIGHEST = 1 << 20


class Shift(NamedTuple):
    """Lines from `line` on moved by `by`, up to the next shift."""

    line: int
    by: int


def lines(module: bytes) -> Iterator[tuple[int, int]]:
    """Where in a module a line stands, and the line."""
    for found in _BEHIND.finditer(module, 4):
        at = found.start() - 3
        line = int.from_bytes(module[at : at + 4], "little")
        if line < _HIGHEST and at and module[at - 1]:
            yield at, line


def shifted(module: bytes, shifts: Sequence[Shift]) -> bytes:
    """The module with each line moved by the last shift, in the order of lines, that does not begin behind it."""
    if not shifts:
        return module
    out, starts = bytearray(module), [shift.line for shift in shifts]
    for at, line in lines(module):
        number = bisect_right(starts, line) - 1
        if number >= 0:
            out[at : at + 4] = (line + shifts[number].by & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(out)
