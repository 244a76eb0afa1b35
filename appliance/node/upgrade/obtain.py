"""From a bundle's path, address or a channel to a staged release. Part of the node's own code."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from appliance.node import channel
from appliance.node.bundle import check_fit, open_bundle, read_info
from appliance.node.keys import PUBLIC, KeyFileError, Trust, key_id, load_trust, parse_key
from appliance.node.plan import classify
from appliance.node.refusals import Damaged, NoRoom, NoWay
from appliance.node.release import Manifest, parse
from appliance.node.upgrade import fetch, mounts
from appliance.node.upgrade.node import COUNTER, INCOMING, KEY_CREDENTIAL, KEY_FOLDERS, Node, NotUpgradable
from appliance.node.upgrade.records import Held, read_small
from appliance.node.upgrade.retention import MARGIN, need
from appliance.node.upgrade.staging import free, stage, wanted_files

Report = Callable[[str, int, int], None]


class Chain(NamedTuple):
    """Bundles, in order, that lead to a release; `goal` is the sha256 of its manifest, `keys` are trusted for it."""

    files: tuple[str, ...]
    goal: str
    keys: Trust


def trust() -> Trust:
    """The keys that this node trusts: the release's, the site's, and the one given as a credential.

    Raises NotUpgradable that names a key file which cannot be read.
    """
    keys: dict[str, bytes] = {}
    revoked: frozenset[str] = frozenset()
    try:
        for folder in KEY_FOLDERS:
            if os.path.isdir(folder):
                found = load_trust(folder)
                keys |= found.keys
                revoked |= found.revoked
        for line in (read_small(KEY_CREDENTIAL, 1 << 16) or b"").splitlines():
            if line.strip():
                public = parse_key(line, PUBLIC)
                keys[key_id(public)] = public
    except KeyFileError as error:
        raise NotUpgradable(f"a trusted key cannot be read: {error}", hint="correct or remove it") from error
    return Trust(keys, revoked)


def held_manifests(node: Node) -> dict[str, str]:
    """Version by digest of every release here, the running one first."""
    first = {node.running.digest: node.running.manifest.version}
    return first | {one.digest: one.manifest.version for one in node.held.values()}


def newest(node: Node, keys: Trust) -> channel.Index:
    """The index of the node's channel. Raises a Refusal or FetchError."""
    url = node.settings.channel
    if not url:
        raise NoWay("no channel is set", hint="name a bundle, or set node-tools' setting `channel` in the layout")
    manifest = node.running.manifest
    os.makedirs(os.path.dirname(COUNTER), exist_ok=True)
    index = fetch.fetch_index(url, keys, COUNTER, manifest.layout, manifest.architecture, time.time())
    fetch.remember(COUNTER, index)
    return index


def chain(node: Node, source: str, keys: Trust, report: Report, *, allow_downgrade: bool) -> Chain:
    """Fetch what leads to the release that `source` names, or to the channel's newest one.

    Raises a Refusal, FetchError or OSError.
    """
    if source:
        path = local(node, source, report)
        return Chain((path,), read_info(path, keys).manifest, keys)
    index = newest(node, keys)
    held = list(held_manifests(node))
    entries = channel.plan(index, node.running.manifest.version, held, allow_downgrade=allow_downgrade)
    files = [os.path.join(INCOMING, entry.file) for entry in entries]
    os.makedirs(INCOMING, exist_ok=True)
    if entries:
        have = sum(_size(file, file + fetch.PARTIAL) for file in files)
        need([sum(entry.size for entry in entries) - have], free(node.root))
    for entry, target in zip(entries, files, strict=True):
        url = fetch.bundle_url(node.settings.channel, entry)
        fetch.fetch(url, target, size=entry.size, sha256=entry.sha256, progress=_to(report, "fetch"))
    return Chain(tuple(files), index.newest.manifest, keys.revoking(index.revoked))


def _to(report: Report, state: str) -> Callable[[int, int], None]:
    return lambda done, total: report(state, done, total)


def _size(*paths: str) -> int:
    """Bytes of the first of the files that is here."""
    for path in paths:
        with suppress(OSError):
            return os.stat(path).st_size
    return 0


def local(node: Node, source: str, report: Report) -> str:
    """A bundle's path, once it is fetched where `source` is an address. Raises a Refusal, FetchError or OSError."""
    if "://" not in source:
        return source
    os.makedirs(INCOMING, exist_ok=True)
    target = os.path.join(INCOMING, hashlib.sha256(source.encode()).hexdigest()[:16] + ".bundle")
    room = free(node.root) + _size(target + fetch.PARTIAL) - MARGIN
    try:
        fetch.fetch(source, target, limit=max(0, min(room, fetch.LIMIT)), progress=_to(report, "fetch"))
    except fetch.TooLarge as error:
        if room >= fetch.LIMIT:
            raise
        raise NoRoom(f"{error.message}: more is not free") from error
    return target


def stage_all(node: Node, wanted: Chain, report: Report, *, allow_downgrade: bool) -> Held | None:
    """Stage the releases of a chain, one from the other; the last one, or None where it runs already.

    Without bundles it is one that the node has. Raises a Refusal, or OSError.
    """
    held = dict(node.held)
    made = None if wanted.files else _whole(node, next(one for one in held.values() if one.digest == wanted.goal))
    for file in wanted.files:
        with open_bundle(file, wanted.keys, _to(report, "verify")) as bundle:
            versions = {one.digest: one.manifest.version for one in held.values()}
            check_fit(bundle.info, node.running.manifest, versions, allow_downgrade=allow_downgrade)
            if bundle.info.manifest == node.running.digest:
                continue
            if any(part.kind == "base" for part in bundle.info.parts):
                mounts.forget_old_root()  # now, and not while clients wait
            made = stage(node.root, bundle, node.name, held, _to(report, "stage")).release
            held[made.id] = made
    return made


def _whole(node: Node, one: Held) -> Held | None:
    """A release that is here with all its files; None where it runs. Raises Damaged."""
    files = wanted_files(node.root, one.manifest, node.name).values()
    if lost := [file.path for file in files if not os.path.exists(file.path)]:
        raise Damaged(f"release {one.id} is on this node, but not its {lost[0]}", hint="take a bundle that leads to it")
    return one if one.id != node.running.id else None


def describe(node: Node, wanted: Chain, report: Report, *, allow_downgrade: bool) -> dict[str, Any]:
    """What a chain would do, from its bundles alone; nothing is written."""
    old: Manifest = node.running.manifest
    versions, contents = held_manifests(node), dict[str, bytes]()
    parts: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    new = next((one.manifest for one in node.held.values() if one.digest == wanted.goal), old)
    for file in wanted.files:
        with open_bundle(file, wanted.keys, _to(report, "verify")) as bundle:
            info = bundle.info
            check_fit(info, old, versions, allow_downgrade=allow_downgrade)
            before = next((one for one in node.held.values() if one.digest == info.from_manifest), None)
            contents[info.manifest] = bundle.manifest(
                node.manifest_bytes(before) if before is not None else contents.get(info.from_manifest)
            )
            new = parse(contents[info.manifest])
            versions[info.manifest] = info.version
            parts += [
                {"kind": part.kind, "packed": part.packed, "size": part.size} for part in info.parts_for(node.name)
            ]
            summary = dict(info.summary)
    return {
        "status": 0, "outcome": "planned", "reason": "", "message": "", "hint": "", "from": node.running.id,
        "to": new.version, "class": classify(old, new, node.name), "parts": parts,
        "units": {unit: what for unit, what in summary.get("units", {}).get(node.name, {}).items() if what != "none"},
        "packages": summary.get("packages", {}), "migrations": summary.get("migrations", []),
    }  # fmt: skip
