"""mkosi of Debian 13, in a root tree of its own, making a disk image of the same packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.apt import KEYRING, MAIN, SECURITY, Mirrors
from bench.debian import SUITE, mmdebstrap
from bench.measure import Cost, disk_size, measure, remove_tree, scratch

ENTER = Path(__file__).parent / "guest/enter.sh"
TOOLS = ("mkosi", "apt", "systemd-repart", "e2fsprogs", "dosfstools", "mtools", "cpio", "zstd", "kmod", "util-linux",
         "debian-archive-keyring")  # fmt: skip

CONFIGURATION = """\
[Distribution]
Distribution=debian
Release={suite}

[Output]
Format=disk
CompressOutput=no
OutputDirectory=/bench/out
ManifestFormat=

[Content]
Bootable=no
Packages={packages}
ExtraTrees=/bench/extra

[Build]
BuildSources=
Incremental=yes
CacheDirectory=/bench/cache
PackageCacheDirectory=/bench/packages
WorkspaceDirectory=/bench/space
SandboxTrees=/bench/sandbox
"""

SOURCES = """\
Types: deb
URIs: {main}
Suites: {suite} {suite}-updates
Components: main
Signed-By: {keyring}

Types: deb
URIs: {security}
Suites: {suite}-security
Components: main
Signed-By: {keyring}
"""


@dataclass(frozen=True, slots=True)
class Mkosi:
    """A work folder whose configuration names the packages; `tree` is the root that mkosi runs in."""

    tree: Path
    work: Path

    def build(self, log: Path) -> Cost:
        """One run of `mkosi --force build`; what it may reuse is what the runs before it left."""
        return measure(
            ["unshare", "--mount", "sh", ENTER, self.tree, self.work, "mkosi", "--force", "build"], log=log
        )

    def empty_caches(self) -> None:
        for name in ("cache", "packages", "space", "out"):
            remove_tree(self.work / name)
            (self.work / name).mkdir()

    def change_file(self, text: str) -> None:
        """Write the one file that comes from the configuration and not from a package."""
        (self.work / "extra/etc/bench.conf").write_text(text)

    def output_size(self) -> int:
        """Bytes on disk of the newest image."""
        return disk_size(self.work / "out/image.raw")


def tools_tree(cache: Path, mirrors: Mirrors) -> Path:
    """The root tree with mkosi, from the cache where it was built before. Needs root."""
    home = cache / "mkosi"
    if not home.is_dir():
        with scratch(cache, "mkosi") as work:
            mmdebstrap(TOOLS, work / "tree", mirrors, work / "mmdebstrap.log")
            work.rename(home)
    return home / "tree"


def prepare(packages: Sequence[str], work: Path, tree: Path, mirrors: Mirrors) -> Mkosi:
    """Write the configuration into the empty folder `work`."""
    folder = work / "sandbox/etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    text = SOURCES.format(main=mirrors[MAIN], security=mirrors[SECURITY], suite=SUITE, keyring=KEYRING)
    (folder / "mkosi.sources").write_text(text)
    (work / "mkosi.conf").write_text(CONFIGURATION.format(suite=SUITE, packages=",".join(packages)))
    (work / "extra/etc").mkdir(parents=True)
    mkosi = Mkosi(tree, work)
    mkosi.empty_caches()
    mkosi.change_file("first\n")
    return mkosi
