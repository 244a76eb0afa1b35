"""Packages: fetched by apt's own downloader, each checked against the lock, kept by content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
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
RETRIES = 3  # with growing pauses


class VanishedError(LockError):
    """The archive no longer has versions that the lock names."""

    def __init__(self, packages: Iterable[Package]) -> None:
        self.packages = tuple(packages)
        names = "\n  ".join(f"{package.name} {package.version}" for package in self.packages)
        super().__init__(
            f"the archive no longer has what the lock names:\n  {names}",
            hint=f"name a snapshot service with {SNAPSHOT_VARIABLE}, or take today's with ./build.py lock --update",
        )


def fetch(
    packages: Iterable[Package],
    mirrors: Mirrors,
    cache: Path,
    progress: Progress | None = None,
    *,
    snapshot: Mirrors | None = None,
) -> Mapping[str, Path]:
    """The packages' files by sha256, fetched where `cache` lacks them, each file's content checked.

    `snapshot` (see `snapshot_mirrors`) is asked for what the mirrors no longer have. Raises VanishedError when neither
    has a version, CommandError when a mirror is out of reach, ApplianceError when it hands out other content.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {package.sha256: package for package in packages}
    found = {
        sha256: file
        for sha256, file in ((sha256, _place(cache, sha256)) for sha256 in wanted)
        if _is_good(file, sha256)
    }
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
            f"{SNAPSHOT_VARIABLE}={pattern!r} is not a usable pattern",
            hint="write it like https://HOST/archive/{archive}/{timestamp}",
        ) from error


def _download(packages: list[Package], mirrors: Mirrors, cache: Path, progress: Progress | None) -> dict[str, Path]:
    """Fetch what a source has into the cache; what it no longer has is not in the result."""
    uris = {_uri(package, mirrors): package for package in packages}
    with TemporaryDirectory(dir=cache, prefix="fetch-") as name:
        folder = Path(name)
        words = [word for uri, package in uris.items() for word in (uri, str(folder / package.sha256), _hash(package))]
        argv = [HELPER, "-o", "APT::Sandbox::User=root", "-o", f"Acquire::Retries={RETRIES}", "download-file", *words]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, argv, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
            while not running.done():
                if progress is not None:
                    progress.update(_bytes_in(folder), sum(package.size for package in packages), "bytes")
                wait([running], timeout=0.1)
            done = running.result()
        # apt renames a file with another content
        other = [package for package in packages if (folder / f"{package.sha256}.FAILED").exists()]
        found: dict[str, Path] = {}
        for package in packages:
            file = folder / package.sha256
            if _is_good(file, package.sha256):
                place = _place(cache, package.sha256)
                place.parent.mkdir(exist_ok=True)
                file.chmod(0o644)
                found[package.sha256] = file.replace(place)
            elif file.exists():
                other.append(package)
    if other:
        raise _tampered(other)
    _check_reachable(uris, found, done.stderr.decode(errors="replace"))
    return found


_GONE = re.compile(r"\b(404|410)\b|No such file or directory")


def _check_reachable(uris: Mapping[str, Package], found: Mapping[str, Path], messages: str) -> None:
    """Raise CommandError unless the source said of every missing package that it does not have it."""
    missing = [uri for uri, package in uris.items() if package.sha256 not in found]
    reasons = dict(re.findall(r"^E: Failed to fetch (\S+)\s+(.*)$", messages, re.MULTILINE))
    failed = [uri for uri in missing if not _GONE.search(reasons.get(uri, ""))]
    if failed:
        lines = [f"{uri}: {reasons.get(uri, 'no answer')}" for uri in failed[:5]]
        raise CommandError(
            f"cannot fetch {len(failed)} of {len(uris)} packages:\n  " + "\n  ".join(lines),
            hint="name another mirror with --mirror; proxies and credentials come from the host's apt configuration",
        )


def _hash(package: Package) -> str:
    return f"SHA256:{package.sha256}"


def _bytes_in(folder: Path) -> int:
    """Bytes fetched so far; files are renamed while we look."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _tampered(packages: list[Package]) -> ApplianceError:
    names = ", ".join(f"{package.name} {package.version}" for package in packages)
    return ApplianceError(
        f"the mirror's file differs from the lock: {names}",
        hint="name another mirror with --mirror; only if the lock is at fault, use ./build.py lock --update",
    )


def _uri(package: Package, mirrors: Mirrors) -> str:
    # apt's file method hands out no copy
    base = re.sub(r"^file:", "copy:", mirrors[package.archive])
    return f"{base}/{quote(package.path, safe='/~+')}"


def _place(cache: Path, sha256: str) -> Path:
    return cache / sha256[:2] / f"{sha256}.deb"


def _is_good(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
