"""The frozen types that pass between the stages. Paths inside the appliance are strings, paths on the host are Path."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

ARCHITECTURE = "amd64"

Exposure = Literal["public", "cluster", "local"]
StateClass = Literal["data", "cache", "identity"]
OnChange = Literal["reload", "restart", "none"]
ProbeKind = Literal["unit", "http", "tcp", "unix", "command"]
LayerKind = Literal["base", "app", "config"]


def frozen_map(values: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A read-only copy of a mapping."""
    return MappingProxyType(dict(values or {}))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands in the input: file relative to the project root, 1-based line, dotted key."""

    file: str
    line: int = 0
    key: str = ""


# --- recipes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class User:
    """A system user and the group of the same name and number. The number is fixed so that data survives upgrades."""

    name: str
    uid: int
    home: str
    groups: tuple[str, ...]
    place: Place
    group_only: bool = False  # a group without a user


@dataclass(frozen=True, slots=True)
class Port:
    name: str
    number: int
    protocol: Literal["tcp", "udp"]
    exposure: Exposure
    place: Place


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a recipe offers to others: a unix socket for the same node, a port for other nodes, or both."""

    name: str
    port: str
    socket: str
    place: Place


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit of the recipe and what a changed file of the recipe does to it."""

    name: str
    on_change: OnChange
    enable: bool
    own: bool  # the unit file stands in the recipe (not in a Debian package)
    place: Place
    wanted_by: str = ""  # the target that starts it; empty: by [Install] of an own unit, else by its kind
    watch: tuple[str, ...] = ()  # path prefixes whose change matters to it; empty: every file of the recipe
    hold: tuple[str, ...] = ()  # the front door: names of the signals that make clients wait, and that end it


@dataclass(frozen=True, slots=True)
class StateDir:
    path: str
    owner: str
    group: str
    mode: int
    kind: StateClass
    place: Place


@dataclass(frozen=True, slots=True)
class Probe:
    """One health probe. `target` is the unit name, URL, host:port, socket path or command line, by `kind`."""

    name: str
    kind: ProbeKind
    target: str
    expect: str  # http: status or "status text"; others: empty
    timeout: float  # seconds
    place: Place


@dataclass(frozen=True, slots=True)
class Memory:
    """Weight of the recipe in the node's memory and the least it works with, in MiB."""

    weight: int
    minimum: int


@dataclass(frozen=True, slots=True)
class Wheel:
    """A Python wheel that Debian does not have: requirement `name==version` and the sha256 of the file."""

    requirement: str
    sha256: str
    place: Place


@dataclass(frozen=True, slots=True)
class Source:
    """A file or link of the recipe's folder and the absolute path it gets in the appliance."""

    target: str
    path: Path
    template: bool
    executable: bool
    link: str  # what a symbolic link points to; empty for a file
    place: Place
    group: str = ""  # the `include` it came with, ending in '/'; empty for others


@dataclass(frozen=True, slots=True)
class Ownership:
    """An exception from root:root and 0644/0755; a path ending in '/' is a folder."""

    path: str
    owner: str
    group: str
    mode: int | None  # None: as usual
    place: Place


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    folder: Path
    packages: tuple[str, ...]
    wheels: tuple[Wheel, ...]
    users: tuple[User, ...]
    ports: tuple[Port, ...]
    provides: tuple[Endpoint, ...]
    needs: tuple[str, ...]
    units: tuple[Unit, ...]
    mask: tuple[str, ...]  # units of Debian packages that must not run
    state: tuple[StateDir, ...]
    memory: Memory
    health: tuple[Probe, ...]
    modules: tuple[str, ...]  # kernel modules or folders of them that the recipe needs
    settings: Mapping[str, Any]  # defaults; the layout may override them
    schema_level: int  # level of the recipe's database migrations, 0 for none
    place: Place
    sources: tuple[Source, ...] = ()  # sorted by target
    ownership: tuple[Ownership, ...] = ()
    places: Mapping[str, Place] = field(default_factory=frozen_map)  # of "needs.<endpoint>" and "mask.<unit>"
    readable: bool = True  # false: recipe.yaml could not be read and the rest is empty
    build: str = ""  # executable in the recipe's folder, run in the root file system once all packages are in it
    exclude: tuple[str, ...] = ()  # absolute globs of files of the packages that the base layer leaves out
    omit: tuple[str, ...] = ()  # Debian packages that others depend on and nothing here loads


# --- layout --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    """An endpoint as seen from one node. `socket` is empty when the provider runs on another node."""

    name: str
    host: str
    port: int
    socket: str
    provider: str
    local: bool


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    address: str  # empty: by DHCP
    memory: int  # MiB
    recipes: tuple[Recipe, ...]  # in layout order
    endpoints: Mapping[str, Resolved]
    shares: Mapping[str, int]  # MiB per recipe name
    settings: Mapping[str, Mapping[str, Any]]  # per recipe name
    prefix: int = 24  # length of the network part of `address`


@dataclass(frozen=True, slots=True)
class Model:
    """A validated layout: nothing is built from anything else."""

    name: str
    version: str
    nodes: tuple[Node, ...]
    recipes: tuple[Recipe, ...]  # every recipe used on any node, sorted by name
    file: Path
    summary: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=frozen_map)  # per recipe name, overrides applied

    @property
    def project(self) -> Path:
        """The root of the tree of recipes."""
        return self.file.parents[2]


# --- render --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file, link (`link` not empty) or, with path ending in '/', folder; `path` is absolute in the appliance."""

    path: str
    content: bytes
    mode: int
    uid: int
    gid: int
    recipe: str
    source: str  # the template or file it came from, relative to the project root
    link: str = ""


@dataclass(frozen=True, slots=True)
class RenderedTree:
    """What one node's config layer (/etc) and the app layer (/opt/samepage) hold, sorted by path."""

    node: str
    config: tuple[RenderedFile, ...]
    app: tuple[RenderedFile, ...]


# --- lock ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    architecture: str
    archive: str  # "debian" or "debian-security": which archive the pool path is relative to
    path: str  # pool path
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """Which packages, exactly; `epoch` (seconds) is the newest archive date, the clock of every build from it."""

    suite: str
    epoch: int
    wanted: Mapping[str, tuple[str, ...]]  # per set, the names that were asked for
    sets: Mapping[str, tuple[Package, ...]]  # "core" (base recipe), "full" (core and the rest), "tools"


# --- layers and releases -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """An immutable EROFS image; `image` and `packed` (the squashfs around it) lie in the cache."""

    kind: LayerKind
    node: str  # config layers only
    digest: str  # sha256 of the image, hex
    size: int
    image: Path
    packed: Path
    packed_digest: str


@dataclass(frozen=True, slots=True)
class Kernel:
    version: str
    vmlinuz: Path
    initrd: Path
    vmlinuz_digest: str
    initrd_digest: str
    cmdline: str

    @property
    def id(self) -> str:
        """Folder name under kernels/: changes whenever either file does."""
        return f"{self.version}-{self.vmlinuz_digest[:8]}{self.initrd_digest[:8]}"


@dataclass(frozen=True, slots=True)
class Release:
    version: str
    layout: str
    architecture: str
    epoch: int
    schema_level: int
    layers: tuple[Layer, ...]
    kernel: Kernel
    packages: tuple[Package, ...]
    manifest: bytes = field(repr=False)  # canonical JSON, the file release.json


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished file in the output folder."""

    path: Path
    sha256: str
    size: int


# --- programs ------------------------------------------------------------------------------------------------------


class ToolBox(Protocol):
    """Programs of the tools root: `root` is its folder; `env` is added to their environment."""

    @property
    def root(self) -> Path: ...

    @property
    def environment(self) -> dict[str, str]: ...

    def command(self, program: str, *arguments: str | Path) -> list[str]: ...

    def run(
        self, program: str, *arguments: str | Path, env: Mapping[str, str] | None = None, input: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]: ...
