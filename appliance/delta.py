"""Makes deltas between layers, kernels and RAM disks; `appliance.node.delta` has the format and applies them.

The delta knows files: a file of the new image is made from the file of the same content, or else of the same name
(numbers in names do not count, so that a new kernel's modules find the old ones), wherever either lies in its image.
"""

from __future__ import annotations

import mmap
import os
import posixpath
import re
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from appliance import cpio, erofs
from appliance.delta_program import Piece, Program, fresh
from appliance.erofs import BLOCK, INODE_ALIGNMENT, Range
from appliance.node import delta as format_
from appliance.node.lines import shifted
from appliance.shift import Change, changes, pack_frame


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an image: where its content lies; `meta` is the inode or header in front of it."""

    path: str
    data: tuple[Range, ...]
    meta: Range
    kind: int = stat.S_IFREG  # type of file

    @property
    def size(self) -> int:
        return sum(run.size for run in self.data)


@dataclass(frozen=True, slots=True)
class Plan:
    """A file and what lies where in it. `blocks`: files begin at blocks and are filled up with zeros."""

    content: mmap.mmap | bytes
    members: tuple[Member, ...]
    blocks: bool

    def bytes_of(self, member: Member) -> bytes:
        return b"".join(self.content[run.offset : run.end] for run in member.data)


# --- what lies where -------------------------------------------------------------------------------------------------


def open_plan(path: Path, stack: ExitStack) -> Plan:
    """The plan of a layer, a RAM disk or any other file; it stays open as long as the stack."""
    stream = stack.enter_context(path.open("rb"))
    if not os.fstat(stream.fileno()).st_size:
        return Plan(b"", (), blocks=False)
    content = stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        if erofs.is_image(content):
            inodes = erofs.parse(content).files
            members = (Member(one.path, one.data, one.inode, stat.S_IFMT(one.mode)) for one in inodes)
            return Plan(content, tuple(members), blocks=True)
        if cpio.is_archive(content):
            entries = cpio.parse(content)
            members = (Member(one.path, (one.data,) if one.data.size else (), one.head) for one in entries)
            return Plan(content, tuple(members), blocks=False)
    except (erofs.ErofsError, cpio.CpioError):
        pass  # of another builder: its bytes are all that is known of it
    return Plan(content, (Member("/", (Range(0, len(content)),), Range(0, 0)),), blocks=False)


@dataclass(slots=True)
class _Index:
    """Finds old files by path, by path without numbers, by name without numbers, and by content."""

    plans: Sequence[Plan]
    by_path: dict[str, tuple[int, Member]] = field(default_factory=dict)
    by_pattern: dict[str, list[tuple[int, Member]]] = field(default_factory=dict)
    by_size: dict[int, list[tuple[int, Member]]] = field(default_factory=dict)
    by_content: dict[bytes, tuple[int, Member]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, plan in enumerate(self.plans):
            for member in plan.members:
                self.by_path.setdefault(member.path, (number, member))
                for pattern in {_pattern(member.path), _pattern(posixpath.basename(member.path))}:
                    self.by_pattern.setdefault(pattern, []).append((number, member))
                if member.kind == stat.S_IFREG and member.size:
                    self.by_size.setdefault(member.size, []).append((number, member))

    def same(self, content: bytes, path: str) -> tuple[int, Member] | None:
        """An old file with this content; one at the same path first."""
        known = self.by_path.get(path)
        if known and known[1].size == len(content) and self.plans[known[0]].bytes_of(known[1]) == content:
            return known
        candidates = self.by_size.pop(len(content), None)
        if candidates is not None:
            for number, member in candidates:
                digest = _digest(self.plans[number].bytes_of(member))
                self.by_content.setdefault(digest, (number, member))
            self.by_size[len(content)] = []
        return self.by_content.get(_digest(content)) if candidates is not None else None

    def like(self, member: Member) -> tuple[int, Member] | None:
        """The old version of a file: the one at its path, else the nearest in size of those with a path like it."""
        known = self.by_path.get(member.path)
        if known and known[1].kind == member.kind:
            return known
        for pattern in (_pattern(member.path), _pattern(posixpath.basename(member.path))):
            found = [one for one in self.by_pattern.get(pattern, ()) if one[1].kind == member.kind]
            if found:
                return min(found, key=lambda one: abs(one[1].size - member.size))
        return None


def _place(member: Member) -> int:
    return member.data[0].offset if member.data else member.meta.offset


def _pattern(path: str) -> str:
    return re.sub(r"[0-9]+", "#", path)


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


# --- the pieces of one file ------------------------------------------------------------------------------------------


def _cut(runs: Sequence[Range], start: int, size: int) -> Iterator[Range]:
    """Where bytes [start, start + size) of a content lie in its image."""
    for run in runs:
        if start < run.size and size:
            part = min(size, run.size - start)
            yield Range(run.offset + start, part)
            start, size = start + part, size - part
        start = max(0, start - run.size)


def _placed(new: Sequence[Range], source: int, old: Sequence[Range], made: Iterable[Change]) -> Iterator[Piece]:
    """Changes of a content as pieces of the image; runs of either side that lie apart split them."""
    at = 0
    for change in made:
        if change.kind == format_.PATCH:
            (where,), (origin,) = _cut(new, at, change.size), _cut(old, change.start, change.old)
            yield Piece(
                where.offset, change.size, change.kind, source, origin.offset, change.payload, change.old, change.shifts
            )
            at += change.size
            continue
        done = 0
        while done < change.size:
            where = next(_cut(new, at + done, change.size - done))
            size = where.size
            begin = 0
            if change.kind != format_.LITERAL:
                origin = next(_cut(old, change.start + done, size))
                size, begin = origin.size, origin.offset
            yield Piece(where.offset, size, change.kind, source, begin, change.payload[done : done + size])
            done += size
        at += change.size


def _words(new: bytes, old: bytes) -> bytes:
    """Differences of 32-bit words, and of the single bytes that are left over, of two runs of one size."""
    whole = len(new) & ~3
    a, b = array("I", new[:whole]), array("I", old[:whole])
    words = array("I", [(x - y) & 0xFFFFFFFF for x, y in zip(a, b, strict=True)]).tobytes()
    return words + bytes((x - y) & 0xFF for x, y in zip(new[whole:], old[whole:], strict=True))


def _folder_pieces(new: Plan, old: Plan, source: int, member: Member, other: Member) -> Iterator[Piece]:
    """An inode with what lies behind it: word by word against the old one; entries of a folder by name."""
    yield from _as_words(new, old, source, member.meta, other.meta)
    for run, was in zip(member.data, other.data, strict=False):
        if not stat.S_ISDIR(member.kind):
            yield from _as_words(new, old, source, *_with_padding(run, was))
            continue
        for at in range(0, run.size, BLOCK):
            block = Range(run.offset + at, min(BLOCK, run.size - at))
            before = Range(was.offset + at, min(BLOCK, was.size - at)) if at < was.size else Range(was.offset, 0)
            yield from _block_pieces(new, old, source, block, before)


def _with_padding(run: Range, was: Range) -> tuple[Range, Range]:
    """Both with what fills them up to the next inode's place, so that neighbouring inodes are one operation."""
    if run.size != was.size or (run.offset - was.offset) % INODE_ALIGNMENT:
        return run, was
    size = run.size + -run.end % INODE_ALIGNMENT
    return Range(run.offset, size), Range(was.offset, size)


def _block_pieces(new: Plan, old: Plan, source: int, block: Range, before: Range) -> Iterator[Piece]:
    fresh, stale = new.content[block.offset : block.end], old.content[before.offset : before.end]
    entries, olds = erofs.block_entries(fresh), erofs.block_entries(stale) if stale else []
    if [one[1] for one in entries] == [one[1] for one in olds]:
        yield from _as_words(new, old, source, *_with_padding(block, before))
        return
    places = {name: number for number, (_, name, _, _) in enumerate(olds)}
    for number, (_, name, _, _) in enumerate(entries):
        head = Range(block.offset + 12 * number, 12)
        if name in places:
            yield from _as_words(new, old, source, head, Range(before.offset + 12 * places[name], 12))
    spans = {name: (at, end) for _, name, at, end in olds}
    for _, name, at, end in entries:
        if name in spans:
            yield Piece(block.offset + at, end - at, format_.COPY, source, before.offset + spans[name][0])


def _as_words(new: Plan, old: Plan, source: int, block: Range, before: Range) -> Iterator[Piece]:
    size = min(block.size, before.size)
    fresh, stale = new.content[block.offset : block.offset + size], old.content[before.offset : before.offset + size]
    if size and len(stale) == size:
        yield Piece(block.offset, size, format_.WORDS, source, before.offset, _words(fresh, stale))


# --- all pieces ------------------------------------------------------------------------------------------------------


def _pieces(new: Plan, olds: Sequence[Plan], workers: int) -> Iterator[Piece]:
    """Pieces in any order; what none of them makes is new or zero."""
    index = _Index(olds)
    made: dict[bytes, Member] = {}  # by content, of the new files that no old file gives
    jobs: list[tuple[Member, int, Member]] = []
    if new.blocks and olds and olds[0].blocks:
        yield from _as_words(new, olds[0], 0, erofs.SUPERBLOCK, erofs.SUPERBLOCK)
    for member in sorted(new.members, key=_place):
        found = index.like(member)
        if found and member.meta.size:
            if member.kind != stat.S_IFREG or not member.size:
                yield from _folder_pieces(new, olds[found[0]], found[0], member, found[1])
            elif new.blocks:
                yield from _as_words(new, olds[found[0]], found[0], member.meta, found[1].meta)
            else:
                fresh, stale = (
                    plan.content[one.meta.offset : one.meta.end]
                    for plan, one in ((new, member), (olds[found[0]], found[1]))
                )
                if len(fresh) == len(stale):
                    yield from _placed((member.meta,), found[0], (found[1].meta,), changes(fresh, stale, False))
        if member.kind != stat.S_IFREG or not member.size:
            continue
        same = index.same(new.bytes_of(member), member.path)
        if same:
            source, other = same
            yield from _placed(member.data, source, other.data, [Change(format_.COPY, member.size, 0)])
            yield from _padding(new, olds[source], source, member.data[-1], other.data[-1])
            continue
        twin = made.setdefault(_digest(new.bytes_of(member)), member)
        if max(run.end for run in twin.data) <= min(run.offset for run in member.data):
            yield from _placed(member.data, len(olds), twin.data, [Change(format_.COPY, member.size, 0)])
        elif found and found[1].size:
            jobs.append((member, *found))
    yield from _work(new, olds, jobs, workers)


def _padding(new: Plan, old: Plan, source: int, run: Range, was: Range) -> Iterator[Piece]:
    """The rest of the last block, so that copies of neighbouring files are one operation."""
    size = -run.end % BLOCK
    if size and new.blocks and old.blocks and not (run.offset % BLOCK or was.offset % BLOCK):
        stale = old.content[was.end : was.end + size]
        if len(stale) == size and stale == new.content[run.end : run.end + size]:
            yield Piece(run.end, size, format_.COPY, source, was.end)


def _work(new: Plan, olds: Sequence[Plan], jobs: list[tuple[Member, int, Member]], workers: int) -> Iterator[Piece]:
    """The pieces of changed files. The search for matches leaves Python's lock, so threads share the work."""

    def pieces_of(job: tuple[Member, int, Member]) -> list[Piece]:
        member, source, other = job
        made = changes(new.bytes_of(member), olds[source].bytes_of(other), len(other.data) == 1 == len(member.data))
        return list(_placed(member.data, source, other.data, made))

    jobs.sort(key=lambda job: -job[0].size)  # the longest first, so that none is left running alone
    with ThreadPoolExecutor(workers) as pool:
        for made in pool.map(pieces_of, jobs):
            yield from made


# --- deltas ----------------------------------------------------------------------------------------------------------


def make(new: Path, sources: Sequence[Path], *, workers: int | None = None) -> bytes:
    """The delta that makes the file `new` from the files `sources`, in that order."""
    with ExitStack() as stack:
        plan = open_plan(new, stack)
        olds = [open_plan(path, stack) for path in sources]
        workers = workers or os.cpu_count() or 1
        pieces = list(_in_order(_pieces(plan, olds, workers)))
        frames = _frames(pieces, olds, workers)
        program = Program(len(olds))
        at = 0
        for piece in pieces:
            for part in fresh(plan.content, at, piece.offset):
                program.put(part)
            if piece.offset in frames:
                program.open(*frames[piece.offset])
            program.put(piece)
            at = piece.offset + piece.size
        for part in fresh(plan.content, at, len(plan.content)):
            program.put(part)
        return program.pack()


def _in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    at = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset >= at:  # else it is of another name of the same inode
            yield piece
            at = piece.offset + piece.size


def _frames(pieces: Sequence[Piece], olds: Sequence[Plan], workers: int) -> dict[int, tuple[list[Piece], bytes]]:
    """What the frames hold, and the frames, by the place of their first piece. Neighbours share one: they are alike."""
    groups: list[list[Piece]] = []
    room = [0, 0]
    for piece in pieces:
        if piece.kind == format_.PATCH:
            room = [room[0] - piece.size, room[1] - piece.old]
            if min(room) < 0:
                groups.append([])
                room = [format_.FRAME_LIMIT - piece.size, format_.FRAME_LIMIT - piece.old]
            groups[-1].append(piece)

    def packed(group: list[Piece]) -> bytes:
        known = (shifted(olds[one.source].content[one.start : one.start + one.old], one.shifts) for one in group)
        return pack_frame(b"".join(one.payload for one in group), b"".join(known))

    with ThreadPoolExecutor(workers) as pool:
        made = pool.map(packed, groups)
        return {group[0].offset: (group, frame) for group, frame in zip(groups, made, strict=True)}


def make_small(new: bytes, old: bytes | None) -> bytes:
    """The delta that makes a small file, such as a manifest, from another one or from nothing."""
    program = Program(0 if old is None else 1)
    whole = (Range(0, len(new)),)
    made = changes(new, old) if old else [Change(format_.LITERAL, len(new), payload=new)]
    for piece in _placed(whole, 0, (Range(0, len(old or b"")),), made):
        program.put(piece)
    return program.pack()
