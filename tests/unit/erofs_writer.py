"""Writes small EROFS images for tests, independently of mkfs.erofs and of the reader."""

from __future__ import annotations

import struct
from collections.abc import Mapping

BLOCK = 4096


def image(files: Mapping[str, bytes], *, inline: bool = False, extended: bool = False) -> bytes:
    """An image of regular files by absolute path; a value of `b"link:..."` makes a symbolic link."""
    folders: dict[str, dict[str, str]] = {"/": {}}
    for path in sorted(files):
        parent = "/"
        *above, name = path.strip("/").split("/")
        for part in above:
            child = parent.rstrip("/") + "/" + part
            folders[parent][part] = child
            folders.setdefault(child, {})
            parent = child
        folders[parent][name] = path
    nodes = sorted([*folders, *files])
    length = 64 if extended else 32
    sizes = {path: _folder_size(children) for path, children in folders.items()}
    # places first: inodes with inline tails, then whole blocks
    at, numbers, tails = 1152, {}, {}
    for path in nodes:
        size = sizes[path] if path in folders else len(files[path].removeprefix(b"link:"))
        whole = path in files and not inline and not files[path].startswith(b"link:")
        tail = 0 if whole else size % BLOCK
        if at % BLOCK + length + tail > BLOCK:
            at += -at % BLOCK
        numbers[path], tails[path] = at // 32, tail
        at += length + tail
        at += -at % 32
    block = -(-at // BLOCK)
    out = bytearray(block * BLOCK)
    for inode, path in enumerate(nodes):
        if path in folders:
            content, mode = _folder(path, folders, numbers), 0o40755
        elif files[path].startswith(b"link:"):
            content, mode = files[path][5:], 0o120777
        else:
            content, mode = files[path], 0o100644
        tail = tails[path]
        body = content[: len(content) - tail]
        layout = 2 if tail else 0
        start = block if body else 0xFFFFFFFF
        if extended:
            head = struct.pack(
                "<HHHHQIIIIQII16x", layout << 1 | 1, 0, mode, 0, len(content), start, inode, 0, 0, 7, 0, 1
            )
        else:
            head = struct.pack("<HHHHIIIIHHI", layout << 1, 0, mode, 1, len(content), 0, start, inode, 0, 0, 0)
        place = numbers[path] * 32
        out[place : place + length + tail] = head + content[len(content) - tail :]
        out += body + bytes(-len(body) % BLOCK)
        block += -(-len(body) // BLOCK)
    out[1024:1152] = struct.pack(
        "<IIIBBHQQIIII16s16sIHHHBBIQB23x",
        0xE0F5E1E2, 0, 0, 12, 0, numbers["/"], len(nodes), 7, 0, block, 0, 0, b"u" * 16, b"test",
        0, 0, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return bytes(out)


def _names(children: Mapping[str, str]) -> list[list[bytes]]:
    """Names block by block."""
    blocks: list[list[bytes]] = [[]]
    used = 0
    for name in sorted([b".", b"..", *(name.encode() for name in children)]):
        if used + 12 + len(name) > BLOCK:
            blocks.append([])
            used = 0
        blocks[-1].append(name)
        used += 12 + len(name)
    return blocks


def _folder_size(children: Mapping[str, str]) -> int:
    blocks = _names(children)
    return (len(blocks) - 1) * BLOCK + sum(12 + len(name) for name in blocks[-1])


def _folder(path: str, folders: Mapping[str, Mapping[str, str]], numbers: Mapping[str, int]) -> bytes:
    parent = path.rpartition("/")[0] or "/"
    whole = b""
    blocks = _names(folders[path])
    for number, names in enumerate(blocks):
        heads, texts, at = b"", b"", 12 * len(names)
        for name in names:
            target = {b".": path, b"..": parent}.get(name) or folders[path][name.decode()]
            heads += struct.pack("<QHBB", numbers[target], at + len(texts), 2 if target in folders else 1, 0)
            texts += name
        block = heads + texts
        whole += block if number == len(blocks) - 1 else block.ljust(BLOCK, b"\0")
    return whole
