"""The stages in order, from a tree of recipes to the files in dist/.

    recipes -> layout -> render -> packages -> layers -> release -> iso | disk

Each stage is a function of another module; only this module knows more than one of them. Every result that costs time
lies in the store under the hash of all its inputs, so a build with nothing to do looks at inputs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import appliance
from appliance import lock as locking
from appliance.check import check_project
from appliance.console import Console, Progress
from appliance.errors import LockError
from appliance.model import Artifact, Layer, Lock, Model, Package, Release, RenderedTree, Wheel
from appliance.store import Store, default_root

if TYPE_CHECKING:
    from appliance.rootfs import Inputs, Rootfs
    from appliance.tools import Tools

STAGES = ("recipes", "layout", "render", "packages", "layers", "release", "iso")
LOCK_FILE = "recipes/packages.lock"


@dataclass(frozen=True, slots=True)
class Options:
    """What a build is asked for. `strong`: smallest output instead of fastest build; `locked`: never relock."""

    project: Path
    layout: str = "private-cloud"
    version: str = appliance.__version__
    output: Path | None = None
    node: str = ""  # whose ISO or disk, where the layout has several nodes
    strong: bool = False
    locked: bool = False
    mirror: str = ""
    security_mirror: str = ""
    cache: Path = field(default_factory=default_root)

    @property
    def lock_file(self) -> Path:
        return self.project / LOCK_FILE

    @property
    def dist(self) -> Path:
        return self.output or self.project / "dist"


@dataclass(frozen=True, slots=True)
class Built:
    """A release with what it was made of."""

    options: Options
    model: Model
    trees: tuple[RenderedTree, ...]
    lock: Lock
    release: Release
    boot: Path  # folder of the boot files that the ISO and disks carry
    tree: Rootfs
    tools: Tools
    store: Store

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.release.layers


@dataclass(frozen=True, slots=True)
class Output:
    """A finished image in dist/."""

    artifact: Artifact
    built: Built
    rewritten: bool

    @property
    def model(self) -> Model:
        return self.built.model


# --- the stages ------------------------------------------------------------------------------------------------------


def build_iso(options: Options, console: Console) -> Output:
    """recipes -> ... -> iso, with its companions beside it. Nothing in dist/ is touched when nothing changed."""
    from appliance import dist, iso

    built = build_release(options, console)
    target = options.dist / f"samepage-appliance-{options.version}-amd64.iso"

    def write() -> Artifact:
        with console.stage("iso", "its content changed") as progress:
            return iso.write(built.release, built.boot, target, node=options.node, progress=progress)

    return dist.publish(built, target, dist.code_of(iso), write, console)


def build_disk(options: Options, console: Console, form: str) -> Output:
    """recipes -> ... -> disk: what an installation leaves on an empty disk, as `raw` or `qcow2`."""
    from appliance import disk, dist

    built = build_release(options, console)
    target = options.dist / f"samepage-appliance-{options.version}-amd64.{form}"

    def write() -> Artifact:
        with console.stage("disk", "its content changed") as progress:
            return disk.write(built.release, built.boot, target, built.tools, node=options.node, progress=progress)

    return dist.publish(built, target, dist.code_of(disk), write, console)


def build_container(options: Options, console: Console) -> tuple[Built, Path]:
    """recipes -> ... -> container: the folder that a container engine's image is made from."""
    from appliance import container

    built = build_release(options, console)
    tree = next(tree for tree in built.trees if options.node in ("", tree.node))
    return built, container.make(built.release, tree, built.tree.tar, built.tools, built.store)


def build_release(options: Options, console: Console) -> Built:
    """recipes -> layout -> render -> packages -> layers -> release.

    A lock whose versions left the archive is resolved anew once, with a warning, unless `locked`.
    """
    from appliance.archive import VanishedError

    model, trees = check_project(options.project, options.layout, options.version)
    try:
        return assemble(options, model, trees, settle_lock(options, model, console), console)
    except VanishedError as error:
        if options.locked:
            raise
        console.warn(f"{error.message}\nresolving the lock anew")
        return assemble(options, model, trees, relock(options, model, console), console)


def assemble(options: Options, model: Model, trees: tuple[RenderedTree, ...], lock: Lock, console: Console) -> Built:
    """packages -> layers -> release, from a lock that fits the model."""
    from appliance import release, rootfs, tools
    from appliance.boot_files import make_boot_files, make_kernel

    store = ReportingStore(options.cache, options.project, console.note, console)
    obtain = fetcher(options, lock, store, console)
    inputs = rootfs.inputs_of(lock, model)
    foresee_room(options, lock, inputs, store)
    toolbox = tools.prepare(lock, store, obtain)
    tree = rootfs.build(lock, model, inputs, store, obtain)
    made = make_layers(options, model, trees, tree, toolbox, lock, store)
    kernel = make_kernel(tree, store)
    boot = make_boot_files(toolbox, options.version, lock, store)
    made_release = release.make(model, lock, made, kernel, lock.sets["full"])
    return Built(options, model, trees, lock, made_release, boot, tree, toolbox, store)


def make_layers(
    options: Options,
    model: Model,
    trees: tuple[RenderedTree, ...],
    tree: Rootfs,
    toolbox: Tools,
    lock: Lock,
    store: Store,
) -> tuple[Layer, ...]:
    """One base layer, one app layer, and a config layer per node."""
    from appliance import layers, wheels

    def fetch_wheels(wanted: Iterable[Wheel]) -> Mapping[str, Path]:
        return wheels.fetch(wanted, store.root / "wheels")

    wanted = tuple(wheel for recipe in model.recipes for wheel in recipe.wheels)
    strong = options.strong
    return (
        layers.build_base(lock, tree, toolbox, store, strong=strong),
        layers.build_app(lock, trees[0], wanted, fetch_wheels, toolbox, store, strong=strong),
        *(layers.build_config(lock, one, toolbox, store, strong=strong) for one in trees),
    )


# --- packages --------------------------------------------------------------------------------------------------------


def settle_lock(options: Options, model: Model, console: Console) -> Lock:
    """The lock in the project, resolved anew where it does not fit the recipes. Raises LockError with `locked`."""
    try:
        lock = locking.read_lock(options.lock_file)
        locking.check(lock, model)
    except LockError as error:
        if options.locked:
            raise
        console.warn(f"{error.message}\nresolving the lock anew")
        return relock(options, model, console)
    return lock


def relock(options: Options, model: Model, console: Console) -> Lock:
    """Resolve what the recipes want against the archive of today, write the lock and name what moved."""
    from appliance.apt import find_mirrors

    try:
        old = locking.read_lock(options.lock_file)
    except LockError:
        old = None
    with console.stage("lock", "resolving the recipes' packages"):
        mirrors = find_mirrors(locking.SUITE, mirror=options.mirror, security=options.security_mirror)
        lock = locking.resolve(locking.wanted(model), mirrors, cache=options.cache)
    moved = locking.moves(old, lock)
    if old is not None:
        for move in moved:
            console.warn(f"lock: {move}")
    if moved or old is None or old.wanted != lock.wanted:
        locking.write_lock(lock, options.lock_file)
        console.note(f"wrote {LOCK_FILE}: {len(moved)} packages moved")
        return lock
    return old


def fetcher(
    options: Options, lock: Lock, store: Store, console: Console
) -> Callable[[Iterable[Package]], Mapping[str, Path]]:
    """Fetches packages into the cache, with progress; asks for mirrors only when something must be fetched."""
    from appliance import archive
    from appliance.apt import find_mirrors

    def obtain(packages: Iterable[Package]) -> Mapping[str, Path]:
        wanted = tuple(packages)
        cache = store.root / "packages"
        size = archive.to_fetch(wanted, cache)
        if not size:
            return archive.fetch(wanted, {}, cache)
        mirrors = find_mirrors(lock.suite, mirror=options.mirror, security=options.security_mirror)
        with console.stage("packages", f"{size / 1e6:.0f} MB to fetch") as progress:
            return archive.fetch(wanted, mirrors, cache, progress, snapshot=archive.snapshot_mirrors(lock))

    return obtain


# --- room ------------------------------------------------------------------------------------------------------------

UNPACKED = 3.4  # a tree's size by that of its compressed packages
PACKED = 1.6  # the same for the ISO


def foresee_room(options: Options, lock: Lock, inputs: Inputs, store: Store) -> None:
    """Raise HostError, with the figures, when the disk cannot take what this build will write."""
    from appliance import tools
    from appliance.archive import to_fetch
    from appliance.store import require_room

    full = sum(package.size for package in lock.sets["full"])
    core = sum(package.size for package in lock.sets["core"])
    missing = {package for packages in lock.sets.values() for package in packages}
    cache = to_fetch(missing, store.root / "packages")
    dist = 0
    if not store.has("tools", tools.inputs(lock)):
        cache += int(UNPACKED * sum(package.size for package in lock.sets["tools"]))
    if not store.has("core", inputs.core):
        cache += int(UNPACKED * core)
    if not store.has("tree", inputs.tree):
        cache += int((2 * UNPACKED + PACKED) * full)  # the tree, its layer and the packed layer
        dist = int(PACKED * full)
    require_room({store.root: cache, options.dist: dist})


# --- reporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReportingStore(Store):
    """A store whose steps appear as stages on the console, with the reason why each runs."""

    console: Console = field(default_factory=Console)
    running: list[Progress] = field(default_factory=list)

    def step(self, name: str, inputs: Mapping[str, str], build: Callable[[Path], None]) -> Path:
        reason = self.explain(name, inputs)
        if not reason:
            self.console.reused(name)
            return Store.step(self, name, inputs, build)
        with self.console.stage(name, reason) as progress:
            self.running.append(progress)
            try:
                return Store.step(self, name, inputs, build)
            finally:
                self.running.remove(progress)

    def report(self, done: float, total: float, unit: str) -> None:
        if self.running:
            self.running[-1].update(done, total, unit)
