"""Rebuilds a file from old files and a delta. Part of the node's own code; the builder writes the format below.

A delta is five runs of bytes, whose sizes stand in front of it as five varints (7 bits a byte, the lowest first):

    ops      zstd  varints, see below
    bytes    zstd  differences of single bytes
    words    zstd  differences of 32-bit little-endian words
    literals zstd  new bytes
    frames   -     zstd frames, each compressed with old bytes as its dictionary

An operation is a varint `size << 3 | kind` and, where it reads an old file, a signed varint (its lowest bit is the
sign): how far its place lies from where the last one ended in the same file. Operations make the new file in order:

    COPY     `size` old bytes              ADD    old bytes plus differences of bytes
    LITERAL  `size` new bytes              WORDS  old words plus differences of words; `size` is in bytes,
                                                  and bytes left over at its end are added singly
    ZERO     `size` zero bytes             KNOWN  `size` old bytes are the next of the coming frame's dictionary; then
    SOURCE   now read old file no. `size`         the number of line shifts and the shifts, see `lines.py`: varints
    PATCH    `size` bytes of the frame            of lines since the last one, and signed varints
             that is open; when all of its bytes are taken, the next one opens, and its size is a further varint

The file that is being made is one more source, behind the old ones. Memory is bounded whatever a delta says: the
streams' windows are limited, a frame has at most FRAME_LIMIT old and new bytes, and everything else is moved in small
pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import IO, cast

import zstandard

from appliance.node.lines import MOST_SHIFTS, Shift, shifted

COPY, ADD, WORDS, LITERAL, ZERO, SOURCE, PATCH, KNOWN = range(8)
RUNS = 5
WINDOW_LOGS = (20, 21, 20, 22)  # how far ops, bytes, words and literals may reach back: 1 to 4 MiB
FRAME_LIMIT = 1 << 21  # bytes of the dictionary and of the content of a frame
_PIECE = 1 << 18
_ADD_PIECE = 1 << 14  # small, so that pieces without a difference are common
_ZEROS = bytes(_PIECE)


class DeltaError(ValueError):
    """The delta is damaged, or does not fit its sources."""


class Slice:
    """A run of bytes of an open file, read without moving the file's position."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.descriptor, self.offset, self.size = descriptor, offset, size
        self._at = 0

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises DeltaError where they are not there."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DeltaError("an operation reads outside its file")
        parts = []
        while size:
            part = os.pread(self.descriptor, size, self.offset + offset)
            if not part:
                raise DeltaError("a file is shorter than it was")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`: what a decompressor reads from."""
        left = self.size - self._at
        size = left if size < 0 else min(size, left)
        part = self.read_at(self._at, size) if size else b""
        self._at += size
        return part

    def part(self, offset: int, size: int) -> Slice:
        """A run within this one. Raises DeltaError where it leaves it."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise DeltaError("a part leaves its file")
        return Slice(self.descriptor, self.offset + offset, size)


class _Stream:
    """A compressed run, decompressed piece by piece."""

    def __init__(self, source: Slice, window_log: int) -> None:
        limit = zstandard.ZstdDecompressor(max_window_size=1 << window_log)
        self._reader = limit.stream_reader(cast(IO[bytes], source), read_size=1 << 16)
        self._empty = source.size == 0

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises DeltaError where there are fewer."""
        found = b"" if self._empty else self._reader.read(size)
        while len(found) < size:
            more = b"" if self._empty else self._reader.read(size - len(found))
            if not more:
                raise DeltaError("a stream of the delta ends early")
            found += more
        return found

    def some(self) -> bytes:
        """The next bytes, however many; none at the end."""
        return b"" if self._empty else self._reader.read(1 << 14)

    def at_end(self) -> bool:
        return self._empty or not self._reader.read(1)


class _Varints:
    """Numbers from a stream."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._buffer, self._at = b"", 0
        self._ended = False

    def number(self) -> int:
        """The next unsigned number. Raises DeltaError where it is longer than 63 bits or cut off."""
        value = shift = 0
        while True:
            if self.at_end():
                raise DeltaError("the operations of the delta end early")
            byte = self._buffer[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 56:
                raise DeltaError("a number of the delta is too long")

    def signed(self) -> int:
        value = self.number()
        return value >> 1 if not value & 1 else -(value >> 1) - 1

    def at_end(self) -> bool:
        if self._at == len(self._buffer):
            self._buffer, self._at = self._stream.some(), 0
        return not self._buffer


def put_number(out: bytearray, value: int) -> None:
    """Append an unsigned varint."""
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def put_signed(out: bytearray, value: int) -> None:
    """Append a signed varint."""
    put_number(out, value << 1 if value >= 0 else (-value - 1) << 1 | 1)


def _add(old: bytes, difference: bytes, ones: int, unit: int) -> bytes:
    """Sums of the units of `unit` bytes, each modulo its size: carries are kept from crossing their borders."""
    size = len(old)
    high = int.from_bytes((b"\0" * (unit - 1) + b"\x80") * (size // unit), "little")
    a, b = int.from_bytes(old, "little"), int.from_bytes(difference, "little")
    low = high ^ ones
    return (((a & low) + (b & low)) ^ ((a ^ b) & high)).to_bytes(size, "little")


def add(old: bytes, difference: bytes, unit: int) -> bytes:
    """Old bytes plus differences, unit by unit (1 byte or a 4-byte word), modulo the unit."""
    size = len(old)
    if difference == _ZEROS[:size]:
        return old
    whole = size - size % unit
    summed = _add(old[:whole], difference[:whole], (1 << 8 * whole) - 1, unit)
    return summed + add(old[whole:], difference[whole:], 1) if whole < size else summed


class _Frames:
    """The frames, one after the other; of each, its dictionary is known before its first byte is taken."""

    def __init__(self, source: Slice) -> None:
        self._source, self._at = source, 0
        self._known = bytearray()
        self._content, self._taken = b"", 0

    def know(self, old: bytes) -> None:
        self._known += old

    def room(self) -> int:
        """How many more bytes the dictionary may have."""
        return FRAME_LIMIT - len(self._known)

    def used(self) -> bool:
        """All bytes of the frame that is open are taken."""
        return self._taken == len(self._content)

    def open(self, size: int) -> None:
        """Open the next frame, of `size` bytes. Raises DeltaError."""
        if size > 2 * FRAME_LIMIT:
            raise DeltaError("a frame of the delta is larger than allowed")
        self._content = b""
        self._content = unpacked(self._source.read_at(self._at, size), bytes(self._known))
        self._at, self._taken = self._at + size, 0
        self._known.clear()

    def take(self, size: int) -> bytes:
        found = self._content[self._taken : self._taken + size]
        if len(found) < size:
            raise DeltaError("a frame of the delta ends early")
        self._taken += size
        return found

    def at_end(self) -> bool:
        return self.used() and not self._known and self._at == self._source.size


class _Writer:
    """The new file: counted, hashed, and refused when it grows beyond its size. What is written can be read again."""

    def __init__(self, out: IO[bytes], size: int, progress: Callable[[int], None] | None) -> None:
        self.out, self.size, self.done = out, size, 0
        self.digest = hashlib.sha256()
        self.progress = progress
        self._waiting: list[bytes] = []
        self._held = 0

    def write(self, part: bytes) -> None:
        self._waiting.append(part)
        self._held += len(part)
        if self._held >= _PIECE:
            self.flush()

    def flush(self) -> None:
        whole = b"".join(self._waiting)
        self.digest.update(whole)
        self.out.write(whole)
        self.done += self._held
        self._waiting, self._held = [], 0
        if self.progress:
            self.progress(self.done)

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes that were written before. Raises DeltaError where they are not there."""
        if offset < 0 or offset + size > self.done + self._held:
            raise DeltaError("an operation reads outside its file")
        self.flush()
        self.out.seek(offset)
        found = self.out.read(size)
        self.out.seek(0, os.SEEK_END)
        if len(found) != size:
            raise DeltaError("a file is shorter than it was")
        return found

    def claim(self, size: int) -> None:
        """Raise DeltaError unless `size` more bytes belong to the file."""
        if self.done + self._held + size > self.size:
            raise DeltaError("the delta makes more than it says")


def apply(
    delta: Slice,
    sources: Sequence[Slice],
    out: IO[bytes],
    size: int,
    digest: str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the new file to `out`, an empty file that can be read too; it has `size` bytes and the sha256 `digest`.

    `progress` is told the bytes done.

    Raises DeltaError where the delta is damaged or the result is not what it should be; `out` is then worthless.
    """
    try:
        _run(delta, sources, _Writer(out, size, progress), digest)
    except zstandard.ZstdError as error:
        raise DeltaError(f"the delta is damaged: {error}") from error


def _run(delta: Slice, sources: Sequence[Slice], writer: _Writer, digest: str) -> None:
    sizes, at = _head(delta)
    runs = []
    for size in sizes:
        runs.append(delta.part(at, size))
        at += size
    if at != delta.size:
        raise DeltaError("the delta's parts do not fill it")
    ops, bytes_, words, literals = (_Stream(*one) for one in zip(runs, WINDOW_LOGS, strict=False))
    numbers, frames = _Varints(ops), _Frames(runs[4])
    readable: list[Slice | _Writer] = [*sources, writer]
    chosen, ends = 0, [0] * len(readable)
    while not numbers.at_end():
        number = numbers.number()
        kind, size = number & 7, number >> 3
        if kind == SOURCE:
            chosen = size
            if chosen >= len(readable):
                raise DeltaError("the delta reads a file that it does not have")
            continue
        if kind == KNOWN:
            if size > frames.room():
                raise DeltaError("a dictionary of the delta is larger than allowed")
            start = ends[chosen] + numbers.signed()
            ends[chosen] = start + size
            frames.know(shifted(readable[chosen].read_at(start, size), _shifts(numbers)))
            continue
        writer.claim(size)
        if kind == PATCH:
            if frames.used():
                frames.open(numbers.number())
            writer.write(frames.take(size))
            continue
        if kind == LITERAL:
            for part in _pieces(size, _PIECE):
                writer.write(literals.take(part))
            continue
        if kind == ZERO:
            for part in _pieces(size, _PIECE):
                writer.write(_ZEROS[:part])
            continue
        source, start = readable[chosen], ends[chosen] + numbers.signed()
        if kind == COPY:
            for part in _pieces(size, _PIECE):
                writer.write(source.read_at(start, part))
                start += part
        else:
            stream, unit = (bytes_, 1) if kind == ADD else (words, 4)
            for part in _pieces(size, _ADD_PIECE):
                writer.write(add(source.read_at(start, part), stream.take(part), unit))
                start += part
        ends[chosen] = start
    writer.flush()
    if not all(run.at_end() for run in (frames, bytes_, words, literals)):
        raise DeltaError("the delta holds more than it uses")
    if writer.done != writer.size:
        raise DeltaError("the delta makes less than it says")
    if writer.digest.hexdigest() != digest:
        raise DeltaError("the rebuilt file has the wrong digest")


def _shifts(numbers: _Varints) -> list[Shift]:
    count, line, found = numbers.number(), 0, []
    if count > MOST_SHIFTS:
        raise DeltaError("a dictionary of the delta has more shifts than allowed")
    for _ in range(count):
        line += numbers.number()
        found.append(Shift(line, numbers.signed()))
    return found


def _head(delta: Slice) -> tuple[list[int], int]:
    """The sizes of the runs, and where the first one begins."""
    head, sizes, at = delta.read_at(0, min(delta.size, 10 * RUNS)), [], 0
    for _ in range(RUNS):
        value = shift = 0
        while True:
            if at == len(head) or shift > 56:
                raise DeltaError("the delta has no head")
            byte = head[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        sizes.append(value)
    return sizes, at


def _pieces(size: int, most: int) -> Sequence[int]:
    whole, rest = divmod(size, most)
    return [most] * whole + [rest] * bool(rest) if whole < 1 << 16 else _refuse_size()


def _refuse_size() -> Sequence[int]:
    raise DeltaError("an operation of the delta is larger than allowed")


def unpacked(frame: bytes, known: bytes) -> bytes:
    """The content of a frame that was compressed with `known` as its dictionary. Raises DeltaError."""
    parameters = zstandard.get_frame_parameters(frame)
    if parameters.content_size > FRAME_LIMIT:  # which it is, too, where it is not told
        raise DeltaError("a frame of the delta is larger than allowed")
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if known else None
    machine = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=2 * FRAME_LIMIT)
    found = machine.decompress(frame, max_output_size=parameters.content_size)
    if len(found) != parameters.content_size:
        raise DeltaError("a frame of the delta has the wrong size")
    return found
