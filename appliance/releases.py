"""Finds the files of earlier releases: by version, by manifest, by the folder that holds them, in an ISO, in the cache.

An image that the cache still has is taken from there; the others are unpacked from the ISO beside the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycdlib
from pycdlib.pycdlibexception import PyCdlibException

from appliance.bundle import ReleaseFiles
from appliance.errors import ApplianceError, UnknownName, nearest
from appliance.model import ToolBox
from appliance.node import paths
from appliance.node.bundle import MANIFEST_LIMIT
from appliance.node.release import Manifest, ReleaseError, parse
from appliance.store import Store

_SUFFIX = ".manifest.json"


def find(wanted: str, dist: Path, tools: ToolBox, store: Store) -> ReleaseFiles:
    """The release that `wanted` names: an ISO, a manifest, a folder with one release, or a version built into `dist`.

    Raises UnknownName where there is none, ApplianceError where its files are gone or damaged.
    """
    path = Path(wanted)
    if path.is_dir():
        found = sorted(path.glob("*" + _SUFFIX))
        if len(found) != 1:
            names = ", ".join(one.name for one in found) or "none"
            raise UnknownName(
                f"{path} must hold the manifest of one release, it holds {names}", hint="name a file in it"
            )
        path = found[0]
    elif not path.is_file():
        known = {_version_of(one): one for one in dist.glob("*" + _SUFFIX)}
        if wanted not in known:
            hint = nearest(wanted, known, "build it with ./build.py iso, or name its ISO")
            raise UnknownName(f"no release {wanted} in {dist}", hint=hint)
        path = known[wanted]
    if path.suffix == ".iso":
        return _from_iso(path, _manifest_in(path), tools, store)
    content = path.read_bytes()
    iso = path.with_name(path.name.removesuffix(_SUFFIX) + ".iso")
    return _from_iso(iso, content, tools, store)


def find_all(wanted: str, goal: ReleaseFiles, dist: Path, tools: ToolBox, store: Store) -> list[ReleaseFiles]:
    """The releases that `wanted` names: of a folder all but `goal`, perhaps none; else the one that `find` finds."""
    path = Path(wanted)
    if not path.is_dir():
        return [find(wanted, dist, tools, store)]
    manifests = [one for one in sorted(path.glob("*" + _SUFFIX)) if one.read_bytes() != goal.content]
    return [find(str(one), dist, tools, store) for one in manifests]


def held(content: bytes, known: Mapping[str, Path], dist: Path, tools: ToolBox, store: Store) -> ReleaseFiles:
    """The release with this manifest, with those of its files that are at hand.

    They are taken from `known` (by digest), the cache, or an ISO in `dist` that has them. Raises ApplianceError where
    the manifest cannot be read.
    """
    try:
        manifest = parse(content)
    except ReleaseError as error:
        raise ApplianceError(f"a node's release: {error}", hint="start the node anew from an ISO of today") from error
    files = {}
    for one in _members(manifest):
        found = known.get(one.digest) or _cached(one, store) or _unpacked(one, dist, tools, store)
        if found is not None:
            files[one.digest] = found
    return ReleaseFiles(content, manifest, files)


def _unpacked(member: _Member, dist: Path, tools: ToolBox, store: Store) -> Path | None:
    """The file out of an ISO in `dist`; the manifests beside them tell which has it, so that no other is opened.

    None where there is none, or it is damaged.
    """
    inputs = {"digest": member.digest}
    if store.has("release-files", inputs):
        return store.place("release-files", inputs) / member.name
    for beside in sorted(dist.glob("*" + _SUFFIX)):
        iso = beside.with_name(beside.name.removesuffix(_SUFFIX) + ".iso")
        if not iso.is_file():
            continue
        with suppress(OSError, ReleaseError, ApplianceError):
            places = {one.digest: one for one in _members(parse(beside.read_bytes()))}
            if member.digest in places:
                build = _Unpack(iso, places[member.digest], tools)
                return store.step("release-files", inputs, build) / places[member.digest].name
    return None


def _version_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _from_iso(iso: Path, content: bytes, tools: ToolBox, store: Store) -> ReleaseFiles:
    try:
        manifest = parse(content)
    except ReleaseError as error:
        raise ApplianceError(f"{iso.stem}: {error}", hint="build the release again") from error
    files = {}
    for one in _members(manifest):
        files[one.digest] = (
            _cached(one, store)
            or store.step("release-files", {"digest": one.digest}, _Unpack(iso, one, tools)) / one.name
        )
    return ReleaseFiles(content, manifest, files)


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of a release: `place` is where it stands on the ISO, packed for layers."""

    kind: str
    digest: str
    name: str
    place: str


def _members(manifest: Manifest) -> Iterator[_Member]:
    root, kernel = paths.MEDIUM_ROOT, manifest.kernel
    for layer in manifest.layers:
        packed = f"/{root}/{paths.LAYERS}/{paths.packed_name(layer.kind, layer.digest)}"
        yield _Member(layer.kind, layer.digest, paths.image_name(layer.kind, layer.digest), packed)
    for name, file in (("vmlinuz", kernel.vmlinuz), ("initrd", kernel.initrd)):
        yield _Member("kernel", file.digest, name, f"/{root}/{paths.KERNELS}/{kernel.id}/{name}")


def _cached(member: _Member, store: Store) -> Path | None:
    steps = store.root / "steps"
    if member.kind != "kernel":
        return next(iter((steps / member.kind).glob(f"*/{member.name}")), None)
    for record in (steps / "initrd").glob("*/digests.json"):
        digests: dict[str, Any] = json.loads(record.read_text(encoding="ascii"))
        if digests.get(member.name) == member.digest:
            return record.with_name(member.name)
    return None


@dataclass(frozen=True, slots=True)
class _Unpack:
    """Takes a file out of an ISO into a folder of the store."""

    iso: Path
    member: _Member
    tools: ToolBox

    def __call__(self, folder: Path) -> None:
        target = folder / self.member.name
        if self.member.kind == "kernel":
            _take(self.iso, self.member.place, target)
        else:
            packed = folder / "packed"
            _take(self.iso, self.member.place, packed)
            self.tools.run("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", folder / "unpacked", packed)
            (folder / "unpacked" / self.member.name).rename(target)
            (folder / "unpacked").rmdir()
            packed.unlink()
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.member.digest:
                raise ApplianceError(f"{self.iso.name} is damaged: {self.member.place}", hint="take the ISO again")


def _take(iso: Path, place: str, target: Path) -> None:
    image = pycdlib.PyCdlib()
    try:
        image.open(str(iso))
        try:
            image.get_file_from_iso(str(target), rr_path=place)
        finally:
            image.close()
    except (PyCdlibException, OSError) as error:
        hint = "its images are not in the cache any more; give the release's ISO, which holds them"
        raise ApplianceError(f"cannot read {place} from {iso}: {error}", hint=hint) from error


def _manifest_in(iso: Path) -> bytes:
    """The manifest of the one release on an ISO."""
    image = pycdlib.PyCdlib()
    try:
        image.open(str(iso))
        try:
            place = f"/{paths.MEDIUM_ROOT}/{paths.RELEASES}"
            names = [
                one.rock_ridge.name().decode()
                for one in image.list_children(rr_path=place)
                if one.is_dir() and one.rock_ridge
            ]
            version = next(name for name in names if name not in ("", ".", ".."))
            with image.open_file_from_iso(rr_path=f"{place}/{version}/release.json") as file:
                return bytes(file.read(MANIFEST_LIMIT))
        finally:
            image.close()
    except (PyCdlibException, OSError, StopIteration) as error:
        raise ApplianceError(
            f"{iso} is no ISO of a release: {error}", hint="give an ISO that ./build.py iso wrote"
        ) from error
