"""The record of a release: the manifest `release.json`, the `layers` file and GRUB's boot record.

The manifest is canonical JSON (sorted keys, two spaces, one line end) without the time or place of its build, so the
same release has the same bytes everywhere:

    {"format": 1, "version": "1.2.0", "layout": "private-cloud", "architecture": "amd64", "epoch": 1763800000,
     "schema_level": 3,
     "layers": [{"kind": "base", "node": "", "digest": "<sha256>", "size": 600000000}, ...],
     "kernel": {"id": "...", "version": "6.12...", "cmdline": "...",
                "files": {"vmlinuz": {"digest": "<sha256>", "size": 12000000}, "initrd": {...}}},
     "packages": [{"name": "adduser", "version": "3.1", "architecture": "all"}, ...]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FORMAT = 1
KINDS = ("base", "app", "config")

_WORD = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]*\Z")  # safe as a file name, in the shell and in GRUB
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_NUMBER_LIMIT = 1 << 50
_CMDLINE = re.compile(r"[\w=.,:/@+ -]*\Z", re.ASCII)


class ReleaseError(ValueError):
    """A release's record is not what it should be; the message names the key."""


class File(NamedTuple):
    digest: str  # sha256, hex
    size: int  # bytes


class LayerRecord(NamedTuple):
    kind: str
    node: str  # config layers only
    digest: str
    size: int


class KernelRecord(NamedTuple):
    id: str
    version: str
    cmdline: str
    vmlinuz: File
    initrd: File


class PackageRecord(NamedTuple):
    name: str
    version: str
    architecture: str


class Manifest(NamedTuple):
    version: str
    layout: str
    architecture: str
    epoch: int
    schema_level: int
    layers: tuple[LayerRecord, ...]
    kernel: KernelRecord
    packages: tuple[PackageRecord, ...]

    def layers_of(self, node: str = "") -> tuple[LayerRecord, ...]:
        """The base, app and config layer of one node; the name may be left out where there is one node.

        Raises ReleaseError where a layer is missing or the node is not told.
        """
        chosen = []
        for kind in KINDS:
            found = [item for item in self.layers if item.kind == kind and (not node or item.node in ("", node))]
            if len(found) != 1:
                what = "no" if not found else "more than one"
                where = f" for node {node}" if node else ""
                raise ReleaseError(f"release {self.version} has {what} {kind} layer{where}")
            chosen.append(found[0])
        return tuple(chosen)


def dump(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    kernel = manifest.kernel
    value = {
        "format": FORMAT,
        "version": manifest.version,
        "layout": manifest.layout,
        "architecture": manifest.architecture,
        "epoch": manifest.epoch,
        "schema_level": manifest.schema_level,
        "layers": [
            {"kind": item.kind, "node": item.node, "digest": item.digest, "size": item.size} for item in manifest.layers
        ],
        "kernel": {
            "id": kernel.id,
            "version": kernel.version,
            "cmdline": kernel.cmdline,
            "files": {
                name: {"digest": file.digest, "size": file.size}
                for name, file in (("vmlinuz", kernel.vmlinuz), ("initrd", kernel.initrd))
            },
        },
        "packages": [
            {"name": item.name, "version": item.version, "architecture": item.architecture}
            for item in manifest.packages
        ],
    }
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True) + "\n").encode()


def parse(content: bytes) -> Manifest:
    """Read and check a manifest. Raises ReleaseError that names the first key that is wrong."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"the manifest is not JSON: {error}") from error
    top = _Reader("", value)
    if top.number("format") != FORMAT:
        raise ReleaseError(f"the manifest has format {top.number('format')}, this program reads format {FORMAT}")
    kernel = top.child("kernel")
    files = kernel.child("files")
    layers = tuple(
        LayerRecord(item.word("kind", choices=KINDS), item.text("node"), item.digest("digest"), item.number("size"))
        for item in top.items("layers")
    )
    manifest = Manifest(
        version=top.word("version"),
        layout=top.word("layout"),
        architecture=top.word("architecture"),
        epoch=top.number("epoch"),
        schema_level=top.number("schema_level"),
        layers=layers,
        kernel=KernelRecord(
            kernel.word("id"), kernel.word("version"), kernel.text("cmdline", _CMDLINE),
            *(File(file.digest("digest"), file.number("size")) for file in map(files.child, ("vmlinuz", "initrd"))),
        ),
        packages=tuple(
            PackageRecord(item.text("name"), item.text("version"), item.text("architecture"))
            for item in top.items("packages")
        ),
    )  # fmt: skip
    if not {"base", "app", "config"} <= {item.kind for item in layers}:
        raise ReleaseError("layers: base, app and config are all needed")
    return manifest


class _Reader(NamedTuple):
    """Typed access to one JSON object; errors name the whole key."""

    place: str
    value: Any

    def get(self, key: str, kind: type) -> Any:
        if not isinstance(self.value, dict):
            raise ReleaseError(f"{self.place or 'the manifest'}: expected an object")
        found = self.value.get(key)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ReleaseError(f"{self.place}{key}: expected {kind.__name__}, found {found!r:.60}")
        return found

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        found: str = self.get(key, str)
        if pattern is not None and not pattern.match(found):
            raise ReleaseError(f"{self.place}{key}: {found!r:.60} has characters that are not allowed here")
        return found

    def word(self, key: str, choices: Iterable[str] = ()) -> str:
        found = self.text(key, _WORD)
        if choices and found not in choices:
            raise ReleaseError(f"{self.place}{key}: {found!r:.60} is none of {', '.join(choices)}")
        return found

    def digest(self, key: str) -> str:
        return self.text(key, _DIGEST)

    def number(self, key: str) -> int:
        found: int = self.get(key, int)
        if not 0 <= found <= _NUMBER_LIMIT:
            raise ReleaseError(f"{self.place}{key}: {found} is negative, or larger than anything")
        return found

    def child(self, key: str) -> _Reader:
        return _Reader(f"{self.place}{key}.", self.get(key, dict))

    def items(self, key: str) -> list[_Reader]:
        return [_Reader(f"{self.place}{key}[{number}].", item) for number, item in enumerate(self.get(key, list))]


# --- the small files beside the manifest ---------------------------------------------------------------------------


def dump_layers(layers: Iterable[LayerRecord]) -> bytes:
    """The `layers` file, which a shell reads: a line "<kind> <digest>" per layer."""
    return "".join(f"{item.kind} {item.digest}\n" for item in layers).encode()


def parse_layers(content: bytes) -> Mapping[str, str]:
    """Digest by kind. Raises ReleaseError where a line is wrong or a kind is missing or named twice."""
    found: dict[str, str] = {}
    for line in content.decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) != 2 or words[0] not in KINDS or words[0] in found or not _DIGEST.match(words[1]):
            raise ReleaseError(f"layers: {line!r:.90} is not a new kind and its digest")
        found[words[0]] = words[1]
    if len(found) != len(KINDS):
        raise ReleaseError(f"layers: {', '.join(sorted(set(KINDS) - set(found)))} missing")
    return found


def boot_record(manifest: Manifest, data: int, name: str = "", more: str = "") -> bytes:
    """What GRUB reads to boot the release with data subvolume `data`: selected.cfg, previous.cfg or try.cfg.

    `name` is the release's folder where that is not its version; `more` is added to the kernel's command line.
    """
    kernel = manifest.kernel
    options = f"{kernel.cmdline} {more}".strip()
    values = {"release": name or manifest.version, "kernel": kernel.id, "data": str(data), "options": options}
    return "".join(f"set {name}='{value}'\n" for name, value in values.items()).encode()
