"""What a node would boot from the disk as it is now, and whether that is whole. Needs root."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Self

from appliance.node import disklayout, paths
from appliance.node.release import File, Manifest, ReleaseError, parse, parse_layers
from appliance.node.upgrade.records import KERNEL_FILES, TRY, Choice, choose, read_record
from appliance.run import run
from tests.faults.power import btrfs
from tests.faults.power.replay import Disk

OPTIONS = {"subvolid": "5", "rescue": "nologreplay"}  # as GRUB sees it, which knows no log tree
ENVIRONMENT, ENVIRONMENT_SIZE = b"# GRUB Environment Block\n##########", 1024  # as it is on a fresh disk
SUBVOLUME_INODE = 256  # of every subvolume's top


class Violation(AssertionError):
    """What boots is not whole, or not what may boot at that moment."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the next power-on boots."""

    choice: Choice
    data: btrfs.Subvolume
    content: str  # digest of all that the data subvolume's tree holds
    newer: bool = False  # GRUB reads a newer transaction than Linux does
    tried: Choice | None = None  # what GRUB boots before that, once
    tried_data: btrfs.Subvolume | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A data subvolume: a digest of all it holds, each inode's extents, and all of them joined where they touch."""

    content: str
    files: Mapping[int, Sequence[btrfs.Extent]]
    ranges: Sequence[btrfs.Extent]


@dataclass
class Cache:
    """What was read once: content by the places of its bytes and the writes that put them there."""

    digests: dict[bytes, str] = field(default_factory=dict)
    readable: set[bytes] = field(default_factory=set)  # states of extents and of whole trees
    trees: dict[bytes, Tree] = field(default_factory=dict)
    read: int = 0  # bytes


class Viewer:
    """Looks into the state partition of a disk, again and again. Use it as a context manager.

    `files` are the size and digest of every file of every release that may come to be there, by path.
    """

    def __init__(
        self, disk: Disk, files: Mapping[str, File], start: int = disklayout.STATE_START, end: int = 0
    ) -> None:
        self.disk, self.files, self.start = disk, files, start
        self._environment = _find(disk, ENVIRONMENT, disklayout.ESP_START, disklayout.ESP_START + disklayout.ESP_SIZE)
        self.length = (end or disk.size - disklayout.TAIL) - start
        self.cache = Cache()
        self._chunks: list[btrfs.Chunk] = []
        words = ["losetup", "--find", "--show", "--read-only", "--offset", str(start), "--sizelimit", str(self.length)]
        self.device = run([*words, disk.image]).stdout.decode().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        run(["losetup", "--detach", self.device])

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """The state partition, as Linux sees it before it replays its log. Raises Violation where it is none."""
        try:
            root = btrfs.mount(self.device, OPTIONS)
        except btrfs.MountError as error:
            raise Violation(f"the state partition cannot be mounted: {error}") from error
        try:
            shown, meant = btrfs.mounted_generation(root), btrfs.generation(self._superblock(btrfs.PRIMARY))
            if shown != meant:
                raise RuntimeError(f"the kernel shows transaction {shown} of {self.device}, which holds {meant}")
            self._chunks = btrfs.chunks(root)
            yield Path(f"/proc/self/fd/{root}")
        finally:
            os.close(root)

    def look(self) -> Look:
        """What GRUB chooses, once it is known to be whole as Linux sees it. Raises Violation.

        Must be called within a trial of the disk.
        """
        other = btrfs.superblock_of_grub(*(self._superblock(place) for place in (btrfs.PRIMARY, btrfs.MIRROR)))
        choices: tuple[Choice, Choice | None] | None = None
        if other is not None:
            with self._instead(other), self.mounted() as root:
                choices = self._choose(root)
        with self.mounted() as root:
            choice, tried = choices or self._choose(root)
            try:
                self._release(root, choice)
                data, content = self._data(root, choice.data)
                if tried:
                    self._release(root, tried)
                    tried_data, _content = self._data(root, tried.data)
                self._finished_files(root)
            except OSError as error:
                raise Violation(f"{choice}: {error.filename or ''} cannot be read: {error.strerror}") from error
        return Look(choice, data, content, other is not None, tried, tried_data if tried else None)

    def _superblock(self, place: int) -> bytes:
        return self.disk.content(self.start + place, btrfs.SUPER_SIZE)

    @contextmanager
    def _instead(self, superblock: bytes) -> Iterator[None]:
        first = self._superblock(btrfs.PRIMARY)
        self.disk.put(self.start + btrfs.PRIMARY, superblock)
        try:
            yield
        finally:
            self.disk.put(self.start + btrfs.PRIMARY, first)

    def _choose(self, root: Path) -> tuple[Choice, Choice | None]:
        """What GRUB boots, and what it tries before that."""
        choice = choose(str(root))
        if choice is None:
            raise Violation("there is nothing that GRUB could boot")
        if b"\nnext_entry=try\n" not in self.disk.content(self._environment, ENVIRONMENT_SIZE):
            return choice, None
        record = read_record(str(root), TRY)
        if record is None:
            return choice, None
        return choice, Choice("try", record.release, record.kernel, record.data)

    # --- the release -------------------------------------------------------------------------------------------------

    def _finished_files(self, root: Path) -> None:
        """Whatever has its final name and size is taken for finished by the next upgrade."""
        for name, file in self.files.items():
            path = root / name
            if path.exists() and path.stat().st_size == file.size and self.digest(path) != file.digest:
                raise Violation(f"{name} has its name and its size, but not its content")

    def _release(self, root: Path, choice: Choice) -> None:
        """Raises Violation unless every file that the manifest names has the right content."""
        folder = root / paths.RELEASES / choice.release
        content = (folder / "release.json").read_bytes()
        try:
            manifest = parse(content)
            layers = parse_layers((folder / "layers").read_bytes())
        except ReleaseError as error:
            raise Violation(f"{choice}: {error}") from error
        if set(layers.values()) - {record.digest for record in manifest.layers}:
            raise Violation(f"{choice}: the layers are not those of the manifest")
        wanted = {root / paths.LAYERS / paths.image_name(kind, digest): digest for kind, digest in layers.items()}
        if choice.kernel != manifest.kernel.id:
            raise Violation(f"{choice}: the manifest has the kernel {manifest.kernel.id}")
        for name, file in zip(KERNEL_FILES, (manifest.kernel.vmlinuz, manifest.kernel.initrd), strict=True):
            wanted[root / paths.KERNELS / choice.kernel / name] = file.digest
        for path, digest in wanted.items():
            if self.digest(path) != digest:
                raise Violation(f"{choice}: {path.relative_to(root)} has not the content that its digest says")

    def digest(self, path: Path) -> str:
        """The sha256 of a file of the top subvolume, read once for each state of its bytes on the disk."""
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            inode = btrfs.items(file.fileno(), btrfs.TOP_TREE, info.st_ino, info.st_ino)
            mixed = blake2b(info.st_size.to_bytes(8, "little"), digest_size=16)
            for item in inode:
                mixed.update(repr(item).encode())
                if extent := btrfs.extent(item):
                    mixed.update(self._state_of(extent))
            key = mixed.digest()
            if key not in self.cache.digests:
                self.cache.digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
                self.cache.read += info.st_size
        return self.cache.digests[key]

    def _state_of(self, extent: btrfs.Extent) -> bytes:
        """Equal where a range of the disk, named by btrfs' addresses, has the same content."""
        address, end = extent.address, extent.address + extent.length
        state = b"%d %d " % (address, end)
        for chunk in self._chunks:  # in the order of their addresses
            if chunk.start <= address < chunk.start + chunk.length:
                length = min(end, chunk.start + chunk.length) - address
                for stripe in chunk.stripes:
                    state += self.disk.version(self.start + stripe + address - chunk.start, length)
                address += length
            if address == end:
                return state
        raise Violation(f"btrfs' address {address} lies in no chunk")

    # --- the data ----------------------------------------------------------------------------------------------------

    def _data(self, root: Path, number: int) -> tuple[btrfs.Subvolume, str]:
        """The data subvolume and what stands for its content, once all of it can be read; btrfs checks the sums."""
        top = root / paths.DATA / str(number)
        if not top.is_dir() or top.stat().st_ino != SUBVOLUME_INODE:
            raise Violation(f"data/{number}, which is to be booted, is no subvolume")
        descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = btrfs.subvolume(descriptor)
            tree = self._tree(descriptor, found)
            whole = blake2b(b"".join(map(self._state_of, tree.ranges)), digest_size=16).digest()
            if whole not in self.cache.readable:
                self._read_all(top, descriptor, found, tree)
                self.cache.readable.add(whole)
        finally:
            os.close(descriptor)
        return found, tree.content

    def _tree(self, descriptor: int, found: btrfs.Subvolume) -> Tree:
        """The subvolume's tree, unpacked once for each that is found."""
        batches = list(btrfs.batches(descriptor, found.id))
        mixed = blake2b(digest_size=16)
        for batch in batches:
            mixed.update(batch)
        key = mixed.digest()
        if key not in self.cache.trees:
            self.cache.trees[key] = unpack_tree(item for batch in batches for item in btrfs.unpack(batch))
        return self.cache.trees[key]

    def _read_all(self, top: Path, descriptor: int, found: btrfs.Subvolume, tree: Tree) -> None:
        """Read every file that has an extent which was not yet read in its present state."""
        for inode, extents in tree.files.items():
            states = {self._state_of(extent) for extent in extents} - self.cache.readable
            if states:
                self._read(top / btrfs.path_of(descriptor, found.id, inode))
                self.cache.readable |= states

    def _read(self, file: Path) -> None:
        with file.open("rb", buffering=0) as stream:
            while read := len(stream.read(1 << 20)):
                self.cache.read += read


def files_of(manifest: Manifest) -> dict[str, File]:
    """The files of a release by their path on the state partition."""
    kernel = manifest.kernel
    files = {
        f"{paths.LAYERS}/{paths.image_name(one.kind, one.digest)}": File(one.digest, one.size)
        for one in manifest.layers
    }
    for name, file in zip(KERNEL_FILES, (kernel.vmlinuz, kernel.initrd), strict=True):
        files[f"{paths.KERNELS}/{kernel.id}/{name}"] = file
    return files


def _find(disk: Disk, wanted: bytes, start: int, end: int) -> int:
    """The place of the only occurrence of some bytes in a range of the disk, 0 where there is none."""
    content = disk.content(start, end - start)
    place = content.find(wanted)
    if place >= 0 and content.find(wanted, place + 1) >= 0:
        raise ValueError(f"the disk has {wanted!r} more than once")
    return start + place if place >= 0 else 0


def unpack_tree(found: Iterable[btrfs.Item]) -> Tree:
    mixed, files = blake2b(digest_size=16), dict[int, list[btrfs.Extent]]()
    for item in _linked(found):
        mixed.update(b"%d %d %d " % (item.object, item.kind, item.offset) + item.content)
        if extent := btrfs.extent(item):
            files.setdefault(item.object, []).append(extent)
    merged = list[btrfs.Extent]()
    for extent in sorted({extent for extents in files.values() for extent in extents}):
        if merged and merged[-1].address + merged[-1].length == extent.address:
            extent = btrfs.Extent(merged[-1].address, merged.pop().length + extent.length)
        merged.append(extent)
    return Tree(mixed.hexdigest(), files, merged)


def _linked(found: Iterable[btrfs.Item]) -> Iterator[btrfs.Item]:
    """Without the files that have no name any more: btrfs removes those at some time of its own."""
    gone = -1
    for item in found:
        if item.kind == btrfs.INODE and not btrfs.links(item):
            gone = item.object
        if item.object != gone and item.kind != btrfs.ORPHAN:
            yield item
