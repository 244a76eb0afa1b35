"""What an installed disk looks like, for the installer and for disk images. Part of the node's code.

    1 MiB   BIOS boot partition, 1 MiB: GRUB's core image
    2 MiB   EFI system partition, 64 MiB: GRUB for UEFI, its static configuration and its environment block
    66 MiB  state partition, the rest: btrfs with layers, kernels, releases, boot records, identity and data

The first sector holds GRUB's boot code beside the partition table; it and the core image name each other by sector.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

MIB = 1 << 20
SECTOR = 512  # BIOS disks; only UEFI can boot from others
BIOS_START, BIOS_SIZE = 1 * MIB, 1 * MIB
ESP_START, ESP_SIZE = 2 * MIB, 64 * MIB
STATE_START = 66 * MIB
TAIL = 1 * MIB  # the second copy of the partition table lies in it
BIOS_NUMBER, ESP_NUMBER, STATE_NUMBER = 1, 2, 3

MINIMUM_DATA = 1 << 30  # bytes of room for data beside the layers
MINIMUM_DISK = 4 << 30  # bytes: two releases and some data

_TYPES = {
    "bios": "21686148-6449-6E6F-744E-656564454649",
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "state": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
}

# Places inside GRUB's images, fixed by its boot protocol
_BOOT_CODE = 440  # bytes of the first sector that are code; signature and table follow
_KERNEL_SECTOR = 0x5C  # 8 bytes: sector of the core image
_DRIVE_CHECK = 0x66  # a jump over the repair of a wrong drive number, which some BIOSes need
_NO_OPERATION = b"\x90\x90"
_BLOCK_LIST = SECTOR - 12  # in the core image's first sector: start (8), length (2), segment (2) of the rest


class BootFiles(NamedTuple):
    """GRUB's files of one release: first sector, core image, beginning of the EFI system partition."""

    boot: bytes
    core: bytes
    esp: bytes


def partition_script(identity: Mapping[str, str] | None = None) -> bytes:
    """Input for sfdisk. `identity` gives the GUIDs of "disk", "bios", "esp", "state"; otherwise sfdisk makes them."""
    guid = {name: f", uuid={value}" for name, value in (identity or {}).items()}
    lines = ["label: gpt"]
    if identity:
        lines.append(f"label-id: {identity['disk']}")
    for name, start, size in (
        ("bios", BIOS_START, BIOS_SIZE), ("esp", ESP_START, ESP_SIZE), ("state", STATE_START, 0),
    ):  # fmt: skip
        length = f"size={size // MIB}MiB, " if size else ""
        kind = f'type={_TYPES[name]}, name="samepage-{name}"'
        lines.append(f"start={start // MIB}MiB, {length}{kind}{guid.get(name, '')}")
    return ("\n".join(lines) + "\n").encode()


def partition_device(disk: str, number: int) -> str:
    """/dev/sda 3 -> /dev/sda3, /dev/nvme0n1 3 -> /dev/nvme0n1p3."""
    return f"{disk}p{number}" if disk[-1:].isdigit() else f"{disk}{number}"


def boot_sector(code: bytes, present: bytes, core_start: int) -> bytes:
    """The first sector: GRUB's code that loads the core image at byte `core_start`, and the present partition table."""
    sector = bytearray(code[:_BOOT_CODE] + present[_BOOT_CODE:SECTOR])
    struct.pack_into("<Q", sector, _KERNEL_SECTOR, core_start // SECTOR)
    sector[_DRIVE_CHECK : _DRIVE_CHECK + 2] = _NO_OPERATION
    return bytes(sector)


def core_image(core: bytes, start: int) -> bytes:
    """The core image for a disk where it stands in one piece at byte `start`. Raises ValueError when it is too big."""
    padded = bytearray(core + bytes(-len(core) % SECTOR))
    if len(padded) > BIOS_SIZE:
        raise ValueError(f"GRUB's core image has {len(padded)} bytes, the BIOS boot partition {BIOS_SIZE}")
    rest = len(padded) // SECTOR - 1
    _start, _length, segment = struct.unpack_from("<QHH", padded, _BLOCK_LIST)
    struct.pack_into("<QHH", padded, _BLOCK_LIST, start // SECTOR + 1, rest, segment)
    return bytes(padded)


def write_boot_code(disk: BinaryIO, files: BootFiles) -> None:
    """Write GRUB onto a partitioned disk that is open for reading and writing; the partition table stays as it is."""
    disk.seek(0)
    present = disk.read(SECTOR)
    for offset, content in (
        (BIOS_START, core_image(files.core, BIOS_START)),
        (ESP_START, files.esp),
        (0, boot_sector(files.boot, present, BIOS_START)),
    ):
        disk.seek(offset)
        disk.write(content)
    disk.flush()
