"""The content cache: results of build steps, keyed by the hash of all their inputs.

A step's folder appears whole or not at all: it is built beside its place and renamed at the end, under a lock of its
key, so a killed build leaves nothing that the next one trusts, and two builds at once make each result once.

    <root>/steps/<name>/<key>/           what the step wrote
    <root>/steps/<name>/<key>.*.partial  what is being built, or was when the builder was killed
    <root>/steps/<name>/<key>.json       its inputs, and the size of every file: a torn result is noticed unread
    <root>/locks/                        empty files to lock
    <root>/last/                         which inputs a checkout used last, for `explain`
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import HostError

Notify = Callable[[str], None]

KEEP_DAYS = 14  # a step that makes a new result forgets those that nobody used for so long


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    """SAMEPAGE_CACHE, else samepage-appliance under XDG_CACHE_HOME, else under ~/.cache."""
    if chosen := environ.get("SAMEPAGE_CACHE"):
        return Path(chosen).absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "samepage-appliance"


def key_of(inputs: Mapping[str, str]) -> str:
    """The key of a result: sha256 of its inputs, whatever their order, 64 hex digits."""
    return hashlib.sha256(json.dumps(dict(sorted(inputs.items())), ensure_ascii=True).encode()).hexdigest()


def digest_of_files(files: Mapping[str, Path]) -> str:
    """One digest for named files' contents; names count, paths and times do not."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Store:
    """A cache folder. `checkout` is the project folder, for `explain`; `notify` is told what is waited for."""

    root: Path
    checkout: Path
    notify: Notify = lambda _: None

    # --- steps -------------------------------------------------------------------------------------------------------

    def place(self, name: str, inputs: Mapping[str, str]) -> Path:
        """The folder of a step's result, built or not."""
        return self.root / "steps" / name / key_of(inputs)

    def has(self, name: str, inputs: Mapping[str, str]) -> bool:
        """Whether the step's result is there and whole."""
        return _is_whole(self.place(name, inputs))

    def step(self, name: str, inputs: Mapping[str, str], build: Callable[[Path], None]) -> Path:
        """The folder of the step's result; `build` fills an empty folder when there is none yet.

        Raises whatever `build` raises, and leaves nothing behind then.
        """
        place = self.place(name, inputs)
        if not _is_whole(place):
            with self.locked(f"{name}-{place.name}", f"another build is making {name}; waiting for it"):
                if not _is_whole(place):
                    self._build(place, inputs, build)
            self.clean(keep_days=KEEP_DAYS, only=name)
        _record(place).touch()  # when it was used last, for `clean`
        self._remember(name, inputs)
        return place

    def report(self, done: float, total: float, unit: str) -> None:
        """What a running step tells about itself; a store with a console shows it."""

    def _build(self, place: Path, inputs: Mapping[str, str], build: Callable[[Path], None]) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            for leftover in place.parent.glob(f"{place.name}.*.partial"):
                with suppress(OSError):  # a program of the killed build may still write there, which harms nothing
                    remove(leftover)
            remove(place)
            _record(place).unlink(missing_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".partial", dir=place.parent))
            try:
                partial.chmod(0o755)
                build(partial)
                record = {"inputs": dict(sorted(inputs.items())), "files": _sizes(partial)}
                partial.rename(place)
            except BaseException:
                remove(partial)
                raise
            _write_whole(_record(place), json.dumps(record, indent=0))
        except OSError as error:
            raise HostError(
                f"cannot write the cache {self.root}: {error.strerror or error}",
                hint="free some space with ./build.py clean, or place the cache elsewhere with SAMEPAGE_CACHE",
            ) from error

    # --- explaining --------------------------------------------------------------------------------------------------

    def explain(self, name: str, inputs: Mapping[str, str]) -> str:
        """Why the step would run: which inputs differ from this checkout's last run; empty when its result is there."""
        if self.has(name, inputs):
            return ""
        last = self._last(name)
        if not last:
            return "never built in this checkout"
        changed = [key for key in sorted(inputs) if key in last and last[key] != inputs[key]]
        added = [key for key in sorted(inputs) if key not in last]
        gone = [key for key in sorted(last) if key not in inputs]
        parts = [
            f"{what}: {', '.join(keys)}"
            for what, keys in (("changed", changed), ("new", added), ("gone", gone))
            if keys
        ]
        return "; ".join(parts) or "its result is not in the cache any more"

    def _last_file(self, name: str) -> Path:
        return self.root / "last" / hashlib.sha256(str(self.checkout).encode()).hexdigest()[:16] / f"{name}.json"

    def _last(self, name: str) -> dict[str, str]:
        try:
            return {str(key): str(value) for key, value in json.loads(self._last_file(name).read_text()).items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _remember(self, name: str, inputs: Mapping[str, str]) -> None:
        if self._last(name) != dict(inputs):
            file = self._last_file(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(file, json.dumps(dict(sorted(inputs.items())), indent=0))

    # --- locks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, name: str, waiting: str) -> Iterator[None]:
        """Hold the named lock; the kernel frees it when the process dies. Says `waiting` before it waits."""
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise HostError(
                f"cannot write the cache {self.root}: {error.strerror}", hint="place it elsewhere with SAMEPAGE_CACHE"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.notify(waiting)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # --- room and cleaning -------------------------------------------------------------------------------------------

    def results(self, only: str = "*") -> list[Result]:
        """Every result (of one step) and every leftover of a killed build, oldest use first."""
        found = []
        for place in (self.root / "steps").glob(f"{only}/*"):
            if place.suffix == ".json":
                continue
            found.append(Result(place.parent.name, place, _last_use(place), disk_usage(place)))
        return sorted(found, key=lambda result: result.used)

    def clean(self, *, keep_days: float | None = None, only: str = "*") -> int:
        """Remove all results (of one step), or those not used for `keep_days`; returns the bytes freed.

        What is being built stays.
        """
        freed = 0
        oldest = time.time() - (keep_days or 0) * 86400
        for result in self.results(only):
            if keep_days is not None and (result.leftover or result.used > oldest):
                continue
            with self.locked(
                f"{result.name}-{result.place.name.partition('.')[0]}",
                f"waiting for a build that makes {result.name}",
            ):
                if keep_days is not None and _last_use(result.place) > oldest:  # it was being made just then
                    continue
                _record(result.place).unlink(missing_ok=True)
                remove(result.place)
                freed += result.size
        return freed


@dataclass(frozen=True, slots=True)
class Result:
    """One result in the cache: when it was used last (seconds, 0 for a leftover) and its bytes on disk."""

    name: str
    place: Path
    used: float
    size: int

    @property
    def leftover(self) -> bool:
        """Whether it is being built, or was when the builder was killed."""
        return self.place.suffix == ".partial"


def remove(path: Path) -> None:
    """Remove a file or a folder, also one with folders that are not writable; a missing one is fine.

    Raises OSError, e.g. when a program still writes there.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with suppress(PermissionError):  # another user's, and empty
            Path(folder).chmod(0o700)
    shutil.rmtree(path)


def _last_use(place: Path) -> float:
    """When a result was used last, in seconds; 0 for one that is not finished."""
    try:
        return _record(place).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def disk_usage(path: Path) -> int:
    """Bytes that the files under a path take on disk."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += Path(folder, name).lstat().st_blocks * 512
            except FileNotFoundError:  # a build beside us
                continue
    return total


def require_room(needs: Mapping[Path, int]) -> None:
    """Raise HostError, with the figures, unless each folder's file system has the bytes; folders may not exist yet.

    Needs on the same file system add up.
    """
    by_device: dict[int, tuple[Path, int]] = {}
    for folder, need in needs.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        first, sum_ = by_device.get(existing.stat().st_dev, (folder, 0))
        by_device[existing.stat().st_dev] = (first, sum_ + need)
    for folder, need in by_device.values():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < need:
            raise HostError(
                f"the build needs about {need / 1e6:.0f} MB at {folder}, where {free / 1e6:.0f} MB are free",
                hint="free some space, e.g. with ./build.py clean, or place the cache elsewhere with SAMEPAGE_CACHE",
            )


def _record(place: Path) -> Path:
    return place.with_name(place.name.removesuffix(".partial") + ".json")


def _is_whole(place: Path) -> bool:
    try:
        recorded = json.loads(_record(place).read_text())["files"]
        inside = f"{place}{os.sep}"  # thousands of names: joining paths would take longer than looking at the files
        return all(os.lstat(inside + name).st_size == size for name, size in recorded.items()) and place.is_dir()
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _sizes(folder: Path, limit: int = 1000) -> dict[str, int]:
    """Sizes of a result's files; of a whole tree, only the first ones, so that looking at it stays cheap."""
    sizes: dict[str, int] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            status = Path(parent, name).lstat()
            if stat.S_ISREG(status.st_mode) and len(sizes) < limit:
                sizes[str(Path(parent, name).relative_to(folder))] = status.st_size
    return sizes


def _write_whole(file: Path, text: str) -> None:
    """Write a small file so that no reader, and no crash, sees a half of it."""
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=file.name, suffix=".partial", delete=False
    ) as partial:
        partial.write(text)
        partial.flush()
        os.fsync(partial.fileno())
    Path(partial.name).replace(file)
