"""Writes the ISO: one file that boots from a CD and, written raw, from a disk, under BIOS and UEFI.

    0            hybrid boot sector: GRUB's, with a partition table whose one entry covers efi.img
    /boot/grub   the menu            /boot/eltorito.img, /boot/efi.img   what a CD boots
    /samepage    layers, kernels, releases and the boot files for installs (see appliance.node.paths)

The image is written beside its place, patched, read back file by file, and only then renamed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pycdlib
from pycdlib.dates import DirectoryRecordDate, VolumeDescriptorDate
from pycdlib.pycdlibexception import PyCdlibException

from appliance import bootloader
from appliance.console import Progress
from appliance.errors import ApplianceError
from appliance.model import Artifact, Release
from appliance.node import paths
from appliance.node.release import dump_layers, parse

BLOCK = 2048  # bytes, ISO 9660
SECTOR = 512
BUFFER = 1 << 20
PADDING = 150 * BLOCK  # readers fetch ahead; a BIOS that is asked for blocks beyond the end may return stale ones
ELTORITO_PATH = f"boot/{bootloader.ELTORITO}"
EFI_PATH = f"boot/{bootloader.EFI_MEDIUM}"
_BOOT_CATALOG = "boot/boot.cat"


@dataclass(frozen=True, slots=True)
class Content:
    """One file of the ISO: bytes, or a file of the host with its known digest (empty: not known yet)."""

    data: bytes = b""
    file: Path | None = None
    digest: str = ""

    def size(self) -> int:
        return self.file.stat().st_size if self.file else len(self.data)

    def sha256(self) -> str:
        if self.digest:
            return self.digest
        if self.file is None:
            return hashlib.sha256(self.data).hexdigest()
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def contents(release: Release, boot: Path, node: str = "") -> dict[str, Content]:
    """Every file of the ISO by its path, from a release and the folder that bootloader.build filled."""
    root = paths.MEDIUM_ROOT
    records = parse(release.manifest).layers_of(node)
    digests = {record.digest for record in records}
    kernel = f"{root}/{paths.KERNELS}/{release.kernel.id}"
    record = f"{root}/{paths.RELEASES}/{release.version}"
    files = {
        ELTORITO_PATH: Content((boot / bootloader.ELTORITO).read_bytes()),
        EFI_PATH: Content((boot / bootloader.EFI_MEDIUM).read_bytes()),
        "boot/grub/grub.cfg": Content(bootloader.medium_config(release.version, release.kernel)),
        f"{kernel}/vmlinuz": Content(file=release.kernel.vmlinuz, digest=release.kernel.vmlinuz_digest),
        f"{kernel}/initrd": Content(file=release.kernel.initrd, digest=release.kernel.initrd_digest),
        f"{record}/release.json": Content(release.manifest),
        f"{record}/layers": Content(dump_layers(records)),
    }
    for name in bootloader.FOR_INSTALLS:
        files[f"{root}/{paths.MEDIUM_BOOT}/{name}"] = Content((boot / name).read_bytes())
    for layer in release.layers:
        if layer.digest in digests:
            name = f"{root}/{paths.LAYERS}/{paths.packed_name(layer.kind, layer.digest)}"
            files[name] = Content(file=layer.packed, digest=layer.packed_digest)
    return files


def write(release: Release, boot: Path, out: Path, *, node: str = "", progress: Progress | None = None) -> Artifact:
    """Write the ISO of a release to `out`; it appears there whole, or not at all.

    `boot` is the folder that bootloader.build filled; `node` says whose config layer to take where there are
    several. Raises ApplianceError when the image cannot be written or does not read back as it was meant.
    """
    files = contents(release, boot, node)
    hybrid = (boot / bootloader.HYBRID_MBR).read_bytes()
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            master(file, files, hybrid, release.version, release.epoch, progress)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(_digest_of, temporary)
            check(temporary, files, progress)
            digest = whole.result()
        temporary.chmod(0o644)
        size = temporary.stat().st_size
        temporary.replace(out)
    except (PyCdlibException, OSError) as error:
        hint = f"look at the free space and the permissions of {out.parent}"
        raise ApplianceError(f"the ISO cannot be written: {error}", hint=hint) from error
    finally:
        temporary.unlink(missing_ok=True)
    return Artifact(out, digest, size)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_beside(path: Path, content: bytes) -> None:
    """Replace a small file atomically, readable by everyone."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# --- writing -------------------------------------------------------------------------------------------------------


def master(
    file: BinaryIO, files: dict[str, Content], hybrid: bytes, version: str, epoch: int, progress: Progress | None = None
) -> None:
    """Write the image to an open file. `files` gets the El Torito image as it stands on the medium.

    `hybrid` is the 512-byte boot sector for booting the image as a disk, `epoch` (seconds) every date in the image.
    """
    iso = pycdlib.PyCdlib()
    iso.new(
        interchange_level=3, rock_ridge="1.09", vol_ident=paths.MEDIUM_LABEL, sys_ident="LINUX",
        app_ident_str=f"SAMEPAGE APPLIANCE {version}".upper(),
    )  # fmt: skip
    opened: list[BinaryIO] = []
    try:
        names = _Names()
        for path in sorted(files):
            for folder in reversed(Path(path).parents[:-1]):
                if names.add_folder(str(folder)):
                    iso.add_directory(names.iso[str(folder)], rr_name=folder.name, file_mode=0o040555)
            source = files[path].file
            stream: BinaryIO = source.open("rb") if source else tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            opened.append(stream)
            if source is None:
                stream.write(files[path].data)
                stream.seek(0)
            iso.add_fp(stream, files[path].size(), names.add_file(path), rr_name=Path(path).name, file_mode=0o100444)
        catalog = names.add_file(_BOOT_CATALOG)
        iso.add_eltorito(names.iso[ELTORITO_PATH], catalog, rr_bootcatname=Path(_BOOT_CATALOG).name, boot_load_size=4)
        blocks = -(-files[EFI_PATH].size() // SECTOR)
        iso.add_eltorito(names.iso[EFI_PATH], efi=True, platform_id=0xEF, boot_load_size=blocks)
        iso.force_consistency()
        _date(iso, epoch)
        boot_files = (iso.get_record(iso_path=names.iso[path]) for path in (ELTORITO_PATH, EFI_PATH))
        eltorito, efi = (record.extent_location() for record in boot_files)

        def notify(done: int, total: int, _: Any) -> None:
            if progress:
                progress.update(done, total, "bytes")

        iso.write_fp(file, blocksize=BUFFER, progress_cb=notify)
    finally:
        iso.close()
        for stream in opened:
            stream.close()
    image = patch_eltorito(files[ELTORITO_PATH].data, eltorito)
    files[ELTORITO_PATH] = Content(image)
    patches = {
        0: hybrid_sector(hybrid, eltorito, efi, blocks, hashlib.sha256(image).digest()[:4]),
        16 * BLOCK + 830: _volume_date(epoch),  # modification date: pycdlib writes the present time
        eltorito * BLOCK: image,
    }
    for offset, data in patches.items():
        file.seek(offset)
        file.write(data)
    end = file.seek(0, os.SEEK_END) + PADDING
    file.truncate(end - end % -BUFFER)
    file.flush()
    os.fsync(file.fileno())


class _Names:
    """ISO 9660 names for files whose real names are Rock Ridge's: short, valid and in order of arrival."""

    def __init__(self) -> None:
        self.iso: dict[str, str] = {"": ""}

    def add_folder(self, path: str) -> bool:
        """Name a folder; false when it has a name already."""
        if path in self.iso:
            return False
        self.iso[path] = f"{self.iso[self._parent(path)]}/D{len(self.iso):05d}"
        return True

    def add_file(self, path: str) -> str:
        self.iso[path] = f"{self.iso[self._parent(path)]}/F{len(self.iso):05d}.;1"
        return self.iso[path]

    @staticmethod
    def _parent(path: str) -> str:
        return path.rpartition("/")[0]


def _volume_date(epoch: int) -> bytes:
    return time.strftime("%Y%m%d%H%M%S00", time.gmtime(epoch)).encode() + b"\0"


def _date(iso: Any, epoch: int) -> None:
    """Set every date of the image that is about to be written: pycdlib takes the present time in the local zone."""
    for name in ("volume_creation_date", "volume_effective_date"):
        date = VolumeDescriptorDate()
        date.parse(_volume_date(epoch))
        setattr(iso.pvd, name, date)
    moment = time.gmtime(epoch)
    stamp = DirectoryRecordDate.from_fields(
        moment.tm_year - 1900, moment.tm_mon, moment.tm_mday, moment.tm_hour, moment.tm_min, moment.tm_sec, 0
    )
    for record in _records(iso.pvd.root_directory_record()):
        record.date = stamp
        if record.rock_ridge is None:
            continue
        for place in (record.rock_ridge.dr_entries, record.rock_ridge.ce_entries):
            stamps = place.tf_record if place is not None else None
            for name in stamps.__slots__ if stamps is not None else ():
                if name.endswith("_time") and getattr(stamps, name) is not None:
                    setattr(stamps, name, stamp)


def _records(folder: Any) -> Iterator[Any]:
    yield folder
    for child in folder.children:
        if child.is_dir() and not child.is_dot() and not child.is_dotdot():
            yield from _records(child)
        else:
            yield child


def patch_eltorito(image: bytes, extent: int) -> bytes:
    """The CD boot image as it must stand at block `extent` (of 2048 bytes).

    It gets its boot information table and, at 0x9f4 for the hybrid boot sector, the place of the core image's rest.
    """
    patched = bytearray(image)
    struct.pack_into("<Q", patched, 0x9F4, extent * (BLOCK // SECTOR) + 5)
    words = bytes(patched[64:]) + bytes(-len(patched) % 4)
    checksum = sum(word for (word,) in struct.iter_unpack("<I", words)) & 0xFFFFFFFF
    struct.pack_into("<IIII40x", patched, 8, 16, extent, len(image), checksum)
    return bytes(patched)


def hybrid_sector(code: bytes, eltorito: int, efi: int, efi_sectors: int, signature: bytes) -> bytes:
    """The first sector: GRUB's code, where its core image is, and one active partition over the UEFI file system.

    `eltorito` and `efi` are blocks of 2048 bytes, `efi_sectors` counts 512 bytes, `signature` has 4 bytes.
    """
    sector = bytearray(code[:440].ljust(SECTOR, b"\0"))
    struct.pack_into("<Q", sector, 0x1B0, eltorito * (BLOCK // SECTOR) + 4)
    sector[440:444] = signature
    beyond = b"\xfe\xff\xff"  # no cylinder, head and sector: use the block numbers
    struct.pack_into("<B3sB3sII", sector, 446, 0x80, beyond, 0xEF, beyond, efi * (BLOCK // SECTOR), efi_sectors)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


# --- reading back --------------------------------------------------------------------------------------------------


def read_back(image: Path, progress: Progress | None = None) -> dict[str, str]:
    """Digest (sha256, hex) of every file of an ISO by its path; the boot catalogue is left out."""
    iso = pycdlib.PyCdlib()
    iso.open(str(image))
    try:
        found: dict[str, str] = {}
        total, done = image.stat().st_size, 0
        for folder, _, names in iso.walk(rr_path="/"):
            for name in names:
                path = f"{folder.rstrip('/')}/{name}"
                if path == f"/{_BOOT_CATALOG}":
                    continue
                digest = hashlib.sha256()
                with iso.open_file_from_iso(rr_path=path) as file:
                    while block := file.read(BUFFER):
                        digest.update(block)
                        done += len(block)
                        if progress:
                            progress.update(done, total, "bytes")
                found[path.lstrip("/")] = digest.hexdigest()
        return found
    finally:
        iso.close()


def check(image: Path, files: Mapping[str, Content], progress: Progress | None = None) -> None:
    """Open a written image again and compare every file with what was meant. Raises ApplianceError naming the files."""
    found = read_back(image, progress)
    meant = {path: content.sha256() for path, content in files.items()}
    wrong = sorted(path for path in found.keys() | meant.keys() if found.get(path) != meant.get(path))
    if wrong:
        raise ApplianceError(
            f"the written image does not read back as meant: {', '.join(wrong)}",
            hint="a file changed while it was read, or the disk or its cable is failing; build again",
        )
