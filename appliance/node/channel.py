"""A channel: a static folder with a signed index of bundles, on any web server. Part of the node's own code.

The index is a signed document (see signed.py) named INDEX_NAME:

    {"counter": 17, "created": 1763800000, "expires": 1764400000, "layout": "private-cloud", "architecture": "amd64",
     "releases": [{"version": "1.1", "manifest": "<sha256>"}, ...], oldest first,
     "bundles": [{"file": "samepage-1.0-to-1.1.bundle", "from": "<manifest's sha256>" or "", "to": "<sha256>",
                  "size": 12345, "sha256": "<sha256 of the file>"}, ...],
     "revoked": ["<key id>", ...]}

The counter grows with every index, and a node remembers the greatest it has seen, so that an old index served again is
refused. Times are seconds since 1970.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from appliance.node.keys import ID, Signer, Trust
from appliance.node.refusals import (
    ClockOff,
    Damaged,
    Downgrade,
    Expired,
    NoWay,
    Replayed,
    TrailingBytes,
    WrongArchitecture,
    WrongLayout,
)  # fmt: skip
from appliance.node.signed import FRONT_SIZE, header_size, seal, unseal
from appliance.node.versions import order

MAGIC = b"\x89SPGCHNL"
INDEX_NAME = "channel.index"
INDEX_LIMIT = 2 << 20  # bytes a node reads at most
CLOCK_SLACK = 3600  # seconds by which the clocks of the channel's maker and of a node may differ
_WHAT = "channel index"
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_WORD = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,254}\Z")
_LIST_LIMIT = 20_000
_NUMBER_LIMIT = 1 << 50


class ReleaseEntry(NamedTuple):
    version: str
    manifest: str


class BundleEntry(NamedTuple):
    """`start` and `to` are digests of manifests; `start` is empty for a full bundle."""

    file: str
    start: str
    to: str
    size: int
    sha256: str


class Index(NamedTuple):
    counter: int
    created: int
    expires: int
    layout: str
    architecture: str
    releases: tuple[ReleaseEntry, ...]  # oldest first
    bundles: tuple[BundleEntry, ...]
    revoked: frozenset[str] = frozenset()

    @property
    def newest(self) -> ReleaseEntry:
        return max(self.releases, key=lambda one: order(one.version))


def dump_index(index: Index, signer: Signer) -> bytes:
    """The signed bytes of an index."""
    value = {
        "counter": index.counter, "created": index.created, "expires": index.expires, "layout": index.layout,
        "architecture": index.architecture,
        "releases": [{"version": one.version, "manifest": one.manifest} for one in index.releases],
        "bundles": [
            {"file": one.file, "from": one.start, "to": one.to, "size": one.size, "sha256": one.sha256}
            for one in index.bundles
        ],
        "revoked": sorted(index.revoked),
    }  # fmt: skip
    return seal(MAGIC, value, signer)


def parse_index(content: bytes, trust: Trust) -> Index:
    """The index, once its signature is checked; its own revocations count for its own key too. Raises a Refusal."""
    size = header_size(content[:FRONT_SIZE], MAGIC, _WHAT)
    value = unseal(content[:FRONT_SIZE], content[FRONT_SIZE : FRONT_SIZE + size], trust, _WHAT)
    if len(content) > FRONT_SIZE + size:
        raise TrailingBytes(f"{len(content) - FRONT_SIZE - size} bytes follow the end of the channel index")
    releases = tuple(
        ReleaseEntry(_text(one, "version", _WORD), _text(one, "manifest", _DIGEST)) for one in _list(value, "releases")
    )
    bundles = tuple(
        BundleEntry(
            _text(one, "file", _WORD),
            _text(one, "from", _DIGEST) if one.get("from") != "" else "",
            _text(one, "to", _DIGEST),
            _number(one, "size"),
            _text(one, "sha256", _DIGEST),
        )
        for one in _list(value, "bundles")
    )
    revoked = value.get("revoked")
    if not isinstance(revoked, list) or len(revoked) > _LIST_LIMIT:
        raise Damaged("the channel index: revoked is no list")
    if not releases:
        raise Damaged("the channel index has no release")
    return Index(
        counter=_number(value, "counter"), created=_number(value, "created"), expires=_number(value, "expires"),
        layout=_text(value, "layout", _WORD), architecture=_text(value, "architecture", _WORD),
        releases=releases, bundles=bundles,
        revoked=frozenset(_text({"revoked": one}, "revoked", ID) for one in revoked),
    )  # fmt: skip


def check_index(index: Index, now: float, seen: int, layout: str, architecture: str) -> None:
    """Refuse an index that is not for this node and this hour. `seen` is the greatest counter the node has seen.

    Raises WrongLayout, WrongArchitecture, Replayed, ClockOff or Expired.
    """
    if index.layout != layout:
        raise WrongLayout(f"the channel is for the layout {index.layout}, this node has the layout {layout}")
    if index.architecture != architecture:
        raise WrongArchitecture(f"the channel is for {index.architecture}, this node is {architecture}")
    if index.counter < seen:
        raise Replayed(f"the channel index is no. {index.counter}, but no. {seen} was seen before")
    if now < index.created - CLOCK_SLACK:
        raise ClockOff(f"by this node's clock the channel index is made {index.created - now:.0f} seconds from now")
    if now > index.expires:
        raise Expired(f"the channel index expired {now - index.expires:.0f} seconds ago")


def plan(index: Index, version: str, held: Sequence[str], *, allow_downgrade: bool = False) -> tuple[BundleEntry, ...]:
    """The bundles, in order, that lead to the newest release with the fewest bytes; none when the node has it already.

    `version` runs on the node; `held` are the digests of the manifests of all releases whose files it has, the running
    one first. Raises Downgrade where the newest release is older than `version`, NoWay where no bundles lead there.
    """
    goal = index.newest
    running = held[0] if held else ""
    if goal.manifest == running:
        return ()
    if order(goal.version) < order(version) and not allow_downgrade:
        raise Downgrade(f"the newest release of the channel is {goal.version}, older than {version} that runs here")
    if goal.manifest in held:
        return ()
    best: dict[str, int] = dict.fromkeys(held, 0) | {"": 0}
    came: dict[str, BundleEntry] = {}
    waiting = [(0, start) for start in best]
    heapq.heapify(waiting)
    by_start: dict[str, list[BundleEntry]] = {}
    for bundle in index.bundles:
        by_start.setdefault(bundle.start, []).append(bundle)
    while waiting:
        cost, at = heapq.heappop(waiting)
        if cost > best[at]:
            continue
        for bundle in by_start.get(at, ()):
            total = cost + bundle.size
            if total < best.get(bundle.to, total + 1):
                best[bundle.to], came[bundle.to] = total, bundle
                heapq.heappush(waiting, (total, bundle.to))
    if goal.manifest not in came:
        raise NoWay(f"the channel has no bundles that lead from release {version} to {goal.version}")
    chain: list[BundleEntry] = []
    at = goal.manifest
    while at in came:
        chain.append(came[at])
        at = came[at].start
    return tuple(reversed(chain))


# --- the counter -----------------------------------------------------------------------------------------------------


def read_seen(path: str) -> int:
    """The greatest counter seen, 0 where none was. Raises Damaged for a file that is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(64)
    except FileNotFoundError:
        return 0
    if not text.strip().isdigit():
        raise Damaged(f"{path} holds no number", hint="remove it, if you trust the channel's server just now")
    return int(text)


def write_seen(path: str, counter: int) -> None:
    """Remember a counter so that neither a crash nor a power cut loses it."""
    partial = path + ".partial"
    with open(partial, "wb") as file:
        file.write(b"%d\n" % counter)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- reading ---------------------------------------------------------------------------------------------------------


def _list(value: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = value.get(key)
    if not isinstance(found, list) or len(found) > _LIST_LIMIT or not all(isinstance(one, dict) for one in found):
        raise Damaged(f"the channel index: {key} is no list")
    return found


def _text(value: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not pattern.match(found):
        raise Damaged(f"the channel index: {key} is not what it should be")
    return found


def _number(value: Mapping[str, Any], key: str) -> int:
    found = value.get(key)
    if type(found) is not int or not 0 <= found <= _NUMBER_LIMIT:
        raise Damaged(f"the channel index: {key} is no number")
    return found
