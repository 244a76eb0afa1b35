"""Writes a disk image, raw or qcow2, with what the installer leaves on an empty disk. Needs no root and no mount."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from appliance import bootloader
from appliance.console import Progress
from appliance.errors import ApplianceError
from appliance.model import Artifact, Layer, Release, ToolBox
from appliance.node import disklayout, paths
from appliance.node.release import boot_record, dump_layers, parse
from appliance.run import find_program, run

DEFAULT_SIZE = 8 << 30  # bytes; the file is sparse


def write(
    release: Release, boot: Path, out: Path, tools: ToolBox, *,
    node: str = "", size: int = DEFAULT_SIZE, progress: Progress | None = None,
) -> Artifact:  # fmt: skip
    """Write a disk of `size` bytes (a multiple of 1 MiB) to `out`, as qcow2 where its name ends so, otherwise raw.

    `boot` is the folder that bootloader.build filled; `node` says whose config layer to take where there are several.
    Raises ApplianceError when the release does not fit or a tool fails.
    """
    room = disklayout.STATE_START + sum(layer.size for layer in release.layers) + disklayout.MINIMUM_DATA
    needed = max(room, disklayout.MINIMUM_DISK)
    if size < needed:
        raise ApplianceError(f"a disk of {size >> 20} MiB is too small", hint=f"at least {needed >> 20} MiB are needed")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        work = Path(name)
        raw = work / "disk.raw"
        _partition(raw, size, release, tools)
        state = _state(work, size - disklayout.STATE_START - disklayout.TAIL, release, node, tools)
        with raw.open("r+b") as disk:
            _insert(state, disk.fileno(), disklayout.STATE_START, progress)
            parts = (bootloader.DISK_BOOT, bootloader.DISK_CORE, bootloader.DISK_ESP)
            files = disklayout.BootFiles(*((boot / part).read_bytes() for part in parts))
            disklayout.write_boot_code(disk, files)
            os.fsync(disk.fileno())
        done = raw
        if out.suffix == ".qcow2":
            done = work / "disk.qcow2"
            run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, done], hint="run ./build.py doctor")
        with done.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        done.chmod(0o644)
        done.replace(out)
    return Artifact(out, digest, out.stat().st_size)


def _guid(release: Release, name: str) -> str:
    """Identifiers that follow from the release, so that the same release gives the same disk."""
    return str(uuid.uuid5(uuid.UUID(bytes=hashlib.sha256(release.manifest).digest()[:16]), name))


def _partition(raw: Path, size: int, release: Release, tools: ToolBox) -> None:
    with raw.open("xb") as file:
        file.truncate(size)
    identity = {name: _guid(release, name) for name in ("disk", "bios", "esp", "state")}
    script = disklayout.partition_script(identity)
    tools.run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", raw, input=script)


def _state(work: Path, size: int, release: Release, node: str, tools: ToolBox) -> Path:
    """The btrfs of the state partition, made from a folder."""
    tree = work / "state"
    manifest = parse(release.manifest)
    records = manifest.layers_of(node)
    wanted = {record.digest for record in records}
    for folder in (paths.LAYERS, paths.BOOT, f"{paths.IDENTITY}/etc", f"{paths.DATA}/1"):
        (tree / folder).mkdir(parents=True)
    for layer in release.layers:
        if layer.digest in wanted:
            _place(layer, tree / paths.LAYERS)
    kernel = tree / paths.KERNELS / release.kernel.id
    kernel.mkdir(parents=True)
    shutil.copyfile(release.kernel.vmlinuz, kernel / "vmlinuz")
    shutil.copyfile(release.kernel.initrd, kernel / "initrd")
    record = tree / paths.RELEASES / release.version
    record.mkdir(parents=True)
    (record / "release.json").write_bytes(release.manifest)
    (record / "layers").write_bytes(dump_layers(records))
    (tree / paths.SELECTED).write_bytes(boot_record(manifest, 1))
    (tree / paths.IDENTITY).chmod(0o711)  # services pass through to folders of their own

    image = work / "state.btrfs"
    with image.open("xb") as file:
        file.truncate(size - size % 4096)
    make = tools.command(
        "mkfs.btrfs", "--quiet", "--label", paths.STATE_LABEL, "--uuid", _guid(release, "file system"),
        "--rootdir", tree, "--subvol", f"rw:{paths.DATA}/1", image,
    )  # fmt: skip
    # the files of the image belong to whoever owns those of the folder: to root, where only a namespace makes it so
    as_root = [] if os.geteuid() == 0 else [find_program("unshare"), "--user", "--map-root-user"]
    run([*as_root, *make], env=tools.environment, hint="./build.py doctor says whether user namespaces work here")
    shutil.rmtree(tree)
    return image


def _place(layer: Layer, folder: Path) -> None:
    target = folder / paths.image_name(layer.kind, layer.digest)
    with suppress(OSError):
        os.link(layer.image, target)
        return
    shutil.copyfile(layer.image, target)


def _insert(source: Path, target: int, offset: int, progress: Progress | None) -> None:
    """Copy what a sparse file holds to `offset` of an open file; holes stay holes."""
    with source.open("rb") as file:
        total = os.fstat(file.fileno()).st_blocks * 512
        end, position, copied = source.stat().st_size, 0, 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # no data behind this
                return
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            while start < position:
                block = os.pread(file.fileno(), min(position - start, 8 << 20), start)
                os.pwrite(target, block, offset + start)
                start += len(block)
                copied += len(block)
                if progress:
                    progress.update(copied, total, "bytes")
