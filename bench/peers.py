"""The peers of a bundle: what else makes a small file that leads from one state of a system to the next.

Each gets the same two states, makes what a node would fetch, applies that to the old state, and is checked by the
result. Debian packages all of them but the block index.
"""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import BenchError, Cost, measure, scratch

PROGRAMS = ("ostree", "casync", "xdelta3", "zstd")
APT_LINE = f"apt-get install {' '.join(PROGRAMS)}"
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Given:
    """Two states of a system: as folders, and as files (old, new), either our layers or tars.

    `images` are file systems for what works on blocks.
    """

    old: Path
    new: Path
    files: tuple[tuple[Path, Path], ...]
    images: tuple[tuple[Path, Path], ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that a node must fetch; cost of making them and of applying them, None where nothing can be said of it."""

    size: int
    make: Cost
    apply: Cost | None = None


def xdelta3(given: Given, work: Path) -> Taken:
    """VCDIFF, packed by its own LZMA, with the whole old file as its window."""
    window = _window(given.files)
    return _file_by_file(
        given.files, work,
        lambda old, new, delta: ["xdelta3", "-q", "-e", "-f", "-9", "-S", "lzma", "-B", window, "-s", old, new, delta],
        lambda old, delta, out: ["xdelta3", "-q", "-d", "-f", "-B", window, "-s", old, delta, out],
    )  # fmt: skip


def zstd(given: Given, work: Path) -> Taken:
    """`zstd --patch-from`, as hard as it goes without --ultra."""
    return _file_by_file(
        given.files, work,
        lambda old, new, delta: ["zstd", "-q", "-f", "-19", "--long=31", f"--patch-from={old}", new, "-o", delta],
        lambda old, delta, out: ["zstd", "-q", "-f", "-d", "--long=31", f"--patch-from={old}", delta, "-o", out],
    )  # fmt: skip


Command = Callable[[Path, Path, Path], Sequence[str | Path]]


def _file_by_file(pairs: Sequence[tuple[Path, Path]], work: Path, make: Command, apply: Command) -> Taken:
    size, making, applying = 0, Cost(0, 0), Cost(0, 0)
    delta, out = work / "delta", work / "out"
    for old, new in pairs:
        making += measure(make(old, new, delta), log=work / "log")
        applying += measure(apply(old, delta, out), log=work / "log")
        _same(out, new)
        size += delta.stat().st_size
    return Taken(size, making, applying)


def _window(pairs: Sequence[tuple[Path, Path]]) -> str:
    """The next power of two that holds the largest old file."""
    return str(1 << max(20, max(old.stat().st_size for old, _ in pairs).bit_length()))


def _same(made: Path, wanted: Path) -> None:
    if not filecmp.cmp(made, wanted, shallow=False):
        raise BenchError(f"{made.name} is not what it should be")


def ostree(given: Given, work: Path) -> Taken:
    """A static delta between two commits of the trees, everything in one file."""
    builder, node, delta = work / "builder", work / "node", work / "delta"
    log = work / "log"

    def call(repository: Path, *words: str | Path) -> Cost:
        return measure(["ostree", f"--repo={repository}", *words], log=log, output=work / "said")

    call(builder, "init", "--mode=bare")
    call(builder, "commit", "--branch=os", f"--tree=dir={given.old}")
    old = (work / "said").read_text().strip()
    making = call(builder, "commit", "--branch=os", f"--tree=dir={given.new}")
    new = (work / "said").read_text().strip()
    making += call(
        builder, "static-delta", "generate", f"--from={old}", f"--to={new}", "--inline", "--min-fallback-size=0",
        f"--filename={delta}",
    )  # fmt: skip
    call(node, "init", "--mode=bare")
    call(node, "pull-local", builder, old)
    applying = call(node, "static-delta", "apply-offline", delta)
    call(node, "ls", "-R", "-C", new)
    return Taken(delta.stat().st_size, making, applying)


def casync(given: Given, work: Path) -> Taken:
    """Chunks of the folders, cut by content: those that the old state lacks, and the index."""
    log, options = work / "log", ["--with=unix"]
    stores = [work / "old.castr", work / "new.castr"]
    indexes = [work / "old.caidx", work / "new.caidx"]
    costs = [
        measure(["casync", "make", *options, f"--store={store}", index, folder], log=log)
        for store, index, folder in zip(stores, indexes, (given.old, given.new), strict=True)
    ]
    known = {chunk.name for chunk in stores[0].rglob("*.cacnk")}
    size = indexes[1].stat().st_size
    size += sum(chunk.stat().st_size for chunk in stores[1].rglob("*.cacnk") if chunk.name not in known)
    applying = measure(
        ["casync", "extract", *options, f"--store={stores[1]}", f"--seed={given.old}", indexes[1], work / "out"],
        log=log,
    )
    measure(["diff", "-r", "--no-dereference", given.new, work / "out"], log=log)
    return Taken(size, costs[1], applying)


def block_index(given: Given, work: Path) -> Taken:
    """As RAUC's adaptive updates: blocks of 4 KiB that the old image has anywhere are not fetched, others are, plain.

    RAUC itself can only do this between two slots of a running system and a web server, so this is an index of our own.
    """
    started, size = time.process_time(), 0
    for old, new in given.images:
        known = set(_blocks(old))
        size += BLOCK * len({one for one in _blocks(new) if one not in known})
    took = time.process_time() - started
    shutil.rmtree(work)
    return Taken(size, Cost(took, took))


def _blocks(image: Path) -> list[bytes]:
    with image.open("rb", buffering=1 << 20) as file:
        return [hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK), b"")]


PEERS: dict[str, Callable[[Given, Path], Taken]] = {
    "xdelta3": xdelta3, "zstd --patch-from -19": zstd, "ostree static delta": ostree, "casync": casync,
    "4 KiB block index": block_index,
}  # fmt: skip


def run_peers(given: Given, cache: Path) -> dict[str, Taken | BenchError]:
    """Every peer on the same states; a BenchError in the place of one that is missing or failed."""
    found: dict[str, Taken | BenchError] = {}
    for name, peer in PEERS.items():
        with scratch(cache, "peer") as work:
            try:
                found[name] = peer(given, work)
            except BenchError as error:
                found[name] = error
    return found


def as_tar(folder: Path, tar: Path) -> Path:
    """A tar of a folder, sorted by name."""
    measure(["tar", "--sort=name", "--numeric-owner", "-cf", tar, "-C", folder, "."], log=tar.with_suffix(".log"))
    return tar
