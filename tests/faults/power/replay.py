"""Rebuilds a disk as power cuts could have left it, thousands of times, from its first state and the log of its writes.

Writes up to the last flush are applied for good. What was written since is applied for one look and taken back: old
bytes are kept in memory. A disk writes blocks of 4 KiB whole, as all made since 2011 do; beyond that, it may have
written any part of what no flush has followed, in any order. Overlapping writes keep their order: of two that are
complete, a disk's cache holds the later one only.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Self

from tests.faults.power.logwrites import Entry

BLOCK = 4096  # bytes that a disk writes as a whole
_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)
Blocks = Sequence[int]  # numbers of blocks within a write


class Disk:
    """A raw image that is written to from a log.

    `versions` says for each block which write gave it its content: equal numbers mean equal content. It is 0 where the
    image is as it was at first.
    """

    def __init__(self, image: Path, log: Path) -> None:
        self.image = image
        self._file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        self._versions = array("Q", bytes(8 * -(-self.size // BLOCK)))
        self._unique = 1 << 40  # versions of blocks that a write covers in part
        self._kept: list[tuple[int, bytes]] | None = None
        self._old: list[tuple[int, array[int]]] = []
        self.written = 0  # bytes, of this object's whole life

    def close(self) -> None:
        os.close(self._file)
        os.close(self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def content(self, start: int, length: int) -> bytes:
        return os.pread(self._file, length, start)

    def version(self, start: int, length: int) -> bytes:
        """A digest of the versions of the blocks in that range: equal where the content is."""
        first, last = start // BLOCK, -(-(start + length) // BLOCK)
        return blake2b(memoryview(self._versions)[first:last], digest_size=16).digest()

    def apply(self, entry: Entry, blocks: Blocks | None = None) -> None:
        """Do what an entry of the log did; with `blocks`, only to those blocks of 4 KiB of it."""
        if not entry.changes:
            return
        if entry.start + entry.length > self.size:
            raise ValueError(f"entry {entry.index} of the log ends at byte {entry.start + entry.length} of the disk")
        for start, length in pieces(entry, blocks):
            if entry.discard:
                self._zero(start, length)
            else:
                self._copy(entry.data + start - entry.start, start, length)
            self._number(start, length, entry.index + 1)

    def put(self, start: int, content: bytes) -> None:
        """Write bytes that come from no log."""
        self._write(start, content)
        self._unique += 1
        self._number(start, len(content), self._unique)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Whatever is written inside is taken back at the end."""
        if self._kept is not None:
            raise RuntimeError("a trial within a trial")
        self._kept = []
        try:
            yield
        finally:
            kept, self._kept = self._kept, None
            for start, content in reversed(kept):
                os.pwrite(self._file, content, start)
            for first, numbers in reversed(self._old):
                self._versions[first : first + len(numbers)] = numbers
            self._old.clear()

    def _copy(self, place: int, start: int, length: int) -> None:
        done = 0
        while done < length:
            content = os.pread(self._log, min(_PIECE, length - done), place + done)
            if not content:
                raise ValueError(f"the log ends at byte {place + done}, within an entry")
            self._write(start + done, content)
            done += len(content)

    def _zero(self, start: int, length: int) -> None:
        """Make a range read as zeroes; holes stay holes."""
        for place, size in data_ranges(self._file, start, start + length):
            for offset in range(0, size, _PIECE):
                self._write(place + offset, _ZEROES[: min(_PIECE, size - offset)])

    def _write(self, start: int, content: bytes) -> None:
        if self._kept is not None:
            self._kept.append((start, os.pread(self._file, len(content), start)))
        os.pwrite(self._file, content, start)
        self.written += len(content)

    def _number(self, start: int, length: int, number: int) -> None:
        first, last = start // BLOCK, -(-(start + length) // BLOCK)
        if self._kept is not None:
            self._old.append((first, self._versions[first:last]))
        self._versions[first:last] = array("Q", [number]) * (last - first)
        for block, cut in ((first, start % BLOCK), (last - 1, (start + length) % BLOCK)):
            if cut:
                self._unique += 1
                self._versions[block] = self._unique


def pieces(entry: Entry, blocks: Blocks | None) -> Iterator[tuple[int, int]]:
    """Start and length on the disk of what an entry wrote, or of those blocks of it; neighbours in one piece."""
    if blocks is None:
        yield entry.start, entry.length
        return
    end = entry.start + entry.length
    base = entry.start - entry.start % BLOCK
    run: tuple[int, int] | None = None
    for number in sorted(blocks):
        start, stop = max(entry.start, base + number * BLOCK), min(end, base + (number + 1) * BLOCK)
        if run is not None and run[1] == start:
            run = (run[0], stop)
            continue
        if run is not None:
            yield run[0], run[1] - run[0]
        run = (start, stop)
    if run is not None:
        yield run[0], run[1] - run[0]


def block_count(entry: Entry) -> int:
    """How many blocks of 4 KiB an entry touches."""
    return -(-(entry.start + entry.length) // BLOCK) - entry.start // BLOCK


def data_ranges(file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and length of what a sparse file holds between two offsets."""
    while start < end:
        try:
            start = os.lseek(file, start, os.SEEK_DATA)
        except OSError:  # nothing behind this
            return
        if start >= end:
            return
        stop = min(end, os.lseek(file, start, os.SEEK_HOLE))
        yield start, stop - start
        start = stop
