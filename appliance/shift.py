"""How one file becomes another: runs of old bytes, some of them shifted by small differences, and new bytes.

Several encoders try; the one whose result is smallest once compressed wins. Programs and modules do best with
differences (an address that moved differs by the same number everywhere), texts and compiled modules with a frame that
has the old bytes as its dictionary.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

import zstandard
from bsdiff4 import core

from appliance.node.delta import ADD, COPY, FRAME_LIMIT, LITERAL, PATCH
from appliance.node.lines import MOST_SHIFTS, Shift, lines, shifted

_WINDOW = 8 << 20  # the suffix sort takes 16 times this
_PROGRAM = b"\x7fELF"  # differences are always smaller
_HARD = 19  # level of zstd
_OPERATION = 3  # bytes, about
_WORTH_TRYING = 200  # bytes
_NAME = 24  # bytes in front of a line by which it is known again
_QUIET = re.compile(rb"\0{1024,}")


@dataclass(frozen=True, slots=True)
class Change:
    """`size` bytes of the new file. `start`: place in the old one; `payload`: differences or new bytes.

    Of a PATCH, the first `old` bytes from `start` on, their lines moved by `shifts`, are for the frame's dictionary.
    """

    kind: int
    size: int
    start: int = 0
    payload: bytes = b""
    old: int = 0
    shifts: tuple[Shift, ...] = ()


def changes(new: bytes, old: bytes, whole: bool = False) -> list[Change]:
    """The smallest way found. `whole`: both files lie in one run of bytes each, so that a frame may be used."""
    front = _common(new, old)
    back = _common(new[front:][::-1], old[front:][::-1])
    middle, other = new[front : len(new) - back], old[front : len(old) - back]
    found = [Change(COPY, front, 0)] if front else []
    if middle:
        shifted = _shifted_parts(middle, other, front)
        framed = whole and 0 < len(other) <= FRAME_LIMIT >= len(middle) and not new.startswith(_PROGRAM)
        if _cost(shifted, 1) >= len(pack_frame(middle, level=1)):
            shifted = [Change(LITERAL, len(middle), payload=middle)]  # compressed content shares nothing
        found += (_framed(middle, other, front, _cost(shifted, _HARD)) if framed else None) or shifted
    if back:
        found.append(Change(COPY, back, len(old) - back))
    return found


def _cost(made: list[Change], level: int) -> int:
    """About how many bytes of a delta the changes take, compressed at a level of zstd."""
    payloads = (b"".join(one.payload for one in made if one.kind == kind) for kind in (ADD, LITERAL))
    return sum(len(pack_frame(payload, level=level)) for payload in payloads if payload) + _OPERATION * len(made)


def pack_frame(content: bytes, dictionary: bytes = b"", level: int = _HARD) -> bytes:
    """A zstd frame that names its size."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(content) + len(dictionary), write_content_size=True, write_checksum=False
    )
    known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if dictionary else None
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=known).compress(content)


def _framed(new: bytes, old: bytes, start: int, limit: int) -> list[Change] | None:
    """A frame with the old bytes as its dictionary, if it is smaller than `limit`."""
    if limit < _WORTH_TRYING:
        return None
    shifts = line_shifts(new, old)
    frame = pack_frame(new, shifted(old, shifts))
    if len(frame) + 4 * _OPERATION >= limit:
        return None
    return [Change(PATCH, len(new), start, new, len(old), shifts)]


def line_shifts(new: bytes, old: bytes) -> tuple[Shift, ...]:
    """How the lines of a compiled module's functions moved, by the functions in both."""
    sides = [[(module[max(0, at - _NAME) : at], line) for at, line in lines(module)] for module in (old, new)]
    names = [[name for name, _ in side] for side in sides]
    moved: dict[int, int] = {}
    for a, b, size in SequenceMatcher(None, names[0], names[1], autojunk=False).get_matching_blocks():
        for (_, was), (_, now) in zip(sides[0][a : a + size], sides[1][b : b + size], strict=True):
            moved.setdefault(was, now - was)
    shifts, last = [], 0
    for line, by in sorted(moved.items()):
        if by != last:
            shifts.append(Shift(line, by))
            last = by
    return tuple(shifts[:MOST_SHIFTS])


def _common(a: bytes, b: bytes) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        half = (low + high + 1) // 2
        if a[low:half] == b[low:half]:
            low = half
        else:
            high = half - 1
    return low


def _shifted_parts(new: bytes, old: bytes, start: int) -> list[Change]:
    """Large files go part by part, each against the old one's bytes around its place."""
    found: list[Change] = []
    for at in range(0, len(new), _WINDOW):
        low = max(0, at - _WINDOW // 4)
        found += _shifted(new[at : at + _WINDOW], old[low : low + _WINDOW + _WINDOW // 2], start + low)
    return found


def _shifted(new: bytes, old: bytes, start: int) -> Iterator[Change]:
    """By bsdiff's matching: old bytes plus differences."""
    control, difference, extra = core.diff(old, new)
    at = place = fresh = 0
    for same, more, skip in _triples(control):
        yield from _split(difference[at : at + same], start + place)
        if more:
            yield Change(LITERAL, more, payload=extra[fresh : fresh + more])
        at, fresh, place = at + same, fresh + more, place + same + skip


def _triples(control: bytes) -> Iterator[tuple[int, int, int]]:
    """bsdiff's control numbers: 64 bits, the highest of which is the sign."""
    numbers = [value if value < 1 << 63 else (1 << 63) - value for (value,) in struct.iter_unpack("<Q", control)]
    yield from zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)


def _split(difference: bytes, start: int) -> Iterator[Change]:
    """Long runs without a difference are copies, which cost less to apply."""
    at = 0
    for quiet in _QUIET.finditer(difference):
        if quiet.start() > at:
            yield Change(ADD, quiet.start() - at, start + at, difference[at : quiet.start()])
        yield Change(COPY, quiet.end() - quiet.start(), start + quiet.start())
        at = quiet.end()
    if at < len(difference):
        yield Change(ADD, len(difference) - at, start + at, difference[at:])
