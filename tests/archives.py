"""A small Debian archive on disk, for the tests of the lock and of fetching."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

DATE = "Sat, 31 Jan 2026 12:00:00 UTC"
EPOCH = 1769860800  # the same in seconds


def make_deb(
    folder: Path,
    name: str,
    version: str = "1.0",
    fields: Sequence[str] = (),
    content: str = "",
    archive: str = "debian",
) -> Path:
    """A package with one file, built by dpkg-deb; returns its path in the pool."""
    tree = folder / "work" / f"{name}_{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    control = [f"Package: {name}", f"Version: {version}", "Architecture: all", "Maintainer: T <t@example.invalid>"]
    (tree / "DEBIAN/control").write_text("\n".join([*control, *fields, "Description: test"]) + "\n")
    (tree / f"usr/share/{name}").mkdir(parents=True)
    (tree / f"usr/share/{name}/content").write_text(content or f"{name} {version}\n")
    place = folder / archive / "pool/main" / name[0] / name / f"{name}_{version.replace(':', '%3a')}_all.deb"
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, place], check=True, capture_output=True)
    return place


def publish(folder: Path, suite: str = "trixie") -> dict[str, str]:
    """Write the lists of all packages in the pools of both archives, and a suite without any; returns the mirrors."""
    for archive, name, full in (
        ("debian", suite, True), ("debian", f"{suite}-updates", False), ("debian-security", f"{suite}-security", True),
    ):  # fmt: skip
        lists = folder / archive / "dists" / name / "main/binary-amd64"
        lists.mkdir(parents=True, exist_ok=True)
        index = "\n".join(map(_stanza, sorted((folder / archive).glob("pool/**/*.deb")))) if full else ""
        (lists / "Packages").write_text(index)
        digest, size = hashlib.sha256(index.encode()).hexdigest(), len(index.encode())
        (folder / archive / "dists" / name / "Release").write_text(
            f"Origin: Debian\nSuite: {name}\nCodename: {name}\nDate: {DATE}\nArchitectures: amd64\nComponents: main\n"
            f"SHA256:\n {digest} {size} main/binary-amd64/Packages\n"
        )
    return {name: f"file:{folder / name}" for name in ("debian", "debian-security")}


def _stanza(deb: Path) -> str:
    control = subprocess.run(["dpkg-deb", "--field", deb], check=True, capture_output=True, text=True).stdout
    content = deb.read_bytes()
    path = "pool" + str(deb).split("/pool", 1)[1]
    return f"{control}Filename: {path}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
