"""Packages: fetched by apt's own downloader, each checked against the lock, kept by content."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from appliance.apt import Mirrors
from appliance.console import Progress
from appliance.errors import ApplianceError, CommandError, LockError
from appliance.model import Lock, Package
from appliance.run import run

HELPER = "/usr/lib/apt/apt-helper"
SNAPSHOT_VARIABLE = "SAMEPAGE_SNAPSHOT"


class VanishedError(LockError):
    """The archive no longer has versions that the lock names."""

    def __init__(self, packages: Iterable[Package]) -> None:
        self.packages = tuple(packages)
        names = "\n  ".join(f"{package.name} {package.version}" for package in self.packages)
        super().__init__(
            f"the archive no longer has what the lock names:\n  {names}",
            hint=f"name a snapshot service with {SNAPSHOT_VARIABLE} (docs/building.md), or take the new versions with ./build.py lock --update",
        )


def fetch(
    packages: Iterable[Package], mirrors: Mirrors, cache: Path, progress: Progress | None = None, *, snapshot: Mirrors | None = None
) -> Mapping[str, Path]:
    """The packages' files by sha256, fetched where `cache` lacks them, each file's content checked.

    `snapshot` (see `snapshot_mirrors`) is asked for what the mirrors no longer have. Raises VanishedError when neither
    has a version, CommandError when a mirror is out of reach, ApplianceError when it hands out other content.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {package.sha256: package for package in packages}
    found = {sha256: file for sha256, file in ((sha256, _place(cache, sha256)) for sha256 in wanted) if _is_good(file, sha256)}
    missing = [package for sha256, package in wanted.items() if sha256 not in found]
    for source in (mirrors, snapshot):
        if missing and source is not None:
            found |= _download(missing, source, cache, progress)
            missing = [package for package in missing if package.sha256 not in found]
    if missing:
        raise VanishedError(missing)
    return found


def to_fetch(packages: Iterable[Package], cache: Path) -> int:
    """Bytes that `fetch` would download."""
    wanted = {package.sha256: package.size for package in packages}
    return sum(size for sha256, size in wanted.items() if not _place(cache, sha256).is_file())


def snapshot_mirrors(lock: Lock, environ: Mapping[str, str] = os.environ) -> Mirrors | None:
    """Mirrors as of the lock's epoch from the pattern in SAMEPAGE_SNAPSHOT, or None.

    The pattern is an address with {archive} ("debian", "debian-security") and {timestamp} (20260131T235959Z) in it.
    """
    pattern = environ.get(SNAPSHOT_VARIABLE, "")
    if not pattern:
        return None
    timestamp = datetime.fromtimestamp(lock.epoch, UTC).strftime("%Y%m%dT%H%M%SZ")
    archives = {package.archive for packages in lock.sets.values() for package in packages}
    try:
        return {archive: pattern.format(archive=archive, timestamp=timestamp).rstrip("/") for archive in archives}
    except (KeyError, IndexError, ValueError) as error:
        raise ApplianceError(
            f"{SNAPSHOT_VARIABLE}={pattern!r} is not a usable pattern", hint="write it like https://HOST/archive/{archive}/{timestamp}"
        ) from error


def _download(packages: list[Package], mirrors: Mirrors, cache: Path, progress: Progress | None) -> dict[str, Path]:
    """Fetch what a source has into the cache; what it lacks is not in the result."""
    with TemporaryDirectory(dir=cache, prefix="fetch-") as name:
        folder = Path(name)
        words: list[str] = []
        for package in packages:
            words += [_uri(package, mirrors), str(folder / package.sha256), f"SHA256:{package.sha256}"]
        argv = [HELPER, "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download-file", *words]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, argv, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
            total = sum(package.size for package in packages)
            while not running.done():
                if progress is not None:
                    progress.update(sum(file.stat().st_size for file in _files(folder)), total, "bytes")
                time.sleep(0.1)
            done = running.result()
        found: dict[str, Path] = {}
        for package in packages:
            file = folder / package.sha256
            if not file.is_file():
                continue
            if not _is_good(file, package.sha256):
                raise _tampered([package])
            place = _place(cache, package.sha256)
            place.parent.mkdir(exist_ok=True)
            file.chmod(0o644)
            found[package.sha256] = file.replace(place)
    if done.returncode != 0:
        _judge(done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace"), packages, found)
    return found


def _judge(output: str, packages: list[Package], found: Mapping[str, Path]) -> None:
    """Tell the three failures apart by what apt says: other content, out of reach, or gone (which returns)."""
    missing = [package for package in packages if package.sha256 not in found]
    other = [package for package in missing if re.search(rf"(?s){re.escape(package.sha256)}[^\n]*\n\s*Hash Sum mismatch|{re.escape(_file_name(package))}\s+Hash Sum mismatch|{re.escape(_file_name(package))}[^\n]*unexpected size", output)]
    if other:
        raise _tampered(other)
    gone = re.search(r"\b(404|410)\b|File not found|No such file", output)
    if missing and not gone:
        tail = "\n".join("  | " + line for line in output.strip().splitlines()[-8:])
        raise CommandError(
            f"cannot fetch {len(missing)} of {len(packages)} packages\n{tail}",
            hint="the mirror may be out of reach, or name another one with --mirror; proxies come from the host's apt configuration",
        )


def _tampered(packages: list[Package]) -> ApplianceError:
    names = ", ".join(f"{package.name} {package.version}" for package in packages)
    return ApplianceError(
        f"the mirror's file differs from the lock: {names}",
        hint="do not use it: name another mirror with --mirror; if the lock is at fault, resolve anew with ./build.py lock --update",
    )


def _uri(package: Package, mirrors: Mirrors) -> str:
    # apt's file method hands out no copy
    base = re.sub(r"^file:", "copy:", mirrors[package.archive])
    return f"{base}/{quote(package.path, safe='/~+')}"


def _file_name(package: Package) -> str:
    return quote(package.path.rpartition("/")[2], safe="~+")


def _place(cache: Path, sha256: str) -> Path:
    return cache / sha256[:2] / f"{sha256}.deb"


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _is_good(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
