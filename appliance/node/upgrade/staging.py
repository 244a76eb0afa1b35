"""From a bundle to the new release's files on the state partition. Part of the node's own code.

A file gets its name only once its digest is right, so whatever has a name is whole; a run that was broken off leaves
files named `.partial`, and the next one goes on with the files that are finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, NamedTuple

from appliance.node.bundle import Bundle, Part, check_manifest
from appliance.node.refusals import Damaged, WrongNode
from appliance.node.release import Manifest, ReleaseError
from appliance.node.upgrade import records
from appliance.node.upgrade.records import PARTIAL, Held
from appliance.node.upgrade.retention import need

_FICLONE = 0x40049409  # ioctl of linux/fs.h: the target shares the source's blocks
_PIECE = 1 << 20
Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes there are."""


class Staged(NamedTuple):
    """A release whose files are all on the state partition."""

    release: Held
    made: int  # bytes written for it


class _File(NamedTuple):
    path: str
    size: int


def stage(root: str, bundle: Bundle, node: str, held: Mapping[str, Held], progress: Progress) -> Staged:
    """Make the bundle's release. `node` is this node's name. Raises a Refusal, or OSError.

    The bundle was checked (`check_fit`) before.
    """
    info = bundle.info
    content = bundle.manifest(_manifest_of(root, held, info.from_manifest))
    manifest = check_manifest(info, content)
    try:
        wanted = wanted_files(root, manifest, node)
    except ReleaseError as error:
        raise WrongNode(f"release {manifest.version} has no layers for the node {node}") from error
    known = files_by_digest(root, held)
    missing = {digest: file for digest, file in wanted.items() if not _is_there(file)}
    parts = {part.digest: part for part in info.parts_for(node) if part.digest in missing}
    lacking = [digest for digest in missing if digest not in parts and digest not in known]
    if lacking:
        raise Damaged(
            f"release {manifest.version} needs a file that neither the bundle nor this node has: {lacking[0]}",
            hint="take a full bundle",
        )
    need((file.size for file in missing.values()), free(root))
    total, done = sum(file.size for file in missing.values()), 0

    def told(now: int, _all: int) -> None:
        progress(done + now, total)

    for part in info.parts:  # in this order: later ones may be made from earlier ones
        if part.digest in parts:
            _make(bundle, part, missing[part.digest], known | _finished(wanted), told)
            done += part.size
    for digest, file in missing.items():
        if digest not in parts:
            _copy(known[digest], file)
            done += file.size
            progress(done, total)
    digest = hashlib.sha256(content).hexdigest()
    name = records.release_id(held, manifest, digest)
    if name not in held:
        records.record_release(root, name, content, node)
    return Staged(Held(name, manifest, digest, held[name].data if name in held else None), total)


def _manifest_of(root: str, held: Mapping[str, Held], digest: str) -> bytes | None:
    for one in held.values():
        if digest and one.digest == digest:
            with open(os.path.join(root, records.RELEASES, one.id, "release.json"), "rb") as file:
                return file.read()
    return None


def wanted_files(root: str, manifest: Manifest, node: str) -> dict[str, _File]:
    """The files of a release for one node, by digest. Raises ReleaseError where it has no layers for the node."""
    kernel = manifest.kernel
    files = {
        layer.digest: _File(records.layer_path(root, layer.kind, layer.digest), layer.size)
        for layer in manifest.layers_of(node)
    }
    for name, file in (("vmlinuz", kernel.vmlinuz), ("initrd", kernel.initrd)):
        files[file.digest] = _File(records.kernel_path(root, kernel.id, name), file.size)
    return files


def files_by_digest(root: str, held: Mapping[str, Held]) -> dict[str, str]:
    """Paths of the files that are there, by digest."""
    found: dict[str, str] = {}
    for one in held.values():
        for layer in one.manifest.layers:
            found[layer.digest] = records.layer_path(root, layer.kind, layer.digest)
        kernel = one.manifest.kernel
        for name, file in (("vmlinuz", kernel.vmlinuz), ("initrd", kernel.initrd)):
            found[file.digest] = records.kernel_path(root, kernel.id, name)
    return {digest: path for digest, path in found.items() if os.path.exists(path)}


def _finished(wanted: Mapping[str, _File]) -> dict[str, str]:
    return {digest: file.path for digest, file in wanted.items() if os.path.exists(file.path)}


def _is_there(file: _File) -> bool:
    try:
        return os.stat(file.path).st_size == file.size
    except OSError:
        return False


def free(root: str) -> int:
    there = os.statvfs(root)
    return there.f_bavail * there.f_frsize


def _make(bundle: Bundle, part: Part, file: _File, sources: Mapping[str, str], progress: Progress) -> None:
    def source(digest: str) -> str:
        if digest not in sources:
            raise Damaged(f"the {part.kind} is made from a file that this node does not have: {digest}")
        return sources[digest]

    with _writing(file) as out:
        bundle.extract(part, source, out, progress)


def _copy(source: str, file: _File) -> None:
    """A file that another release has under another name; its blocks are shared where the file system can."""
    with open(source, "rb") as old, _writing(file) as out:
        try:
            fcntl.ioctl(out.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
                raise
            while piece := old.read(_PIECE):
                out.write(piece)


@contextmanager
def _writing(file: _File) -> Iterator[IO[bytes]]:
    """A file beside its place, with room set aside, that gets its name at the end."""
    os.makedirs(os.path.dirname(file.path), exist_ok=True)
    try:
        with open(file.path + PARTIAL, "w+b") as out:
            yield out
        # The name must not reach the disk before the content: after a power cut, what has a name is taken for whole.
        records.commit(os.path.dirname(file.path))
        os.rename(file.path + PARTIAL, file.path)
    except BaseException:
        if os.path.exists(file.path + PARTIAL):
            os.unlink(file.path + PARTIAL)
        raise


def verify(root: str, manifest: Manifest, node: str, progress: Progress) -> list[str]:
    """Compare every file of a release with its digest; what is wrong, in words. Nothing when all is as it should be."""
    wanted = wanted_files(root, manifest, node)
    total, done, wrong = sum(file.size for file in wanted.values()), 0, []
    for digest, file in wanted.items():
        found = hashlib.sha256()
        try:
            with open(file.path, "rb") as stream:
                while piece := stream.read(_PIECE):
                    found.update(piece)
                    done += len(piece)
                    progress(done, total)
        except OSError as error:
            wrong.append(f"{file.path}: {error.strerror}")
            continue
        if found.hexdigest() != digest:
            wrong.append(f"{file.path}: its content is not what the release says")
    return wrong
