"""Releases that differ in one thing, and the bundles between them, for the tests of upgrades.

A variant is a copy of the recipes with an edit, built with a version of its own. The store keeps what they share, so
one that changes a template costs a second, one that changes the base layer half a minute.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from appliance import bundle
from appliance.apt import find_mirrors
from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.lock import SETS, SUITE, read_lock, resolve, write_lock
from appliance.model import Lock, Package, frozen_map
from appliance.node.keys import PUBLIC, Signer, dump_key
from appliance.pipeline import LOCK_FILE, Built, Options, build_disk, build_release

PROJECT = Path(__file__).parents[1]
SIGNER = Signer(bytes(range(32)))  # known to everybody: for tests only
KEYS = "recipes/node-tools/files/etc/samepage/keys"
BOOTED = ("linux-image-", "busybox", "klibc-utils", "libklibc")  # packages of the kernel and the RAM disk
Edit = Callable[[Path], None]


def replace(file: str, old: str, new: str) -> Edit:
    """An edit of one text in one file of the project; the text must be there."""

    def edit(project: Path) -> None:
        path = project / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1))

    return edit


def write(file: str, content: str, mode: int = 0o644) -> Edit:
    def edit(project: Path) -> None:
        path = project / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)

    return edit


def todays_lock() -> Lock:
    return read_lock(PROJECT / LOCK_FILE)


def release_lock(cache: Path) -> Lock:
    """Debian 13 as it was released, without the security updates since. Raises what `resolve` raises."""
    return resolve(todays_lock().wanted, find_mirrors(SUITE), cache=cache, prefer=SUITE)


def with_kernel_of(lock: Lock, other: Lock) -> Lock:
    """The lock, but with the other one's kernel and RAM disk."""

    def mixed(name: str) -> tuple[Package, ...]:
        both = [one for one in lock.sets[name] if not one.name.startswith(BOOTED)]
        both += [one for one in other.sets[name] if one.name.startswith(BOOTED)]
        return tuple(sorted(both, key=lambda package: package.name))

    return dataclasses.replace(lock, sets=frozen_map({name: mixed(name) for name in SETS}))


def without_kernel(new: Lock, old: Lock) -> Lock:
    """The packages of `new`, but the kernel and RAM disk of `old`, in a lock of another day than either's."""
    return dataclasses.replace(with_kernel_of(new, old), epoch=max(new.epoch, old.epoch) + 86_400)


def with_lock(lock: Lock) -> Edit:
    return lambda project: write_lock(lock, project / LOCK_FILE)


@dataclass
class Variants:
    """Builds variants below `folder`, each once. `common`: edits that all of them have."""

    folder: Path
    common: tuple[Edit, ...] = ()
    made: dict[str, ReleaseFiles] = field(default_factory=dict)

    def options(self, version: str, *edits: Edit) -> Options:
        project = self.folder / version
        if not project.exists():
            shutil.copytree(PROJECT / "recipes", project / "recipes", symlinks=True)
            shutil.copytree(
                PROJECT / "appliance/node", project / "appliance/node", ignore=shutil.ignore_patterns("__pycache__")
            )
            (project / KEYS).mkdir(parents=True, exist_ok=True)
            (project / KEYS / "test.pub").write_bytes(dump_key(SIGNER.public, PUBLIC, "test"))
            for edit in (*self.common, *edits):
                edit(project)
        return Options(project, version=version, output=self.folder / "dist" / version)

    def build(self, version: str, *edits: Edit) -> Built:
        built = build_release(self.options(version, *edits), Console("none"))
        self.made[version] = bundle.files_of(built.release)
        return built

    def release(self, version: str, *edits: Edit) -> ReleaseFiles:
        if version not in self.made:
            self.build(version, *edits)
        return self.made[version]

    def disk(self, version: str, *edits: Edit) -> Path:
        """A disk with that release installed."""
        output = build_disk(self.options(version, *edits), Console("none"), "qcow2")
        self.made[version] = bundle.files_of(output.built.release)
        return output.artifact.path

    def bundle(self, start: str, goal: str, signer: Signer = SIGNER) -> Path:
        """The bundle between two variants that are made."""
        old = self.made[start] if start else None
        out = self.folder / bundle.file_name(old, self.made[goal])
        bundle.make(old, self.made[goal], signer, out)
        return out
