"""Makes bundles: the signed files that turn one release into another. The format is in appliance.node.bundle."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from appliance import delta, erofs
from appliance.console import Progress
from appliance.errors import ApplianceError
from appliance.model import Artifact, Release
from appliance.node import bundle as format_
from appliance.node.bundle import Info, Part
from appliance.node.keys import Signer
from appliance.node.plan import classify, touched_units
from appliance.node.release import LayerRecord, Manifest, ReleaseError, parse
from appliance.treemap import changed_paths, file_of

APP_ROOT = "/opt/samepage"
NODE_FILE = "/etc/samepage/node.json"


@dataclass(frozen=True, slots=True)
class ReleaseFiles:
    """A release's manifest and where its files lie on this host, by digest.

    An old release may lack files: what would be made from them is then sent whole.
    """

    content: bytes
    manifest: Manifest
    files: Mapping[str, Path]

    @property
    def digest(self) -> str:
        return sha256(self.content).hexdigest()


def files_of(release: Release) -> ReleaseFiles:
    """The files of a release that was just built."""
    kernel = release.kernel
    files = {layer.digest: layer.image for layer in release.layers}
    files |= {kernel.vmlinuz_digest: kernel.vmlinuz, kernel.initrd_digest: kernel.initrd}
    return ReleaseFiles(release.manifest, parse(release.manifest), files)


def file_name(old: ReleaseFiles | None, new: ReleaseFiles) -> str:
    start = old.manifest.version if old else "any"
    return f"samepage-{start}-to-{new.manifest.version}.bundle"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file to be made: its part without the size in the bundle, and its sources' places."""

    kind: str
    node: str
    digest: str
    size: int
    sources: tuple[str, ...]


def make(
    old: ReleaseFiles | None, new: ReleaseFiles, signer: Signer, out: Path, *, progress: Progress | None = None
) -> Artifact:
    """Write the bundle that leads from `old`, or from nothing, to `new`. It appears whole or not at all.

    Raises ApplianceError where the releases are of different layouts or architectures, or a file cannot be read.
    """
    if old and (old.manifest.layout, old.manifest.architecture) != (new.manifest.layout, new.manifest.architecture):
        raise ApplianceError(
            f"release {old.manifest.version} is of the layout {old.manifest.layout} for {old.manifest.architecture}, "
            f"release {new.manifest.version} of {new.manifest.layout} for {new.manifest.architecture}",
            hint="bundles lead from a release to another of the same layout",
        )
    wanted = list(_wanted(old, new))
    total = sum(one.size for one in wanted)
    known = {**(old.files if old else {}), **new.files}
    parts = [Part(format_.MANIFEST, "", 0, len(new.content), new.digest, (old.digest,) if old else ())]
    payloads = [delta.make_small(new.content, old.content if old else None)]
    done = 0
    for one in wanted:
        sources = tuple(source for source in one.sources if source in known)
        payloads.append(delta.make(known[one.digest], [known[source] for source in sources]))
        parts.append(Part(one.kind, one.node, len(payloads[-1]), one.size, one.digest, sources))
        done += one.size
        if progress:
            progress.update(done, total, "bytes")
    info = Info(
        from_version=old.manifest.version if old else "",
        from_manifest=old.digest if old else "",
        version=new.manifest.version,
        layout=new.manifest.layout,
        architecture=new.manifest.architecture,
        manifest=new.digest,
        payload=0,
        payload_digest="",
        parts=tuple(parts),
        summary=summarise(old, new) if old else {"class": "reboot"},
    )
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("wb") as file:
            format_.write_bundle(info, payloads, signer, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    with out.open("rb") as file:
        digest = sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return Artifact(out, digest.hexdigest(), out.stat().st_size)


def _wanted(old: ReleaseFiles | None, new: ReleaseFiles) -> Iterator[_Wanted]:
    """What the new release has and the old one lacks, in the order in which it is made."""
    has = format_.files_of(old.manifest) if old else {}
    seen: set[str] = set()
    base = next(layer.digest for layer in new.manifest.layers if layer.kind == "base")
    for layer in new.manifest.layers:
        if layer.digest not in has and layer.digest not in seen:
            seen.add(layer.digest)
            yield _Wanted(layer.kind, layer.node, layer.digest, layer.size, _like(old, layer))
    kernel, before = new.manifest.kernel, old.manifest.kernel if old else None
    sources: tuple[str, ...]
    if kernel.vmlinuz.digest not in has:
        sources = (before.vmlinuz.digest,) if before else ()
        yield _Wanted("vmlinuz", "", kernel.vmlinuz.digest, kernel.vmlinuz.size, sources)
    if kernel.initrd.digest not in has:
        sources = (*([before.initrd.digest] if before else []), base)
        yield _Wanted("initrd", "", kernel.initrd.digest, kernel.initrd.size, sources)


def _like(old: ReleaseFiles | None, layer: LayerRecord) -> tuple[str, ...]:
    """The old layer of the same kind and node; for a new node any config layer."""
    same = [one for one in (old.manifest.layers if old else ()) if one.kind == layer.kind]
    exact = [one for one in same if one.node == layer.node]
    return tuple(one.digest for one in (exact or same)[:1])


# --- the summary -----------------------------------------------------------------------------------------------------


def summarise(old: ReleaseFiles, new: ReleaseFiles) -> dict[str, Any]:
    """What the upgrade changes, for people: class, packages, units by node, schema levels, names of new migrations.

    Empty parts are left out.
    """
    nodes = sorted({layer.node for layer in new.manifest.layers if layer.kind == "config"})
    known = {layer.node for layer in old.manifest.layers if layer.kind == "config"}
    order = ("nothing", "live", "soft-reboot", "reboot")
    classes = [classify(old.manifest, new.manifest, node) for node in nodes if node in known]
    versions = [{package.name: package.version for package in one.manifest.packages} for one in (old, new)]
    packages = {
        name: [versions[0].get(name, ""), versions[1].get(name, "")]
        for name in sorted(versions[0].keys() | versions[1].keys())
        if versions[0].get(name) != versions[1].get(name)
    }
    units = {node: touched for node in nodes if node in known and (touched := _units(old, new, node))}
    levels = [old.manifest.schema_level, new.manifest.schema_level]
    found = {
        "packages": packages,
        "units": units,
        "migrations": levels if levels[0] != levels[1] else [],
        "migration_files": _new_migrations(old, new),
    }
    return {"class": max(classes, key=order.index, default="reboot")} | {
        key: value for key, value in found.items() if value
    }


def _units(old: ReleaseFiles, new: ReleaseFiles, node: str) -> dict[str, str]:
    """What happens to the units of one node because files of its config and app layers differ."""
    try:
        layers = [
            {layer.kind: one.files[layer.digest] for layer in one.manifest.layers_of(node) if layer.kind != "base"}
            for one in (old, new)
        ]
    except (ReleaseError, KeyError):  # another node, or a file that is not at hand
        return {}
    before, after = layers
    changed = changed_paths(before["config"], after["config"], "") | changed_paths(
        before["app"], after["app"], APP_ROOT
    )
    records = [json.loads(file_of(one["config"], NODE_FILE) or b"{}") for one in layers]
    return dict(touched_units(records[0], records[1], changed))


def _new_migrations(old: ReleaseFiles, new: ReleaseFiles) -> list[str]:
    """Names of the files in folders called `migrations` of the app layer that only the new release has."""
    images = []
    for one in (old, new):
        digest = next(layer.digest for layer in one.manifest.layers if layer.kind == "app")
        images.append(one.files.get(digest))
    before, after = images
    if before is None or after is None or before == after:
        return []
    paths = [
        {file.path for file in erofs.parse(image.read_bytes()).files if stat.S_ISREG(file.mode)}
        for image in (before, after)
    ]
    fresh = (path.split("/") for path in paths[1] - paths[0])
    return sorted(words[-1] for words in fresh if words[-2] == "migrations")


EFFECTS = {
    "nothing": "the node's files stay as they are",
    "live": "only the units named below are touched",
    "soft-reboot": "all of userspace starts anew, the kernel runs on",
    "reboot": "the machine starts anew",
}


def describe(info: Info, size: int) -> str:
    """A bundle of `size` bytes in words, for `bundle show`."""
    start = f"release {info.from_version}" if info.from_version else "any release"
    depth = info.summary.get("class", "unknown")
    lines = [
        f"{start} -> release {info.version}  ({info.layout}, {info.architecture})",
        f"bundle: {size:,} bytes; it makes {info.makes:,} bytes",
        f"class: {depth}" + (f": {EFFECTS[depth]}" if depth in EFFECTS else ""),
        "parts:",
    ]
    for part in info.parts:
        name = f"{part.kind} {part.node}".strip()
        lines.append(f"  {name:<20} {part.packed:>12,} of {part.size:>13,} bytes")
    if same := unchanged(info):
        lines.append(f"  unchanged: {', '.join(same)}")
    lines += _listed("packages", [f"{name} {_move(*move)}" for name, move in _pairs(info.summary, "packages")])
    for node, units in _pairs(info.summary, "units"):
        touched = [f"{action:<8} {name}" for name, action in units.items() if action != "none"]
        lines += _listed(f"units of {node}", touched)
    levels: Sequence[int] = info.summary.get("migrations", ())
    names = info.summary.get("migration_files", [])
    if levels or names:
        lines.append("migrations:" + (f" schema level {levels[0]} -> {levels[1]}" if levels else ""))
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def unchanged(info: Info) -> list[str]:
    """Kinds of files of which the bundle makes none, since both releases have the same."""
    kinds = {part.kind for part in info.parts}
    return [kind for kind in format_.PART_KINDS if kind not in kinds]


def _pairs(summary: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    return sorted(summary.get(key, {}).items())


def _move(old: str, new: str) -> str:
    if old and new:
        return f"{old} -> {new}"
    return f"{new} (new)" if new else f"{old} (gone)"


def _listed(title: str, lines: list[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []
