"""Reads where files lie in an uncompressed cpio archive ("newc"), the format of the RAM disk."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from appliance.erofs import Range
from appliance.errors import ApplianceError

_MAGIC = b"070701"
_HEAD = 110
_END = "TRAILER!!!"


class CpioError(ApplianceError):
    """The archive is damaged."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="the RAM disk is damaged; build the release again")


@dataclass(frozen=True, slots=True)
class Entry:
    """A member: its header with the name, and its content."""

    path: str
    head: Range
    data: Range


def is_archive(content: bytes | mmap.mmap) -> bool:
    return content[:6] == _MAGIC


def parse(content: bytes | mmap.mmap) -> list[Entry]:
    """The members in order, without the trailer. Raises CpioError."""
    found: list[Entry] = []
    at = 0
    while True:
        head = content[at : at + _HEAD]
        if len(head) < _HEAD or head[:6] != _MAGIC:
            raise CpioError("the RAM disk is damaged: a header is missing")
        try:
            size, length = int(head[54:62], 16), int(head[94:102], 16)
        except ValueError as error:
            raise CpioError("the RAM disk is damaged: a header has no number") from error
        name = content[at + _HEAD : at + _HEAD + length].rstrip(b"\0").decode("utf-8", "surrogateescape")
        start = at + _HEAD + length
        start += -start % 4
        if start + size > len(content):
            raise CpioError("the RAM disk is cut off")
        if name == _END:
            return found
        found.append(Entry("/" + name, Range(at, start - at), Range(start, size)))
        at = start + size
        at += -at % 4
