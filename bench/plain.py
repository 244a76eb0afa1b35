"""Two states of Debian 13 and plain trees of them: what a real update moves, and what the peers are given."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from appliance import archive
from appliance.apt import Mirrors, file_name, local_index
from appliance.errors import ApplianceError
from appliance.lock import OMITTED, Move, moves, resolve
from appliance.model import Lock, Package, frozen_map
from bench.debian import SUITE
from bench.measure import BenchError, measure, remove_tree, scratch
from tests.variants import with_kernel_of

# What packages or tools leave behind that no image of a system holds: it is new in every build.
LEFTOVERS = (
    "dev", "proc", "run", "sys", "tmp", "etc/machine-id", "etc/ssh/ssh_host_*", "etc/ssl/certs/ssl-cert-snakeoil.pem",
    "etc/ssl/private", "var/cache", "var/lib/apt", "var/lib/dbus", "var/lib/postgresql", "var/lib/systemd", "var/log",
    "var/tmp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Update:
    """An update of real packages: the old state, the new one, and the new one with the old kernel."""

    name: str
    old: Lock
    userspace: Lock
    new: Lock
    extra: tuple[Package, ...]  # of plain trees only: what our recipes leave out

    @property
    def moved(self) -> tuple[Move, ...]:
        return tuple(move for move in moves(installed(self.old), installed(self.new)))


def installed(lock: Lock) -> Lock:
    """The lock without the builder's own tools."""
    return replace(lock, sets=frozen_map({**lock.sets, "tools": ()}))


def find_update(wanted: Mapping[str, tuple[str, ...]], starts: Sequence[Lock], mirrors: Mirrors, cache: Path) -> Update:
    """The largest update to today's packages that is to be had: from one of the locks, as long as every one of its
    packages is still there, or from the point release as it was before its updates and security fixes.

    Raises BenchError where nothing moved at all, as on the day of a point release.
    """
    new = resolve(wanted, mirrors, cache=cache)
    olds = {"the point release": resolve(wanted, mirrors, cache=cache, prefer=SUITE)}
    for number, lock in enumerate(starts, start=1):
        if lock.wanted == new.wanted and can_fetch(lock, mirrors, cache):
            olds[f"lock {number}"] = lock
    names = {package.name for package in new.sets["full"]}
    complete = resolve({**wanted, OMITTED: ()}, mirrors, cache=cache)
    extra = tuple(package for package in complete.sets["full"] if package.name not in names)
    found = [
        Update(f"from {name} to today", same_tools(old, new), with_kernel_of(new, old), new, extra)
        for name, old in olds.items()
    ]
    best = max(found, key=lambda one: len(one.moved))
    if not best.moved:
        raise BenchError("Debian has no update since the point release and since the lock; name an older --lock")
    return best


def can_fetch(lock: Lock, mirrors: Mirrors, cache: Path) -> bool:
    """Whether every package of a lock is in the cache or is still handed out."""
    try:
        fetch(lock.sets["full"], lock, mirrors, cache)
    except ApplianceError:
        return False
    return True


def fetch(packages: Iterable[Package], lock: Lock, mirrors: Mirrors, cache: Path) -> Mapping[str, Path]:
    return archive.fetch(packages, mirrors, cache / "packages", snapshot=archive.snapshot_mirrors(lock))


def same_tools(lock: Lock, other: Lock) -> Lock:
    """The lock, built with the tools of the other one: what they write is not what is measured."""
    return replace(lock, sets=frozen_map({**lock.sets, "tools": other.sets["tools"]}))


def in_words(moved: Iterable[Move]) -> list[str]:
    """Packages that moved, those that moved together in one line."""
    together: dict[tuple[str, str], list[str]] = {}
    for move in moved:
        together.setdefault((move.old, move.new), []).append(move.name)
    return [str(Move(", ".join(names), *versions)) for versions, names in together.items()]


# --- trees -----------------------------------------------------------------------------------------------------------


def plain_tree(packages: Sequence[Package], files: Mapping[str, Path], epoch: int, out: Path) -> Path:
    """What mmdebstrap makes of just these packages with their default configuration, as an image would hold it.

    The kernel package lets initramfs-tools make the RAM disk. Needs root.
    """
    with scratch(out.parent, "repository") as work:
        repository = work / "repository"
        repository.mkdir()
        for package in packages:
            shutil.copy(files[package.sha256], repository / file_name(package))
        (repository / "Packages").write_text(local_index(packages, files, work))
        (repository / "Release").write_text(f"Suite: {SUITE}\nCodename: {SUITE}\n")
        measure(
            ["mmdebstrap", "--mode=root", "--variant=essential", "--skip=check/signed-by",
             f"--include={','.join(package.name for package in packages)}", SUITE, out,
             f"deb [trusted=yes] copy:{repository} ./"],
            log=work / "log", env={"SOURCE_DATE_EPOCH": str(epoch), "TMPDIR": str(work)},
        )  # fmt: skip
    for pattern in LEFTOVERS:
        for path in out.glob(pattern):
            remove_tree(path)
    return out


def with_files(tree: Path, out: Path, files: Mapping[str, Path]) -> Path:
    """The tree with other content at some paths; what is the same is linked. A folder brings all that is in it."""
    measure(["cp", "-al", tree, out], log=out.with_name(f"{out.name}.log"))
    for name, source in files.items():
        target = out / name
        remove_tree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        measure(["cp", "-a", source, target], log=out.with_name(f"{out.name}.log"))
    return out
