"""What stands on the state partition: releases, boot records, data subvolumes. Part of the node's own code.

GRUB reads the boot records itself (appliance/boot/grub-disk.cfg) and sees the last committed transaction of btrfs, not
its log tree. So nothing here uses fsync on the top-level subvolume: a file is written beside its place, the transaction
is committed, the file is renamed, and the transaction is committed again. Each rename is then there or not, whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from appliance.node.release import Manifest, ReleaseError, boot_record, dump_layers, parse

SELECTED, PREVIOUS, TRY = "boot/selected.cfg", "boot/previous.cfg", "boot/try.cfg"
RELEASES, LAYERS, KERNELS, DATA = "releases", "layers", "kernels", "data"
KERNEL_FILES = ("vmlinuz", "initrd")
DATA_FILE = "data"  # in the folder of a release that does not run: the number of its data subvolume
PARTIAL = ".partial"
_SYNC = 0x9408  # BTRFS_IOC_SYNC of linux/btrfs.h: writes all data and commits the transaction
_LINE = re.compile(r"set ([a-z]+)='([\w=.,:/@+ ~-]*)'\Z", re.ASCII)
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]*\Z")  # of a folder under releases/ or kernels/
_RECORD_LIMIT = 4096  # bytes
_MANIFEST_LIMIT = 16 << 20


class BootRecord(NamedTuple):
    """What one boot record says."""

    release: str  # folder under releases/
    kernel: str  # folder under kernels/
    data: int
    options: str


class Choice(NamedTuple):
    """What a power-on boots: `record` is "selected" or "previous"."""

    record: str
    release: str
    kernel: str
    data: int


class Held(NamedTuple):
    """A release whose record is on the state partition. `data`: the data it left behind, None where it has none."""

    id: str
    manifest: Manifest
    digest: str  # sha256 of release.json
    data: int | None


# --- reading ---------------------------------------------------------------------------------------------------------


def parse_record(content: bytes) -> BootRecord | None:
    """A boot record; None where it is none that GRUB could use."""
    values: dict[str, str] = {}
    for line in content.decode("ascii", "replace").splitlines():
        matched = _LINE.match(line)
        if matched is None:
            return None
        values[matched[1]] = matched[2]
    data = values.get("data", "")
    named = all(_NAME.match(values.get(key, "")) for key in ("release", "kernel"))
    if not named or not data.isdigit() or len(data) > 9:
        return None
    return BootRecord(values["release"], values["kernel"], int(data), values.get("options", ""))


def read_record(root: str, name: str) -> BootRecord | None:
    """The boot record at `name`, None where there is none."""
    content = read_small(os.path.join(root, name), _RECORD_LIMIT)
    return parse_record(content) if content is not None else None


def read_small(path: str, limit: int) -> bytes | None:
    """A file's bytes; None where it is missing or larger than `limit`."""
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError:
        return None
    return content if len(content) <= limit else None


def choose(root: str) -> Choice | None:
    """What GRUB boots from the state partition mounted at `root`; None where it finds nothing. As in grub-disk.cfg."""
    for name, path in (("selected", SELECTED), ("previous", PREVIOUS)):
        record = read_record(root, path)
        if record is None:
            continue
        files = [f"{KERNELS}/{record.kernel}/{file}" for file in KERNEL_FILES] + [f"{RELEASES}/{record.release}/layers"]
        if all(_has_content(os.path.join(root, file)) for file in files):
            return Choice(name, record.release, record.kernel, record.data)
    return None


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


def held_releases(root: str) -> dict[str, Held]:
    """Every release with a whole record, by id."""
    found: dict[str, Held] = {}
    folder = os.path.join(root, RELEASES)
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        content = read_small(os.path.join(folder, name, "release.json"), _MANIFEST_LIMIT)
        if content is None or name.endswith(PARTIAL):
            continue
        try:
            manifest = parse(content)
        except (ReleaseError, RecursionError):
            continue
        kept = read_small(os.path.join(folder, name, DATA_FILE), 16)
        data = int(kept) if kept and kept.strip().isdigit() else None
        found[name] = Held(name, manifest, hashlib.sha256(content).hexdigest(), data)
    return found


def release_id(held: Mapping[str, Held], manifest: Manifest, digest: str) -> str:
    """The folder of a release: its version, with a part of its digest where another build of that version has it."""
    for one in held.values():
        if one.digest == digest:
            return one.id
    return manifest.version if manifest.version not in held else f"{manifest.version}+{digest[:8]}"


def data_numbers(root: str) -> list[int]:
    """Numbers of the data subvolumes, sorted."""
    folder = os.path.join(root, DATA)
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def layer_path(root: str, kind: str, digest: str) -> str:
    return os.path.join(root, LAYERS, f"{kind}-{digest}.erofs")


def kernel_path(root: str, kernel: str, file: str) -> str:
    return os.path.join(root, KERNELS, kernel, file)


# --- writing ---------------------------------------------------------------------------------------------------------


def commit(root: str) -> None:
    """Bring everything written so far to the disk: data, then the tree that names it, in one transaction."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _SYNC)
    except OSError:
        os.sync()  # not btrfs
    finally:
        os.close(descriptor)


def put(root: str, files: Mapping[str, bytes | None]) -> None:
    """Replace small files, each as a whole, in the order given, and return when that is on the disk. None removes one.

    A power cut in between leaves the first few of them replaced, never the later ones alone.
    """
    for name, content in files.items():
        if content is not None:
            path = os.path.join(root, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path + PARTIAL, "wb") as file:
                file.write(content)
    commit(root)
    for name, content in files.items():
        path = os.path.join(root, name)
        if content is not None:
            os.rename(path + PARTIAL, path)
        elif os.path.lexists(path):
            os.unlink(path)
        commit(root)


def select(held: Held, data: int) -> dict[str, bytes | None]:
    """What `put` makes the next power-on boot."""
    return {SELECTED: boot_record(held.manifest, data, held.id)}


def record_release(root: str, name: str, content: bytes, node: str) -> None:
    """Write a release's folder beside its place and rename it; its layers and kernel must be on the disk already."""
    manifest = parse(content)
    folder = os.path.join(root, RELEASES, name)
    os.makedirs(folder + PARTIAL, exist_ok=True)
    for file, text in (("release.json", content), ("layers", dump_layers(manifest.layers_of(node)))):
        with open(os.path.join(folder + PARTIAL, file), "wb") as out:
            out.write(text)
    commit(root)
    os.rename(folder + PARTIAL, folder)
    commit(root)
