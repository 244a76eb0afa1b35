"""Reads where files lie in an uncompressed EROFS image: what the delta between two images is made from.

Strict and read-only: an image that mkfs.erofs does not write with this builder's options is refused. The format is the
kernel's (fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst): a superblock at 1024; inodes of 32 or 64 bytes, at
meta_blkaddr blocks + 32 * its number (nid); a file's whole blocks in one run from raw_blkaddr on, its last part
either in a block after them (layout 0) or directly behind the inode (layout 2); folders as files that hold sorted
entries (nid, offset of name, type) and then the names, block by block.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ApplianceError

BLOCK = 4096
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_COMPACT = struct.Struct("<HHHHIIIIHHI")
_EXTENDED = struct.Struct("<HHHHQIIIIQII16x")
_ENTRY = struct.Struct("<QHBB")
INODE_ALIGNMENT = 32
_PLAIN, _INLINE = 0, 2
_COMPAT_SUM, _COMPAT_MTIME, _COMPAT_FILTER = 1, 2, 4  # compatible features: they do not move anything


class ErofsError(ApplianceError):
    """The image is not one that this builder writes."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="the file is damaged or not a layer; build the release again")


@dataclass(frozen=True, slots=True)
class Range:
    """A run of bytes of the image."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


SUPERBLOCK = Range(1024, 128)


@dataclass(frozen=True, slots=True)
class File:
    """An inode: `path` is absolute in the image (the first one found of several links), `data` its content in order."""

    path: str
    mode: int
    inode: Range
    data: tuple[Range, ...]
    size: int
    owner: tuple[int, int]  # user, group


@dataclass(frozen=True, slots=True)
class Image:
    """Every inode of an image by its place, and the image's size in bytes."""

    files: tuple[File, ...]
    size: int


def read(path: Path) -> Image:
    """The map of an image. Raises ErofsError where it is damaged or of another kind."""
    with path.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # empty
            raise ErofsError(f"{path.name} is empty") from error
        with content:
            return parse(content)


def is_image(content: bytes | mmap.mmap) -> bool:
    """Whether it begins like an EROFS image."""
    return content[1024:1028] == _MAGIC.to_bytes(4, "little")


def parse(content: bytes | mmap.mmap) -> Image:
    """The map of an image that is in memory. Raises ErofsError."""
    try:
        return _parse(content)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ErofsError(f"the EROFS image is damaged: {error}") from error


def _parse(content: bytes | mmap.mmap) -> Image:
    if len(content) < 1024 + _SUPERBLOCK.size:
        raise ErofsError("the EROFS image is cut off")
    (magic, _, compat, bits, slots, root, inodes, _, _, blocks, meta, _, _, _, incompat, _, devices, _, dirbits,
     prefixes, _, packed, _) = _SUPERBLOCK.unpack_from(content, 1024)  # fmt: skip
    if magic != _MAGIC:
        raise ErofsError("this is no EROFS image")
    unknown = compat & ~(_COMPAT_SUM | _COMPAT_MTIME | _COMPAT_FILTER)
    if incompat or unknown or bits != 12 or slots or devices or dirbits or prefixes or packed:
        raise ErofsError("the EROFS image uses features that the builder does not")
    if blocks * BLOCK > len(content):
        raise ErofsError("the EROFS image is cut off")
    found: dict[int, File] = {}
    waiting = [(root, "/")]
    while waiting:
        nid, path = waiting.pop()
        if nid in found:
            continue
        if len(found) >= inodes:
            raise ErofsError("the EROFS image has more inodes than it says")
        file = found[nid] = _inode(content, meta * BLOCK + nid * INODE_ALIGNMENT, path)
        if stat.S_ISDIR(file.mode):
            for child, name in _entries(content, file):
                if name not in (".", ".."):
                    waiting.append((child, path.rstrip("/") + "/" + name))
    return Image(tuple(sorted(found.values(), key=lambda file: file.inode.offset)), len(content))


def _inode(content: bytes | mmap.mmap, offset: int, path: str) -> File:
    if not 0 <= offset <= len(content) - _COMPACT.size:
        raise ErofsError(f"{path} lies outside the EROFS image")
    form = struct.unpack_from("<H", content, offset)[0]
    if form & 1:
        _, xattrs, mode, _, size, start, _, user, group, *_ = _EXTENDED.unpack_from(content, offset)
        length = _EXTENDED.size
    else:
        _, xattrs, mode, _, size, _, start, _, user, group, _ = _COMPACT.unpack_from(content, offset)
        length = _COMPACT.size
    layout = form >> 1
    if xattrs:
        length += 12 + 4 * (xattrs - 1)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        if layout not in (_PLAIN, _INLINE):
            raise ErofsError(f"{path} is stored in a layout that the builder does not use")
        tail = size % BLOCK if layout == _INLINE else 0
        runs = (Range(start * BLOCK, size - tail), Range(offset + length, tail))
        data = tuple(run for run in runs if run.size)
    else:
        size, data = 0, ()  # a device: raw_blkaddr is its number
    if any(run.end > len(content) for run in data):
        raise ErofsError(f"{path} lies outside the EROFS image")
    return File(path, mode, Range(offset, length), data, size, (user, group))


def content_of(content: bytes | mmap.mmap, file: File) -> bytes:
    """The whole content of a file, folder or link."""
    return b"".join(content[run.offset : run.end] for run in file.data)


def _entries(content: bytes | mmap.mmap, file: File) -> Iterator[tuple[int, str]]:
    whole = content_of(content, file)
    for start in range(0, len(whole), BLOCK):
        block = whole[start : start + BLOCK]
        yield from ((nid, name) for nid, name, _, _ in block_entries(block))


def block_entries(block: bytes) -> list[tuple[int, str, int, int]]:
    """The entries of one block of a folder: nid, name, and where the name begins and ends in the block."""
    first = struct.unpack_from("<H", block, 8)[0]
    if first % _ENTRY.size or not _ENTRY.size <= first <= len(block):
        raise ErofsError("a folder of the EROFS image is damaged")
    heads = [_ENTRY.unpack_from(block, at) for at in range(0, first, _ENTRY.size)]
    ends = [head[1] for head in heads[1:]] + [len(block)]
    found = []
    for (nid, at, _, _), end in zip(heads, ends, strict=True):
        if not first <= at < end <= len(block):
            raise ErofsError("a folder of the EROFS image is damaged")
        raw = block[at:end].partition(b"\0")[0]
        if not raw or b"/" in raw:
            raise ErofsError("a folder of the EROFS image holds a name that is none")
        found.append((nid, raw.decode("utf-8", "surrogateescape"), at, at + len(raw)))
    return found
