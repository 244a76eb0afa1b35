"""The operations of a delta as they are collected, joined and packed; `appliance.node.delta` has the format."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import zstandard

from appliance.node import delta as format_

_LEVEL = 19
_SMALL = 1 << 20  # new bytes are looked at in parts of this size
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
    old: int = 0  # PATCH: size of the dictionary


@dataclass(slots=True)
class Program:
    """Collects operations, joins neighbours and packs the streams."""

    sources: int
    ops: bytearray = field(default_factory=bytearray)
    streams: dict[int, bytearray] = field(
        default_factory=lambda: {
            kind: bytearray() for kind in (format_.ADD, format_.WORDS, format_.LITERAL, format_.PATCH)
        }
    )
    chosen: int = 0
    ends: list[int] = field(default_factory=list)
    last: Piece | None = None

    def __post_init__(self) -> None:
        self.ends = [0] * (self.sources + 1)

    def put(self, piece: Piece) -> None:
        if piece.kind in self.streams:
            self.streams[piece.kind] += piece.payload
        last = self.last
        if last and last.kind == piece.kind != format_.PATCH and (
            piece.kind in (format_.LITERAL, format_.ZERO)
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
        sourced = piece.kind not in (format_.LITERAL, format_.ZERO)
        if sourced and piece.source != self.chosen:
            format_.put_number(self.ops, piece.source << 3 | format_.SOURCE)
            self.chosen = piece.source
        format_.put_number(self.ops, piece.size << 3 | piece.kind)
        if sourced:
            format_.put_signed(self.ops, piece.start - self.ends[piece.source])
            self.ends[piece.source] = piece.start + piece.size
        if piece.kind == format_.PATCH:
            format_.put_number(self.ops, len(piece.payload))
            format_.put_number(self.ops, piece.old)
            self.ends[piece.source] = piece.start + piece.old

    def pack(self) -> bytes:
        self.flush()
        format_.put_number(self.ops, format_.END)
        runs = [self.ops, *(self.streams[kind] for kind in (format_.ADD, format_.WORDS, format_.LITERAL))]
        packed = [compress(bytes(run), window) for run, window in zip(runs, format_.WINDOW_LOGS, strict=True)]
        packed.append(bytes(self.streams[format_.PATCH]))
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
