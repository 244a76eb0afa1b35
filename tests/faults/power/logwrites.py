"""Reads a log of a disk's writes, as QEMU's driver blklogwrites and Linux' dm-log-writes write it.

Sources: Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c of Linux,
block/blklogwrites.c of QEMU. Everything is little-endian and counted in sectors of the size that the superblock names:

    sector 0   magic u64 0x6a736677736872, version u64 1, number of entries u64, sector size u32
    then per entry one sector: sector u64, number of sectors u64, flags u64, length of a mark's text u64, the text;
    and behind it the sectors that were written, unless the flags say discard or mark

A write is logged when it is complete, a flush when it is complete; both before the guest hears of it. What differs from
what one would expect of QEMU:

* The number of entries lags behind until the next flush, so the log is read to its end.
* An entry's place is taken before it is written. A log that is still being written, or whose machine was killed, may
  have holes: reading ends at the first of them.
* QEMU before 9.0 may put another entry between a "write zeroes" and its zeroes: the disk must not offer that command.
* Writes that must be on the disk when they end (FUA) come as a write and a flush behind it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16
_KNOWN = FLUSH | FUA | DISCARD | MARK | METADATA
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


class LogError(ValueError):
    """The file is not a log of writes; the message says where it stops being one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One write, discard, flush or mark. All offsets and lengths are in bytes."""

    index: int
    flags: int
    start: int  # on the disk
    length: int  # on the disk
    data: int  # offset of the written bytes in the log
    end: int  # offset in the log at which the entry is complete
    mark: bytes = b""

    @property
    def flush(self) -> bool:
        """Whether all that was complete before is on the disk for good."""
        return bool(self.flags & FLUSH)

    @property
    def durable(self) -> bool:
        """Whether the write itself is on the disk for good."""
        return bool(self.flags & FUA)

    @property
    def discard(self) -> bool:
        return bool(self.flags & DISCARD)

    @property
    def changes(self) -> bool:
        """Whether the disk's content is another afterwards."""
        return self.length > 0 and not self.flags & MARK


def entries(path: Path) -> list[Entry]:
    """All complete entries of a log in their order. Raises LogError where it is none."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return list(_read(file.fileno(), size))


def _read(log: int, size: int) -> Iterator[Entry]:
    sector = _sector_size(os.pread(log, _SUPER.size, 0))
    place, index = sector, 0
    while place + sector <= size:
        head = os.pread(log, sector, place)
        start, count, flags, text = _ENTRY.unpack_from(head)
        if not (start or count or flags or text):
            return  # a hole
        if flags & ~_KNOWN or text > sector - _ENTRY.size:
            raise LogError(f"entry {index} at byte {place} of the log: flags {flags:#x}, {text} bytes of text")
        data = place + sector
        end = data if flags & (DISCARD | MARK) else data + count * sector
        if end > size:
            return
        mark = head[_ENTRY.size : _ENTRY.size + text]
        yield Entry(index, flags, start * sector, 0 if flags & MARK else count * sector, data, end, mark)
        place, index = end, index + 1


def _sector_size(head: bytes) -> int:
    if len(head) < _SUPER.size:
        raise LogError("the log is shorter than its superblock")
    magic, version, _count, sector = _SUPER.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise LogError(f"the log has magic {magic:#x} and version {version}")
    if sector < 512 or sector & (sector - 1) or sector > 1 << 16:
        raise LogError(f"the log's sectors have {sector} bytes")
    return int(sector)
