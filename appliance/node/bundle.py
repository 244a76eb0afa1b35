"""A bundle: one signed file that turns a release into another, or nothing into a release. Part of the node's own code.

It is a signed document (see signed.py) with the magic below, followed by the parts that its header lists, and nothing
else. The header:

    {"from": {"version": "1.0", "manifest": "<sha256>"} or null, for a bundle that needs no release,
     "to": {"version": "1.1", "layout": "private-cloud", "architecture": "amd64", "manifest": "<sha256>"},
     "payload": {"size": 12345, "sha256": "<sha256 of everything behind the header>"},
     "parts": [{"kind": "manifest", "node": "", "packed": 200, "size": 30000, "digest": "<sha256>",
                "sources": ["<sha256>"]}, ...],
     "summary": {...}, for people; nothing is decided by it}

A part is a delta (see delta.py) that makes one file, of `size` bytes and with the sha256 `digest`, from the files with
the digests `sources`: files of the old release, or of parts before it. The kinds are the layers' (base, app, config),
the kernel's files (vmlinuz, initrd), and `manifest`, the new release.json, which is always the first part. A file that
both releases have is not in the bundle.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from appliance.node.delta import DeltaError, Slice, apply
from appliance.node.keys import Signer, Trust
from appliance.node.refusals import (
    Damaged,
    Downgrade,
    TrailingBytes,
    Truncated,
    WrongArchitecture,
    WrongBase,
    WrongLayout,
)
from appliance.node.release import KINDS, Manifest, ReleaseError, parse
from appliance.node.signed import FRONT_SIZE, header_size, seal, unseal
from appliance.node.versions import order

MAGIC = b"\x89SPGBNDL"
MANIFEST = "manifest"
KERNEL_FILES = ("vmlinuz", "initrd")
PART_KINDS = (MANIFEST, *KINDS, *KERNEL_FILES)
MANIFEST_LIMIT = 16 << 20  # bytes
PARTS_LIMIT = 10_000
_WHAT = "bundle"
_PIECE = 1 << 18
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_WORD = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,127}\Z")
_SIZE_LIMIT = 1 << 50

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes there are."""


class Part(NamedTuple):
    """One file that the bundle makes: see the module's text. `packed` is its size in the bundle."""

    kind: str
    node: str
    packed: int
    size: int
    digest: str
    sources: tuple[str, ...]


class Info(NamedTuple):
    """What a bundle's header says. `from_version` and `from_manifest` are empty in a full bundle."""

    from_version: str
    from_manifest: str
    version: str
    layout: str
    architecture: str
    manifest: str
    payload: int
    payload_digest: str
    parts: tuple[Part, ...]
    summary: Mapping[str, Any] = MappingProxyType({})

    @property
    def full(self) -> bool:
        return not self.from_manifest

    @property
    def makes(self) -> int:
        """Bytes of all the files it makes: the room it needs at most."""
        return sum(part.size for part in self.parts)

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self._asdict(), "parts": [part._asdict() for part in self.parts]}

    def parts_for(self, node: str) -> tuple[Part, ...]:
        """The parts of one node: config layers of the others are left out."""
        return tuple(part for part in self.parts if part.node in ("", node))


class Bundle(NamedTuple):
    """An open bundle whose signature and payload are checked."""

    info: Info
    payload: Slice

    def manifest(self, old: bytes | None) -> bytes:
        """The new release's manifest; `old` is that of the release the bundle starts from.

        Raises Damaged where the manifest does not fit what the bundle says.
        """
        part = self.info.parts[0]
        if not part.sources:
            return self._manifest(part, [])
        with _memory(old or b"") as source:
            return self._manifest(part, [source])

    def _manifest(self, part: Part, sources: Sequence[Slice]) -> bytes:
        out = io.BytesIO()
        self._write(part, sources, out, None)
        content = out.getvalue()
        check_manifest(self.info, content)
        return content

    def extract(
        self, part: Part, source: Callable[[str], str], out: IO[bytes], progress: Progress | None = None
    ) -> None:
        """Write the file of a part. `source` names the path of the file with a digest.

        Raises Damaged where the result is not what it should be, and OSError; `out` is worthless then.
        """
        descriptors: list[int] = []
        try:
            for digest in part.sources:
                descriptors.append(os.open(source(digest), os.O_RDONLY | os.O_CLOEXEC))
            runs = [Slice(one, 0, os.fstat(one).st_size) for one in descriptors]
            self._write(part, runs, out, progress)
        finally:
            for one in descriptors:
                os.close(one)

    def _write(self, part: Part, sources: Sequence[Slice], out: IO[bytes], progress: Progress | None) -> None:
        begin = 0
        for other in self.info.parts:
            if other is part:
                break
            begin += other.packed
        told = (lambda done: progress(done, part.size)) if progress else None
        try:
            apply(self.payload.part(begin, part.packed), sources, out, part.size, part.digest, told)
        except DeltaError as error:
            where = f"{part.kind} {part.node}".strip()
            raise Damaged(f"the {where} of release {self.info.version} cannot be made: {error}") from error


@contextmanager
def _memory(content: bytes) -> Iterator[Slice]:
    descriptor = os.memfd_create("manifest", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield Slice(descriptor, 0, len(content))
    finally:
        os.close(descriptor)


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_bundle(path: str, trust: Trust, progress: Progress | None = None) -> Iterator[Bundle]:
    """A bundle, once its signature and every byte behind it are found good. Raises a Refusal, or OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = Slice(descriptor, 0, os.fstat(descriptor).st_size)
        info, begin = _read_info(whole, trust)
        if begin + info.payload > whole.size:
            raise Truncated(f"the bundle has {whole.size} bytes of {begin + info.payload}")
        if begin + info.payload < whole.size:
            raise TrailingBytes(f"{whole.size - begin - info.payload} bytes follow the end of the bundle")
        payload = whole.part(begin, info.payload)
        digest = hashlib.sha256()
        for at in range(0, info.payload, _PIECE):
            digest.update(payload.read_at(at, min(_PIECE, info.payload - at)))
            if progress:
                progress(min(info.payload, at + _PIECE), info.payload)
        if digest.hexdigest() != info.payload_digest:
            raise Damaged("the content of the bundle is not what was signed")
        yield Bundle(info, payload)
    except DeltaError as error:
        raise Truncated(f"the bundle changed while it was read: {error}") from error
    finally:
        os.close(descriptor)


def read_info(path: str, trust: Trust) -> Info:
    """What a bundle's signed header says; the rest is not looked at. Raises a Refusal, or OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_info(Slice(descriptor, 0, os.fstat(descriptor).st_size), trust)[0]
    finally:
        os.close(descriptor)


def _read_info(whole: Slice, trust: Trust) -> tuple[Info, int]:
    front = whole.read_at(0, min(FRONT_SIZE, whole.size))
    size = header_size(front, MAGIC, _WHAT)
    header = whole.read_at(FRONT_SIZE, min(size, whole.size - FRONT_SIZE))
    return parse_info(unseal(front, header, trust, _WHAT)), FRONT_SIZE + size


def parse_info(value: Mapping[str, Any]) -> Info:
    """The header of a bundle from its JSON. Raises Damaged that names the key which is wrong."""
    start = value.get("from")
    if start is not None and not isinstance(start, dict):
        raise Damaged("the bundle's header: from is no object")
    to, payload = _object(value, "to"), _object(value, "payload")
    listed = value.get("parts")
    if not isinstance(listed, list) or not 1 <= len(listed) <= PARTS_LIMIT:
        raise Damaged("the bundle's header: parts is no list of parts")
    parts = tuple(_part(one) for one in listed)
    info = Info(
        from_version=_text(start, "version", _WORD) if start else "",
        from_manifest=_text(start, "manifest", _DIGEST) if start else "",
        version=_text(to, "version", _WORD),
        layout=_text(to, "layout", _WORD),
        architecture=_text(to, "architecture", _WORD),
        manifest=_text(to, "manifest", _DIGEST),
        payload=_number(payload, "size"),
        payload_digest=_text(payload, "sha256", _DIGEST),
        parts=parts,
        summary=_object(value, "summary"),
    )
    if sum(part.packed for part in parts) != info.payload:
        raise Damaged("the bundle's header: the parts do not fill the payload")
    first = parts[0]
    if first.kind != MANIFEST or first.digest != info.manifest or any(part.kind == MANIFEST for part in parts[1:]):
        raise Damaged("the bundle's header: the first part is not the manifest")
    if first.size > MANIFEST_LIMIT or first.sources != ((info.from_manifest,) if info.from_manifest else ()):
        raise Damaged("the bundle's header: the manifest's part is wrong")
    return info


def _part(value: Any) -> Part:
    if not isinstance(value, dict):
        raise Damaged("the bundle's header: a part is no object")
    sources = value.get("sources")
    if not isinstance(sources, list) or len(sources) > 64:
        raise Damaged("the bundle's header: the sources of a part are no list")
    kind, node = value.get("kind"), value.get("node")
    if kind not in PART_KINDS or not isinstance(node, str) or len(node) > 255 or (node and kind != "config"):
        raise Damaged("the bundle's header: a part is of an unknown kind")
    return Part(
        kind=str(kind),
        node=node,
        packed=_number(value, "packed"),
        size=_number(value, "size"),
        digest=_text(value, "digest", _DIGEST),
        sources=tuple(_text({"sources": one}, "sources", _DIGEST) for one in sources),
    )


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise Damaged(f"the bundle's header: {key} is no object")
    return found


def _text(value: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not pattern.match(found):
        raise Damaged(f"the bundle's header: {key} is not what it should be")
    return found


def _number(value: Mapping[str, Any], key: str) -> int:
    found = value.get(key)
    if type(found) is not int or not 0 <= found <= _SIZE_LIMIT:
        raise Damaged(f"the bundle's header: {key} is no size")
    return found


# --- does it fit? ----------------------------------------------------------------------------------------------------


def check_fit(info: Info, current: Manifest, held: Mapping[str, str], *, allow_downgrade: bool = False) -> None:
    """Refuse a bundle that is not for this node: raises WrongLayout, WrongArchitecture, WrongBase or Downgrade.

    `held`: version by the sha256 of the manifest, of every release whose files the node still has.
    """
    if info.architecture != current.architecture:
        raise WrongArchitecture(f"the bundle is for {info.architecture}, this node is {current.architecture}")
    if info.layout != current.layout:
        raise WrongLayout(f"the bundle is for the layout {info.layout}, this node has the layout {current.layout}")
    if info.from_manifest and info.from_manifest not in held:
        same = " (another build of that version is here)" if info.from_version in held.values() else ""
        raise WrongBase(f"the bundle starts from release {info.from_version}, which this node does not have{same}")
    if not allow_downgrade and order(info.version) < order(current.version):
        raise Downgrade(f"the bundle leads to release {info.version}, older than {current.version} that runs here")


def check_manifest(info: Info, content: bytes) -> Manifest:
    """The new manifest, once it agrees with the bundle's header. Raises Damaged."""
    try:
        manifest = parse(content)
    except (ReleaseError, RecursionError) as error:
        raise Damaged(f"the bundle's manifest cannot be used: {error}") from error
    if (manifest.version, manifest.layout, manifest.architecture) != (info.version, info.layout, info.architecture):
        raise Damaged("the bundle's manifest is of another release than the bundle says")
    wanted = files_of(manifest)
    for part in info.parts[1:]:
        if wanted.get(part.digest) != part.size:
            raise Damaged(f"the bundle makes a {part.kind} that release {info.version} does not have")
    return manifest


def files_of(manifest: Manifest) -> dict[str, int]:
    """Size by digest of every file of a release, the kernel's included."""
    kernel = manifest.kernel
    files = {layer.digest: layer.size for layer in manifest.layers}
    return files | {file.digest: file.size for file in (kernel.vmlinuz, kernel.initrd)}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_bundle(info: Info, payloads: Sequence[bytes], signer: Signer, out: IO[bytes]) -> None:
    """Write a bundle of the parts' deltas. `payload` and `payload_digest` of `info` are worked out here."""
    digest = hashlib.sha256()
    for payload in payloads:
        digest.update(payload)
    start = {"version": info.from_version, "manifest": info.from_manifest} if info.from_manifest else None
    header = {
        "from": start,
        "to": {
            "version": info.version, "layout": info.layout, "architecture": info.architecture,
            "manifest": info.manifest,
        },
        "payload": {"size": sum(map(len, payloads)), "sha256": digest.hexdigest()},
        "parts": [
            {
                "kind": part.kind, "node": part.node, "packed": len(payload), "size": part.size, "digest": part.digest,
                "sources": list(part.sources),
            }
            for part, payload in zip(info.parts, payloads, strict=True)
        ],
        "summary": dict(info.summary),
    }  # fmt: skip
    out.write(seal(MAGIC, header, signer))
    for payload in payloads:
        out.write(payload)
