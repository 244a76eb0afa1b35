"""The changes whose bundles are measured: what is built, and the plain Debian trees of the same change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from appliance import releases, tools
from appliance.bundle import ReleaseFiles
from appliance.check import check_project
from appliance.lock import read_lock, wanted, write_lock
from appliance.model import Lock, Package
from appliance.node.keys import SECRET, Signer, dump_key
from appliance.store import Store, default_root
from appliance.wheels import NODE_PYTHON
from bench import plain
from bench.measure import Cost, measure, scratch
from bench.workshop import Workshop

LAYOUT = "private-cloud"
LOCK = "recipes/packages.lock"
SQLALCHEMY = {  # version: sha256 of the wheel without compiled code, some 260 files
    "2.0.43": "1681c21dd2ccee222c2fe0bef671d1aef7c504087c9c4e800371cfcc8ac966fc",
    "2.0.44": "19de7ca1246fbef9f9d1bff8f1ab25641569df226364a0e40457dc5457c54b05",
}
PIP_PLACE = f"usr/local/lib/python{NODE_PYTHON}/dist-packages"
AGAIN = 5  # runs of what takes about a second

Files = Mapping[str, Path]
"""Content by path in a tree."""


@dataclass(frozen=True, slots=True)
class Change:
    """Releases before and after a change, and how the plain trees before and after are made in a folder."""

    name: str
    old: ReleaseFiles
    new: ReleaseFiles
    plain: Callable[[Path], tuple[Path, Path]]
    made: tuple[Cost, ...] = ()  # from an edited file to its bundle, where that was measured


@dataclass(frozen=True, slots=True)
class Bench:
    """What the steps share. `work` is removed at the end."""

    shop: Workshop
    work: Path
    update: plain.Update
    signer: Signer = field(default_factory=lambda: Signer(bytes(range(32))))

    @property
    def tools(self) -> tools.Tools:
        """The builder's own, in its cache since the first build."""
        return tools.prepare(self.update.old, self.store, lambda _packages: {})

    @property
    def store(self) -> Store:
        return Store(self.shop.builder.cache, self.shop.builder.project)

    def release(self, version: str) -> ReleaseFiles:
        """What the project's copy makes as it stands."""
        iso = self.shop.builder.iso("--locked", "--release-version", version).iso
        return releases.find(str(_manifest(iso)), self.shop.builder.out, self.tools, self.store)

    def manifest(self, release: ReleaseFiles) -> Path:
        """Where it was written."""
        return _manifest(self.shop.builder.out / f"samepage-appliance-{release.manifest.version}-amd64.iso")

    def bundle(self, *words: str | Path) -> tuple[Path, Cost]:
        """Run `build.py bundle` as a user does."""
        builder, folder, key = self.shop.builder, self.work / "bundles", self.work / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(dump_key(self.signer.secret, SECRET, "bench"))
        cost = measure(
            [sys.executable, builder.program, "-C", builder.project, "--progress", "none", "bundle", "--locked",
             "--output-dir", folder, "--key", key, *words],
            log=self.work / "bundle.log", env={"SAMEPAGE_CACHE": str(builder.cache)},
        )  # fmt: skip
        return max(folder.glob("*.bundle"), key=lambda file: file.stat().st_mtime_ns), cost

    def layer(self, release: ReleaseFiles, kind: str) -> Path:
        """The tree that a layer of a release holds."""
        layer = next(one for one in release.manifest.layers if one.kind == kind)
        out = self.work / f"{kind}-{layer.digest[:16]}"
        return out if out.exists() else self.unpack(release.files[layer.digest], out)

    def unpack(self, image: Path, out: Path) -> Path:
        """The files of an EROFS image."""
        self.tools.run("fsck.erofs", f"--extract={out}", image)
        return out

    def pip_installed(self, version: str) -> Path:
        """What pip leaves of SQLAlchemy on a machine: files of today, modules compiled the usual way."""
        out, wanted = self.work / f"pip-{version}", self.work / f"pip-{version}.txt"
        wanted.write_text(f"sqlalchemy=={version} --hash=sha256:{SQLALCHEMY[version]}\n")
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={NODE_PYTHON}", "--no-compile", "--quiet"]
        measure(
            [sys.executable, "-m", "pip", "install", *options, "--target", out, "-r", wanted],
            log=self.work / "pip.log",
        )
        self.tools.run(
            f"python{NODE_PYTHON}", "-s", "-S", "-P", "-m", "compileall", "-q", "-s", out, "-p", f"/{PIP_PLACE}", out
        )
        return out

    def image(self, folder: Path, out: Path) -> Path:
        """A folder as an EROFS image, with mkfs.erofs' own defaults: for what works on blocks."""
        clock = ["-T1700000000", "--mkfs-time"]
        self.tools.run("mkfs.erofs", "--quiet", *clock, "-U3f6f1f1a-0f0c-4f2e-9b77-5a2d1c9e4b10", "-x-1", out, folder)
        return out

    def plain(self, state: str) -> Path:
        """The plain tree of the update's state old, userspace or new."""
        lock: Lock = getattr(self.update, state)
        out = self.work / f"plain-{state}"
        if not out.exists():
            packages = (*lock.sets["full"], *self.update.extra)
            plain.plain_tree(packages, self.fetch(lock, packages), lock.epoch, out)
        return out

    def fetch(self, lock: Lock, packages: tuple[Package, ...]) -> Mapping[str, Path]:
        """The usual cache may hold what the archive no longer has."""
        return plain.fetch(packages, lock, self.shop.mirrors, default_root())


def _manifest(iso: Path) -> Path:
    return iso.with_name(f"{iso.stem}.manifest.json")


@contextmanager
def open_bench(shop: Workshop) -> Iterator[Bench]:
    """Find the update to look at, and give the builder its packages."""
    with scratch(shop.cache, "bundle") as work:
        shop.builder.restore(shop.root)
        model, _ = check_project(shop.builder.project, LAYOUT, "1.0")
        starts = [read_lock(file) for file in (shop.root / LOCK, *shop.older_locks)]
        update = plain.find_update(wanted(model), starts, shop.mirrors, default_root())
        bench = Bench(shop, work, update)
        for lock in (update.old, update.userspace, update.new):
            packages = tuple({package for packages in lock.sets.values() for package in packages})
            for file in bench.fetch(lock, packages).values():
                place = shop.builder.cache / "packages" / file.parent.name
                place.mkdir(parents=True, exist_ok=True)
                if not (place / file.name).exists():
                    shutil.copy2(file, place)
        yield bench


def changes(bench: Bench) -> Iterator[Change]:
    """One after the other, as each is built."""
    start = _with_lock(bench, bench.update.old, "1.0")
    yield _one_file(bench, start)
    yield _one_package(bench)
    for version, state in (("1.4", "userspace"), ("1.5", "new")):
        name = "update with kernel" if state == "new" else "update of userspace"
        new = _with_lock(bench, getattr(bench.update, state), version)
        yield Change(name, start, new, partial(_plain_states, bench, state))


def _plain_states(bench: Bench, state: str, _folder: Path) -> tuple[Path, Path]:
    return bench.plain("old"), bench.plain(state)


def _with_lock(bench: Bench, lock: Lock, version: str) -> ReleaseFiles:
    """The project as it is, of other packages."""
    bench.shop.builder.restore(bench.shop.root)
    write_lock(lock, bench.shop.builder.project / LOCK)
    return bench.release(version)


def _one_file(bench: Bench, start: ReleaseFiles) -> Change:
    """A comment in nginx.conf, again and again."""
    made = []
    for number in range(AGAIN):
        bench.shop.builder.change_template(f"another line {number}")
        made.append(bench.bundle("--from", bench.manifest(start), "--release-version", "1.1")[1])
    new, path = bench.release("1.1"), "etc/nginx/nginx.conf"
    files = [{path: bench.layer(one, "config") / path} for one in (start, new)]
    return Change("one file in /etc", start, new, lambda folder: _variants(bench, folder, files), tuple(made))


def _one_package(bench: Bench) -> Change:
    """A wheel of the product's recipe in its next version."""
    recipe, found = bench.shop.builder.project / "recipes/samepage/recipe.yaml", []
    for number, (version, digest) in enumerate(SQLALCHEMY.items(), start=2):
        bench.shop.builder.restore(bench.shop.root)
        write_lock(bench.update.old, bench.shop.builder.project / LOCK)
        wheel = f'  - {{requirement: "sqlalchemy=={version}", sha256: "{digest}"}}'
        recipe.write_text(f"{recipe.read_text()}\nwheels:\n{wheel}\n")
        found.append(bench.release(f"1.{number}"))
    files = [{PIP_PLACE: bench.pip_installed(version)} for version in SQLALCHEMY]
    name = f"SQLAlchemy {' to '.join(SQLALCHEMY)}"
    return Change(name, found[0], found[1], lambda folder: _variants(bench, folder, files))


def _variants(bench: Bench, folder: Path, files: list[dict[str, Path]]) -> tuple[Path, Path]:
    """The old plain tree with the files of before and of after a change."""
    before, after = (
        plain.with_files(bench.plain("old"), folder / name, one)
        for name, one in zip(("before", "after"), files, strict=True)
    )
    return before, after
