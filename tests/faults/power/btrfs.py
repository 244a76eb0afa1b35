"""What the host's kernel and GRUB see of a btrfs, and where on the disk a file's bytes lie. Needs root.

Sources: linux/btrfs.h and linux/btrfs_tree.h; grub-core/fs/btrfs.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

SUPER_SIZE = 4096
PRIMARY, MIRROR = 64 << 10, 64 << 20  # places of the superblock on the partition; the next is at 256 GiB
_CSUM, _BYTENR, _MAGIC, _GENERATION = 32, 48, 64, 72
_SIGNATURE = b"_BHRfS_M"
_TREE_SEARCH, _SUBVOLUME_INFO, _PATH_OF_INODE = 0xC0709411, 0x81F8943C, 0xD0009412
_FILE_SYSTEM_INFO, _ASK_GENERATION = 0x8400941F, 2
_BUFFER = 256 << 10  # bytes of items asked for at once
_TOP = (1 << 64) - 1
_KEY, _ITEM_HEAD = struct.Struct("<7Q4I4Q"), struct.Struct("<3Q2I")
_FILE_EXTENT, _CHUNK = struct.Struct("<QQBBHBQQQQ"), struct.Struct("<4Q3I2H")
TOP_TREE, CHUNK_TREE = 5, 3
INODE, ORPHAN, EXTENT, CHUNK = 1, 48, 108, 228  # types of items
_EXTENT_TYPE, _INLINE = 20, 0  # offset of the type in a file extent's item
_LINKS = 40  # offset of the number of links in an inode's item
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # system calls
_SET_FLAG, _SET_STRING, _CREATE, _READ_ONLY, _CLOSE_ON_EXEC = 0, 1, 6, 1, 1


# --- the superblock --------------------------------------------------------------------------------------------------


@cache
def _table() -> array[int]:
    values = array("L")
    for number in range(256):
        for _bit in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        values.append(number)
    return values


def crc32c(content: bytes) -> int:
    table, value = _table(), 0xFFFFFFFF
    for byte in content:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def generation(superblock: bytes) -> int:
    """The number of the transaction that a superblock names, -1 where it is none."""
    if superblock[_MAGIC : _MAGIC + 8] != _SIGNATURE:
        return -1
    return int(struct.unpack_from("<Q", superblock, _GENERATION)[0])


def as_primary(superblock: bytes) -> bytes:
    """A copy of the superblock as it stands at the first place."""
    body = bytearray(superblock)
    struct.pack_into("<Q", body, _BYTENR, PRIMARY)
    struct.pack_into("<I", body, 0, crc32c(bytes(body[_CSUM:])))
    return bytes(body)


def superblock_of_grub(primary: bytes, mirror: bytes) -> bytes | None:
    """The superblock GRUB takes where it is not the first one, as it would stand there.

    Linux reads the first one only; GRUB takes the one with the highest generation. Both are written side by side, so a
    cut between the two lets GRUB read a newer transaction than Linux.
    """
    return as_primary(mirror) if generation(mirror) > generation(primary) >= 0 else None


# --- mounting --------------------------------------------------------------------------------------------------------


class MountError(Exception):
    """A btrfs cannot be mounted; the message has the kernel's reason."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise MountError(os.strerror(ctypes.get_errno()))
    return result


def mount(device: str, options: Mapping[str, str]) -> int:
    """A descriptor of the root of a btrfs, mounted read-only. Raises MountError.

    The mount has no place and ends with the descriptor. A process that made itself a mount namespace meanwhile would
    hold a mount with a place, and with it the old content of the device, beyond the end of ours.
    """
    context = _call(_FSOPEN, b"btrfs", _CLOSE_ON_EXEC)
    try:
        for name, value in {"source": device, **options}.items():
            _call(_FSCONFIG, context, _SET_STRING, name.encode(), value.encode(), 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mounted = _call(_FSMOUNT, context, _CLOSE_ON_EXEC, _READ_ONLY)
    finally:
        os.close(context)
    try:
        return os.open(f"/proc/self/fd/{mounted}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(mounted)


# --- trees -----------------------------------------------------------------------------------------------------------


def mounted_generation(root: int) -> int:
    """The number of the transaction that a mounted btrfs shows; `root` is any open folder of it."""
    buffer = bytearray(1024)
    struct.pack_into("<Q", buffer, 48, _ASK_GENERATION)
    fcntl.ioctl(root, _FILE_SYSTEM_INFO, buffer)
    return int(struct.unpack_from("<Q", buffer, 56)[0])


@dataclass(frozen=True, slots=True)
class Item:
    object: int
    kind: int
    offset: int
    content: bytes


def items(root: int, tree: int, least: int = 0, most: int = _TOP, kind: int | None = None) -> Iterator[Item]:
    """The items of a tree for the objects from `least` to `most`, in order. `root` is any open folder of the btrfs."""
    for batch in batches(root, tree, least, most, kind):
        for item in unpack(batch):
            if kind is None or item.kind == kind:
                yield item


def batches(root: int, tree: int, least: int = 0, most: int = _TOP, kind: int | None = None) -> Iterator[bytes]:
    """The same, packed as the kernel gives them; items of other kinds may be among them."""
    from_kind, to_kind = (0, 255) if kind is None else (kind, kind)
    buffer = bytearray(_KEY.size + 8 + _BUFFER)
    start, offset, many = least, 0, 0xFFFFFFFF
    while True:
        _KEY.pack_into(buffer, 0, tree, start, most, offset, _TOP, 0, _TOP, from_kind, to_kind, many, 0, 0, 0, 0, 0)
        struct.pack_into("<Q", buffer, _KEY.size, _BUFFER)
        fcntl.ioctl(root, _TREE_SEARCH, buffer)
        (count,) = struct.unpack_from("<I", buffer, 64)
        if not count:
            return
        place = first = _KEY.size + 8
        for _number in range(count):
            _transaction, start, offset, found, size = _ITEM_HEAD.unpack_from(buffer, place)
            place += _ITEM_HEAD.size + size
        yield bytes(buffer[first:place])
        start, from_kind, offset = _after(start, found, offset)


def unpack(batch: bytes) -> Iterator[Item]:
    place = 0
    while place < len(batch):
        _transaction, start, offset, found, size = _ITEM_HEAD.unpack_from(batch, place)
        place += _ITEM_HEAD.size
        yield Item(start, found, offset, batch[place : place + size])
        place += size


def _after(start: int, kind: int, offset: int) -> tuple[int, int, int]:
    """The least key behind one."""
    if offset < _TOP:
        return start, kind, offset + 1
    return (start, kind + 1, 0) if kind < 255 else (start + 1, 0, 0)


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    address: int  # btrfs' own, not the partition's
    length: int  # bytes on the disk


def extent(item: Item) -> Extent | None:
    """Where a part of a file lies; None for holes and for what lies among the metadata."""
    if item.kind != EXTENT or item.content[_EXTENT_TYPE] == _INLINE:
        return None
    address, length = _FILE_EXTENT.unpack_from(item.content)[6:8]
    return Extent(address, length) if address else None


def links(inode: Item) -> int:
    return int(struct.unpack_from("<I", inode.content, _LINKS)[0])


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of btrfs' addresses and where it lies on the partition, once or twice."""

    start: int
    length: int
    stripes: tuple[int, ...]


def chunks(root: int) -> list[Chunk]:
    """The map from btrfs' addresses to the partition. For one device without striping."""
    found = []
    for item in items(root, CHUNK_TREE, kind=CHUNK):
        length, count = (_CHUNK.unpack_from(item.content)[number] for number in (0, 7))
        places = (_CHUNK.size + 32 * number + 8 for number in range(count))
        stripes = tuple(struct.unpack_from("<Q", item.content, place)[0] for place in places)
        found.append(Chunk(item.offset, length, stripes))
    return found


@dataclass(frozen=True, slots=True)
class Subvolume:
    id: int  # of its tree
    uuid: bytes
    parent: bytes  # uuid of the one it is a snapshot of, zeroes where it is none


def subvolume(folder: int) -> Subvolume:
    """The subvolume that holds an open folder."""
    buffer = bytearray(504)
    fcntl.ioctl(folder, _SUBVOLUME_INFO, buffer)
    return Subvolume(struct.unpack_from("<Q", buffer)[0], bytes(buffer[296:312]), bytes(buffer[312:328]))


def path_of(root: int, tree: int, inode: int) -> str:
    """A path of an inode within its subvolume."""
    buffer = bytearray(4096)
    struct.pack_into("<QQ", buffer, 0, tree, inode)
    fcntl.ioctl(root, _PATH_OF_INODE, buffer)
    return os.fsdecode(bytes(buffer[16:]).partition(b"\0")[0]).rstrip("/")
