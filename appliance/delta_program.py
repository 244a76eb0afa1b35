"""The operations of a delta as they are collected, joined and packed; `appliance.node.delta` has the format."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zstandard

from appliance.node import delta as format_
from appliance.node.lines import Shift

_LEVEL = 19
_SMALL = 1 << 20  # new bytes are looked at in parts of this size
_SOURCED = (format_.COPY, format_.ADD, format_.WORDS)
_UNIT = {format_.COPY: 1, format_.ADD: 1, format_.WORDS: 4}  # only the end of an operation may break it
_QUIET = re.compile(rb"\0{32,}")
_LARGE = 256 << 20  # a stream of this size is compressed by two threads and less hard


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [offset, offset + size) of the new file and how: kind of operation, place of the old bytes."""

    offset: int
    size: int
    kind: int
    source: int = 0
    start: int = 0
    payload: bytes = b""
    old: int = 0  # PATCH: how many old bytes go into the frame's dictionary
    shifts: tuple[Shift, ...] = ()  # PATCH: of lines in these bytes


@dataclass(slots=True)
class Program:
    """Collects operations, joins neighbours and packs the streams."""

    sources: int
    ops: bytearray = field(default_factory=bytearray)
    streams: dict[int, bytearray] = field(
        default_factory=lambda: {
            kind: bytearray() for kind in (format_.ADD, format_.WORDS, format_.LITERAL)
        }
    )
    frames: bytearray = field(default_factory=bytearray)
    opened: int = 0  # size of a frame that no operation has opened yet
    chosen: int = 0
    ends: list[int] = field(default_factory=list)
    last: Piece | None = None

    def __post_init__(self) -> None:
        self.ends = [0] * (self.sources + 1)

    def put(self, piece: Piece) -> None:
        if piece.kind in self.streams:
            self.streams[piece.kind] += piece.payload
        last = self.last
        if last and last.kind == piece.kind and (
            piece.kind not in _SOURCED
            or (last.source, last.start + last.size, last.size % _UNIT[piece.kind]) == (piece.source, piece.start, 0)
        ):  # fmt: skip
            self.last = Piece(last.offset, last.size + piece.size, last.kind, last.source, last.start)
            return
        self.flush()
        self.last = piece

    def flush(self) -> None:
        piece, self.last = self.last, None
        if piece is None:
            return
        if piece.kind in _SOURCED:
            self._from(piece.kind, piece.size, piece.source, piece.start)
            return
        format_.put_number(self.ops, piece.size << 3 | piece.kind)
        if piece.kind == format_.PATCH and self.opened:
            format_.put_number(self.ops, self.opened)
            self.opened = 0

    def _from(self, kind: int, size: int, source: int, start: int) -> None:
        if source != self.chosen:
            format_.put_number(self.ops, source << 3 | format_.SOURCE)
            self.chosen = source
        format_.put_number(self.ops, size << 3 | kind)
        format_.put_signed(self.ops, start - self.ends[source])
        self.ends[source] = start + size

    def open(self, pieces: Sequence[Piece], frame: bytes) -> None:
        """The coming pieces of kind PATCH share a frame; the old bytes of all are its dictionary."""
        self.flush()
        for piece in pieces:
            self._from(format_.KNOWN, piece.old, piece.source, piece.start)
            format_.put_number(self.ops, len(piece.shifts))
            line = 0
            for shift in piece.shifts:
                format_.put_number(self.ops, shift.line - line)
                format_.put_signed(self.ops, shift.by)
                line = shift.line
        self.frames += frame
        self.opened = len(frame)

    def pack(self) -> bytes:
        self.flush()
        runs = [self.ops, *(self.streams[kind] for kind in (format_.ADD, format_.WORDS, format_.LITERAL))]
        packed = [compress(bytes(run), window) for run, window in zip(runs, format_.WINDOW_LOGS, strict=True)]
        packed.append(bytes(self.frames))
        head = bytearray()
        for run in packed:
            format_.put_number(head, len(run))
        return bytes(head) + b"".join(packed)


def compress(content: bytes, window_log: int) -> bytes:
    if not content:
        return b""
    large = len(content) > _LARGE
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL - 8 * large, source_size=len(content),
        window_log=min(window_log, max(10, len(content).bit_length())),
        write_content_size=0, write_checksum=0, threads=2 * large,
    )  # fmt: skip
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def fresh(content: mmap.mmap | bytes, start: int, end: int) -> Iterator[Piece]:
    """Bytes that no old file has: literals, and zeros where there are many."""
    while start < end:
        part = content[start : min(end, start + _SMALL)]
        at = 0
        for quiet in _QUIET.finditer(part):
            if quiet.start() > at:
                yield Piece(start + at, quiet.start() - at, format_.LITERAL, payload=part[at : quiet.start()])
            yield Piece(start + quiet.start(), quiet.end() - quiet.start(), format_.ZERO)
            at = quiet.end()
        if at < len(part):
            yield Piece(start + at, len(part) - at, format_.LITERAL, payload=part[at:])
        start += len(part)
