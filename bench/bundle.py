"""Bundles beside other ways to update: bytes, and what making and applying costs. A file, a package, a real update."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from appliance.node.bundle import files_of
from appliance.node.upgrade import records, staging
from bench import peers, plain
from bench.measure import BenchError, Cost, measure, remove_tree, scratch
from bench.peers import Given, Taken
from bench.report import Figure, number, of_runs, paired_ratio
from bench.states import Bench, Change, changes, open_bench
from bench.workshop import Workshop

UNITS = {"KB": 1e3, "MB": 1e6}


@dataclass(frozen=True, slots=True)
class Goals:
    """The most that may be, None where there is no goal: `size` in `unit`, `share` of the best peer's bytes."""

    unit: str
    size: float | None = None
    share: float | None = None
    make: float | None = None  # CPU s


GOALS = (
    Goals("KB", size=2.048), Goals("KB", share=0.3), Goals("MB", size=3.0, make=120), Goals("MB", share=0.4, make=120),
)  # fmt: skip
MEMORY = 64.0  # MB, to apply
TIMES = 3.0  # CPU time to apply, by that of writing the same files out in full


def bundle(shop: Workshop) -> None:
    """One figure per peer, change and kind of tree; ours with their goals."""
    with open_bench(shop) as bench:
        moved, note = bench.update.moved, f"{bench.update.name}: {'; '.join(plain.in_words(bench.update.moved))}"
        shop.add(Figure("bundle", "what the update moves", len(moved), "packages", note=note))
        for change, goals in zip(changes(bench), GOALS, strict=True):
            size = _ours(bench, change, goals)
            for kind, given in (("layers", _layers), ("plain", _plain)):
                with scratch(bench.work, "given") as folder:
                    _beside(shop, change, goals, kind, size, given(bench, change, folder))


def _ours(bench: Bench, change: Change, goals: Goals) -> int:
    """Make and apply the bundle, as its users do; its size."""
    say, name = bench.shop.add, f"bundle: {change.name}"
    if change.made:
        say(of_runs(name, "edit to bundle", [cost.wall for cost in change.made], "s", 1.0))
        say(of_runs(name, "edit to bundle, CPU", [cost.cpu for cost in change.made], "CPU s"))
    path, made = bench.bundle("--from", bench.manifest(change.old), "--to", bench.manifest(change.new))
    size = path.stat().st_size
    say(Figure(name, "size", size / UNITS[goals.unit], goals.unit, goals.size))
    say(Figure(name, "made", made.cpu, "CPU s", goals.make, note=f"{made.wall:.1f} s"))
    staged, written, key = [], [], bench.signer.public.hex()
    for _ in range(bench.shop.rounds):
        with scratch(bench.work, "node") as root:
            staged.append(_on_node("stage", _node_with(change, root), path, _node(change), key))
            written.append(_on_node("copy", root / "out", *_made(change)))
    applied, full = [one.cpu for one in staged], [one.cpu for one in written]
    say(of_runs(name, "applied", applied, "CPU s", note="with the start of Python"))
    say(Figure(name, "to writing in full", paired_ratio(applied, full), "x", TIMES, note=f"{min(full):.2f} CPU s"))
    say(Figure(name, "memory to apply", max(one.memory for one in staged) / 1e6, "MB", MEMORY))
    return size


# --- the node's side -------------------------------------------------------------------------------------------------


def _on_node(what: str, *words: str | Path) -> Cost:
    root = Path(__file__).parent.parent
    with scratch(Path(words[0]).parent, "log") as folder:
        return measure(
            [sys.executable, "-m", "bench.onnode", what, *words], log=folder / "log", env={"PYTHONPATH": str(root)}
        )


def _node(change: Change) -> str:
    """The node whose upgrade is looked at."""
    return next(layer.node for layer in change.old.manifest.layers if layer.kind == "config")


def _node_with(change: Change, root: Path) -> Path:
    """What stands for the state partition of a node with the old release."""
    manifest, node = change.old.manifest, _node(change)
    for digest, file in staging.wanted_files(str(root), manifest, node).items():
        place = Path(file.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(change.old.files[digest])
    records.record_release(str(root), manifest.version, change.old.content, node)
    return root


def _made(change: Change) -> list[Path]:
    """The new release's files that the old one does not have."""
    had = files_of(change.old.manifest)
    return [change.new.files[digest] for digest in files_of(change.new.manifest) if digest not in had]


# --- the peers -------------------------------------------------------------------------------------------------------


def _layers(bench: Bench, change: Change, folder: Path) -> Given:
    """Our own layers and kernel files, those that changed: as they are, and unpacked for what works on trees."""
    trees = (folder / "old", folder / "new")
    for tree in trees:
        tree.mkdir()
    files = []
    for layer in change.new.manifest.layers:
        before = next(one for one in change.old.manifest.layers if (one.kind, one.node) == (layer.kind, layer.node))
        pair = (change.old.files[before.digest], change.new.files[layer.digest])
        if before.digest != layer.digest:
            files.append(pair)
            for tree, image in zip(trees, pair, strict=True):
                bench.unpack(image, tree / layer.kind)
                remove_tree(tree / layer.kind / "dev")  # always the same, and ostree takes no devices
    old, new = change.old.manifest.kernel, change.new.manifest.kernel
    for stale, fresh in ((old.vmlinuz, new.vmlinuz), (old.initrd, new.initrd)):
        if stale.digest != fresh.digest:
            files.append((change.old.files[stale.digest], change.new.files[fresh.digest]))
            for tree, file in zip(trees, files[-1], strict=True):
                shutil.copy(file, tree)
    return Given(*trees, tuple(files), tuple(files))


def _plain(bench: Bench, change: Change, folder: Path) -> Given:
    """Plain Debian trees of the same change."""
    trees = change.plain(folder)
    tars = tuple(peers.as_tar(tree, folder / f"{number}.tar") for number, tree in enumerate(trees))
    images = tuple(bench.image(tree, folder / f"{number}.img") for number, tree in enumerate(trees))
    return Given(*trees, ((tars[0], tars[1]),), ((images[0], images[1]),))


def _beside(shop: Workshop, change: Change, goals: Goals, kind: str, size: int, given: Given) -> None:
    """The peers' bytes, and ours by those of the best."""
    name, unit = f"bundle: {change.name}", goals.unit
    found = peers.run_peers(given, shop.cache)
    for peer, taken in found.items():
        if isinstance(taken, BenchError):
            shop.add(Figure(name, f"{peer}, {kind}", math.nan, unit, note=str(taken).splitlines()[0]))
        else:
            shop.add(Figure(name, f"{peer}, {kind}", taken.size / UNITS[unit], unit, note=_costs(taken)))
    sizes = {taken.size: peer for peer, taken in found.items() if isinstance(taken, Taken)}
    if sizes:
        best = min(sizes)
        shop.add(Figure(name, f"to best peer, {kind}", size / best, "x", goals.share, note=sizes[best]))


def _costs(taken: Taken) -> str:
    made = f"made in {number(taken.make.cpu, 'CPU s')}"
    if taken.apply is None:
        return made
    return f"{made}, applied in {number(taken.apply.cpu, 'CPU s')}, {number(taken.apply.memory / 1e6, 'MB')}"
