"""The layout of installed disks, byte by byte."""

from __future__ import annotations

import io
import struct

import pytest

from appliance.node import disklayout
from appliance.node.disklayout import MIB, SECTOR, BootFiles


def fake_core(size: int) -> bytes:
    """A core image whose first sector ends in a block list with GRUB's segment."""
    head = bytes(SECTOR - 12) + struct.pack("<QHH", 1, 0, 0x820)
    return (head + b"\xcc" * size)[:size]


def test_core_image_points_at_its_own_rest() -> None:
    image = disklayout.core_image(fake_core(1300), 1 * MIB)
    assert len(image) == 3 * SECTOR
    assert struct.unpack_from("<QHH", image, SECTOR - 12) == (2049, 2, 0x820)
    with pytest.raises(ValueError, match="BIOS boot partition"):
        disklayout.core_image(fake_core(MIB + 1), MIB)


def test_boot_sector_keeps_the_partition_table() -> None:
    present = bytes(range(256)) * 2
    sector = disklayout.boot_sector(b"\xeb" * SECTOR, present, 1 * MIB)
    assert len(sector) == SECTOR
    assert sector[440:] == present[440:]
    assert struct.unpack_from("<Q", sector, 0x5C) == (2048,)
    assert sector[0x66:0x68] == b"\x90\x90"
    assert sector[0x68:440] == b"\xeb" * (440 - 0x68)


def test_boot_code_touches_nothing_else() -> None:
    disk = io.BytesIO(b"\x55" * (4 * MIB))
    disklayout.write_boot_code(disk, BootFiles(b"\xeb" * SECTOR, fake_core(2000), b"\xaa" * 4096))
    content = disk.getvalue()
    assert len(content) == 4 * MIB
    assert content[440:MIB] == b"\x55" * (MIB - 440)
    assert content[MIB + 2048 : 2 * MIB] == b"\x55" * (MIB - 2048)
    assert content[2 * MIB : 2 * MIB + 4096] == b"\xaa" * 4096
    assert content[2 * MIB + 4096 :] == b"\x55" * (2 * MIB - 4096)


def test_partition_script_leaves_no_gap_and_fixes_identity() -> None:
    text = disklayout.partition_script().decode()
    assert "uuid" not in text
    assert "label-id" not in text
    lines = text.splitlines()
    assert lines[0] == "label: gpt"
    assert lines[1].startswith("start=1MiB, size=1MiB,")
    assert lines[2].startswith("start=2MiB, size=64MiB,")
    assert lines[3].startswith("start=66MiB, type=")
    fixed = disklayout.partition_script(dict.fromkeys(("disk", "bios", "esp", "state"), "GUID")).decode()
    assert fixed.count("uuid=GUID") == 3
    assert "label-id: GUID" in fixed


@pytest.mark.parametrize(
    ("disk", "partition"),
    [("/dev/sda", "/dev/sda3"), ("/dev/nvme0n1", "/dev/nvme0n1p3"), ("/dev/mmcblk0", "/dev/mmcblk0p3")],
)
def test_names_of_partitions(disk: str, partition: str) -> None:
    assert disklayout.partition_device(disk, 3) == partition
