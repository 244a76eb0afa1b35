"""Keeps a channel: a static folder of bundles with a signed index, which any web server can serve."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from appliance.errors import ApplianceError, HostError
from appliance.iso import put_beside
from appliance.node.bundle import Info, read_info
from appliance.node.channel import INDEX_NAME, BundleEntry, Index, ReleaseEntry, dump_index, parse_index
from appliance.node.keys import Signer, Trust
from appliance.node.refusals import Refusal
from appliance.node.versions import order

LIFETIME = 14 * 86400  # seconds


def add(
    folder: Path, bundles: Iterable[Path], signer: Signer, now: int, *, keep: int = 0, lifetime: int = LIFETIME,
    revoked: Iterable[str] = (),
) -> Index:  # fmt: skip
    """Copy bundles into the channel and write its index anew; without bundles the index is only renewed.

    `keep`: the newest releases that stay, 0 for all; bundles that lead to others are removed. `now` and `lifetime` are
    in seconds. A reader never sees an index whose bundles are not all there. Raises ApplianceError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trust = Trust({signer.id: signer.public})
    old = _read(folder, trust)
    entries = {(one.start, one.to): one for one in (old.bundles if old else ())}
    releases = {one.manifest: one for one in (old.releases if old else ())}
    known = (old.layout, old.architecture) if old else None
    for path in bundles:
        info = _look(path, trust)
        if known and known != (info.layout, info.architecture):
            raise ApplianceError(
                f"{path.name} is for {info.layout} on {info.architecture}, the channel for {' on '.join(known)}",
                hint="keep a channel per layout",
            )
        known = info.layout, info.architecture
        entry = BundleEntry(path.name, info.from_manifest, info.manifest, *_copy(path, folder))
        entries[entry.start, entry.to] = entry
        releases[info.manifest] = ReleaseEntry(info.version, info.manifest)
    if known is None:
        raise ApplianceError(f"{folder} is no channel yet", hint="add a first bundle with ./build.py channel add")
    kept = sorted(releases.values(), key=lambda one: order(one.version))[-keep:]
    manifests = {one.manifest for one in kept}
    index = Index(
        counter=old.counter + 1 if old else 1, created=now, expires=now + lifetime,
        layout=known[0], architecture=known[1],
        releases=tuple(kept), bundles=tuple(one for one in entries.values() if one.to in manifests),
        revoked=(old.revoked if old else frozenset()) | frozenset(revoked),
    )  # fmt: skip
    put_beside(folder / INDEX_NAME, dump_index(index, signer))
    named = {one.file for one in index.bundles}
    for stale in folder.glob("*.bundle"):  # after the index that does not name them any more
        if stale.name not in named:
            stale.unlink()
    return index


def _read(folder: Path, trust: Trust) -> Index | None:
    try:
        return parse_index((folder / INDEX_NAME).read_bytes(), trust)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        raise ApplianceError(f"{folder / INDEX_NAME}: {refusal.message}", hint=refusal.hint) from refusal


def _look(path: Path, trust: Trust) -> Info:
    try:
        return read_info(str(path), trust)
    except Refusal as refusal:
        raise ApplianceError(f"{path}: {refusal.message}", hint=refusal.hint) from refusal


def _copy(path: Path, folder: Path) -> tuple[int, str]:
    """Puts a bundle into the folder, whole or not at all; its size and sha256."""
    target = folder / path.name
    if not (target.exists() and target.samefile(path)):
        partial = folder / f".{path.name}.partial"
        try:
            with suppress(OSError):
                os.link(path, partial)
            if not partial.exists():
                shutil.copyfile(path, partial)
            partial.chmod(0o644)
            partial.replace(target)
        except OSError as error:
            raise HostError(
                f"cannot write {target}: {error.strerror}", hint="look at its permissions and room"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    with target.open("rb") as file:
        return target.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
