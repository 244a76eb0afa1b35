"""The lock: exactly which packages a build is made of.

`recipes/packages.lock` is JSON with one line per package, so that a review shows what moved. It names no host:
`archive` and `path` are joined with whatever mirror the builder's host uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from appliance.apt import KEYRING, Mirrors, private_apt, update
from appliance.errors import LockError
from appliance.model import ARCHITECTURE, Lock, Model, Package, frozen_map

SUITE = "trixie"
SETS = ("core", "full", "tools")
OMITTED = "omitted"  # in `wanted`: packages that dependencies name and that are left out
OMITTED_VERSION = "999:0~omitted"  # newer than what any dependency asks for
CORE_RECIPE = "base"

TOOLS = (
    "erofs-utils",
    "squashfs-tools",
    "btrfs-progs",
    "dosfstools",
    "mtools",
    "fdisk",
    "grub-common",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "python3.13-minimal",
    "libpython3.13-stdlib",
)
"""What the tools root is made of: programs whose version decides the bytes that come out."""

_FORMAT = 1
_RELOCK = "run ./build.py lock, which resolves what the recipes ask for"


# --- what is wanted --------------------------------------------------------------------------------------------------


def wanted(model: Model) -> Mapping[str, tuple[str, ...]]:
    """Per set, the package names that the recipes of the layout ask for; under "omitted", those they leave out."""
    core = {name for recipe in model.recipes if recipe.name == CORE_RECIPE for name in recipe.packages}
    full = {name for recipe in model.recipes for name in recipe.packages}
    omitted = {name for recipe in model.recipes for name in recipe.omit}
    sets = {"core": core, "full": full, "tools": set(TOOLS), OMITTED: omitted}
    return frozen_map({name: tuple(sorted(names)) for name, names in sets.items()})


def check(lock: Lock, model: Model) -> None:
    """Raise LockError when the lock is for another suite or other packages than the model wants; names them."""
    if lock.suite != SUITE:
        raise LockError(f"the lock is for Debian {lock.suite}, not {SUITE}", hint=_RELOCK)
    asked = wanted(model)
    differences = []
    for name in (*SETS, OMITTED):
        missing = sorted(set(asked[name]) - set(lock.wanted.get(name, ())))
        left = sorted(set(lock.wanted.get(name, ())) - set(asked[name]))
        differences += [f"{package} is not in the lock's set {name}" for package in missing]
        differences += [f"{package} is in the lock's set {name}, but no recipe asks for it" for package in left]
    if differences:
        raise LockError("the lock does not fit the recipes:\n  " + "\n  ".join(differences), hint=_RELOCK)


# --- resolving -------------------------------------------------------------------------------------------------------


def resolve(
    wanted: Mapping[str, tuple[str, ...]],
    mirrors: Mirrors,
    *,
    suite: str = SUITE,
    keyring: Path | None = KEYRING,
    cache: Path | None = None,
    prefer: str = "",
) -> Lock:
    """Resolve the wanted names against the archive as it is now; `cache` keeps its lists for the next time.

    `prefer` names a suite whose versions are taken before newer ones of the others, such as a release without its
    security updates.

    Raises CommandError when the archive is out of reach or its signature is wrong, LockError when a name is unknown.
    """
    with private_apt(suite, mirrors, keyring=keyring, cache=cache) as apt:
        apt.pretend(omitted_stanza(name) for name in wanted.get(OMITTED, ()))
        update(apt)
        dates = [
            line.partition(":")[2].strip()
            for text in apt.release_files()
            for line in text.splitlines()
            if line.startswith("Date:")
        ]
        known = set(apt.call("apt-cache", "pkgnames", "--generate").split())
        unknown = sorted({name for names in wanted.values() for name in names} - known)
        if unknown:
            raise LockError(
                f"Debian {suite} has no package named {', '.join(unknown)}",
                hint="correct the name in the recipe's packages",
            )

        def closure(names: Iterable[str]) -> tuple[Package, ...]:
            options = ["--print-uris", "--yes", "--quiet=2", *(["--target-release", prefer] if prefer else [])]
            lines = apt.call("apt-get", "install", *options, *names).splitlines()
            return tuple(
                sorted(
                    (_parse_uri(line, mirrors) for line in lines if line.startswith("'")),
                    key=lambda package: package.name,
                )
            )

        with ThreadPoolExecutor(1) as pool:
            tools = pool.submit(closure, wanted["tools"])
            core = closure(["?essential", *wanted["core"]])
            # naming the core's packages makes it a part of the full set whatever alternatives apt would rather take
            full = closure(["?essential", *(package.name for package in core), *wanted["full"]])
    epoch = max(int(parsedate_to_datetime(date).timestamp()) for date in dates)
    sets = {"core": core, "full": full, "tools": tools.result()}
    return Lock(suite, epoch, frozen_map(dict(wanted)), frozen_map(sets))


def omitted_stanza(name: str) -> str:
    """What dpkg's status says of a package that is left out: apt and dpkg take its dependants for satisfied."""
    return (
        f"Package: {name}\nStatus: install ok installed\nPriority: optional\nSection: misc\n"
        f"Maintainer: nobody <nobody@localhost>\nArchitecture: {ARCHITECTURE}\nMulti-Arch: same\n"
        f"Version: {OMITTED_VERSION}\nDescription: left out, nothing in the appliance loads it\n"
    )


def _parse_uri(line: str, mirrors: Mirrors) -> Package:
    """One line of `apt-get --print-uris`: 'URI' name_version_arch.deb size SHA256:digest"""
    quoted, file, size, digest = line.split()
    uri = quoted.strip("'")
    # the longest match: one archive's address may begin with the other's
    archive = max(
        (name for name, base in mirrors.items() if uri.startswith(base + "/")), key=lambda name: len(mirrors[name])
    )
    name, version, architecture = unquote(file).removesuffix(".deb").split("_")
    kind, _, sha256 = digest.partition(":")
    if kind != "SHA256":
        raise LockError(f"the archive states no SHA256 for {name}", hint="name another mirror with --mirror")
    return Package(name, version, architecture, archive, unquote(uri[len(mirrors[archive]) + 1 :]), int(size), sha256)


# --- the file --------------------------------------------------------------------------------------------------------


def format_lock(lock: Lock) -> str:
    """The lock file's text; the same lock gives the same text."""
    sets_of: dict[Package, list[str]] = {}
    for name in SETS:
        for package in lock.sets[name]:
            sets_of.setdefault(package, []).append(name)
    lines = ",\n".join(
        "    "
        + json.dumps(
            {
                "name": package.name,
                "version": package.version,
                "architecture": package.architecture,
                "archive": package.archive,
                "path": package.path,
                "size": package.size,
                "sha256": package.sha256,
                "sets": sets_of[package],
            }
        )
        for package in sorted(sets_of, key=lambda package: (package.name, package.version))
    )
    wanted = ",\n".join(f"    {json.dumps(name)}: {json.dumps(lock.wanted.get(name, ()))}" for name in (*SETS, OMITTED))
    return (
        f'{{\n  "format": {_FORMAT},\n  "suite": {json.dumps(lock.suite)},\n  "epoch": {lock.epoch},\n'
        f'  "wanted": {{\n{wanted}\n  }},\n  "packages": [\n{lines}\n  ]\n}}\n'
    )


def write_lock(lock: Lock, file: Path) -> None:
    """Write the lock file; the old one stays whole until the new one is."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(format_lock(lock))
    partial.replace(file)


def read_lock(file: Path) -> Lock:
    """Read a lock file. Raises LockError, with the line, when it is missing, damaged or of another format."""
    try:
        text = file.read_text()
    except FileNotFoundError as error:
        raise LockError(f"there is no lock file {file}", hint=_RELOCK) from error
    except (OSError, UnicodeDecodeError) as error:
        raise LockError(f"cannot read the lock file {file}: {error}", hint=_RELOCK) from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise LockError(f"{file}:{error.lineno}: not JSON: {error.msg}", hint=_MEND) from error
    try:
        if data["format"] != _FORMAT:
            raise LockError(
                f"{file}: format {data['format']!r} is unknown, this builder writes format {_FORMAT}", hint=_RELOCK
            )
        packages = [(_read_package(entry), tuple(entry["sets"])) for entry in data["packages"]]
        sets = {name: tuple(package for package, within in packages if name in within) for name in SETS}
        wanted = {name: tuple(data["wanted"][name]) for name in SETS} | {
            OMITTED: tuple(data["wanted"].get(OMITTED, ()))
        }
        return Lock(str(data["suite"]), int(data["epoch"]), frozen_map(wanted), frozen_map(sets))
    except KeyError as error:
        raise LockError(f"{file}: the key {error} is missing", hint=_MEND) from error
    except (TypeError, ValueError) as error:
        raise LockError(f"{file}: {error}", hint=_MEND) from error


_MEND = "take the file from version control again, or resolve anew with ./build.py lock --update"


def _read_package(entry: Mapping[str, Any]) -> Package:
    package = Package(
        str(entry["name"]),
        str(entry["version"]),
        str(entry["architecture"]),
        str(entry["archive"]),
        str(entry["path"]),
        int(entry["size"]),
        str(entry["sha256"]),
    )
    if package.architecture not in (ARCHITECTURE, "all"):
        raise ValueError(f"{package.name} is for {package.architecture}, not {ARCHITECTURE}")
    if len(package.sha256) != 64 or set(package.sha256) - set("0123456789abcdef"):
        raise ValueError(f"the sha256 of {package.name} is not 64 hex digits")
    if package.path.startswith("/") or ".." in package.path.split("/"):
        raise ValueError(f"the path of {package.name} leaves the archive")
    return package


# --- what moved ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """One package that differs between two locks; an empty version means that it is not there."""

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        if not self.old:
            return f"{self.name} {self.new} (new)"
        return f"{self.name} {self.old} (gone)" if not self.new else f"{self.name} {self.old} -> {self.new}"


def moves(old: Lock | None, new: Lock) -> tuple[Move, ...]:
    """What moved from one lock to another, sorted by name; against no lock, everything is new."""
    before = {package.name: package.version for name in SETS for package in (old.sets[name] if old else ())}
    after = {package.name: package.version for name in SETS for package in new.sets[name]}
    return tuple(
        Move(name, before.get(name, ""), after.get(name, ""))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )
