"""The ISO writer, on a small image: what is read back, the hybrid boot sector, and the same bytes everywhere."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pycdlib
import pytest

from appliance import bootloader, iso
from appliance.errors import ApplianceError
from appliance.iso import BLOCK, Content

EPOCH = 1_763_800_000
VERSION = "1.2.0"
CORE = bytes(range(256)) * 40


def contents() -> dict[str, Content]:
    return {
        iso.ELTORITO_PATH: Content(CORE),
        iso.EFI_PATH: Content(b"FAT" * 3000),
        "boot/grub/grub.cfg": Content(b"set timeout=3\n"),
        "samepage/layers/base-" + "0" * 64 + ".squashfs": Content(b"hsqs" * 50_000),
        "samepage/releases/1.2.0/layers": Content(b""),
    }


def write(path: Path, files: dict[str, Content] | None = None) -> dict[str, Content]:
    files = files or contents()
    with path.open("w+b") as file:
        iso.master(file, files, b"\xeb" * 512, VERSION, EPOCH)
    return files


def extent(path: Path, name: str) -> int:
    image = pycdlib.PyCdlib()
    image.open(str(path))
    try:
        return int(image.get_record(rr_path=f"/{name}").extent_location())
    finally:
        image.close()


def test_every_file_reads_back(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    files = write(image)
    found = iso.read_back(image)
    assert found == {path: content.sha256() for path, content in files.items()}
    assert found["boot/grub/grub.cfg"] == hashlib.sha256(b"set timeout=3\n").hexdigest()
    iso.check(image, files)


def test_content_comes_from_files_too(tmp_path: Path) -> None:
    source = tmp_path / "kernel"
    source.write_bytes(b"vmlinuz" * 999)
    files = {**contents(), "samepage/kernels/k/vmlinuz": Content(file=source)}
    write(tmp_path / "a.iso", files)
    found = iso.read_back(tmp_path / "a.iso")
    assert found["samepage/kernels/k/vmlinuz"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_check_names_files_that_differ(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    files = write(image)
    layer = next(path for path in files if path.endswith(".squashfs"))
    with image.open("r+b") as file:
        file.seek(extent(image, layer) * BLOCK + 100_001)
        file.write(b"x")
    with pytest.raises(ApplianceError, match="not read back as meant") as caught:
        iso.check(image, files)
    assert layer in caught.value.message
    assert "grub.cfg" not in caught.value.message
    with pytest.raises(ApplianceError, match="missing/file"):
        iso.check(image, {**files, "missing/file": Content(b"1")})


def test_boot_records_point_at_the_boot_image(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    files = write(image)
    raw = image.read_bytes()
    place, efi = extent(image, iso.ELTORITO_PATH), extent(image, iso.EFI_PATH)
    # boot information table: volume descriptor, own place, length, sum of all 32-bit words from 64 on
    boot = raw[place * BLOCK :][: len(CORE)]
    assert boot == files[iso.ELTORITO_PATH].data
    volume, own, length, checksum = struct.unpack_from("<IIII", boot, 8)
    assert (volume, own, length) == (16, place, len(CORE))
    assert checksum == sum(struct.unpack(f"<{(len(CORE) - 64) // 4}I", boot[64:])) & 0xFFFFFFFF
    assert boot[:8] == CORE[:8]
    # the hybrid boot sector loads the image's fifth sector, and that one the rest
    assert struct.unpack_from("<Q", raw, 0x1B0) == (place * 4 + 4,)
    assert struct.unpack_from("<Q", boot, 0x9F4) == (place * 4 + 5,)
    # one active EFI partition over the file system
    status, kind, start, count = struct.unpack_from("<B3xB3xII", raw, 446)
    assert (status, kind, start) == (0x80, 0xEF, efi * 4)
    assert raw[start * 512 :][:9000] == b"FAT" * 3000
    assert count == -(-9000 // 512)
    assert raw[462:510] == bytes(48)
    assert raw[510:512] == b"\x55\xaa"
    # El Torito: one entry for BIOS, one section for UEFI
    assert raw[17 * BLOCK : 17 * BLOCK + 30] == b"\0CD001\1EL TORITO SPECIFICATION"
    catalog = raw[struct.unpack_from("<I", raw, 17 * BLOCK + 0x47)[0] * BLOCK :]
    assert (catalog[0], catalog[1], catalog[32]) == (1, 0, 0x88)
    assert struct.unpack_from("<HI", catalog, 38) == (4, place)
    assert (catalog[64] in (0x90, 0x91), catalog[65], catalog[96]) == (True, 0xEF, 0x88)
    assert struct.unpack_from("<HI", catalog, 102) == (count, efi)


def test_reading_ahead_stays_inside(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    write(image)
    with image.open("rb") as file:
        file.seek(16 * BLOCK + 80)
        (blocks,) = struct.unpack("<I", file.read(4))
    assert image.stat().st_size >= blocks * BLOCK + iso.PADDING
    assert image.stat().st_size % iso.BUFFER == 0


@pytest.mark.parametrize(
    ("zone", "mask"), [("UTC", 0o022), ("Pacific/Kiritimati", 0o077), ("America/St_Johns", 0o000)]
)
def test_same_bytes_anywhere(tmp_path: Path, zone: str, mask: int) -> None:
    program = textwrap.dedent(
        f"""
        import os, pathlib, sys, time
        os.umask({mask})
        time.tzset()
        real = time.time
        time.time = lambda: real() + 12345678
        import test_iso
        test_iso.write(pathlib.Path(sys.argv[1]))
        """
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "TZ": zone, "PYTHONPATH": here, "PYTHONHASHSEED": str(mask)}
    subprocess.run([sys.executable, "-c", program, tmp_path / "there.iso"], check=True, env=environment, cwd=tmp_path)
    write(tmp_path / "here.iso")
    assert (tmp_path / "there.iso").read_bytes() == (tmp_path / "here.iso").read_bytes()


def test_dates_are_the_clock_of_the_lock(tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    write(image)
    raw = image.read_bytes()
    for offset in (813, 830, 864):
        assert raw[16 * BLOCK + offset :][:17] == b"2025112208264000\0"
    reader = pycdlib.PyCdlib()
    reader.open(str(image))
    record = reader.get_record(rr_path="/boot/grub/grub.cfg")
    date = record.date
    assert (date.years_since_1900, date.month, date.day_of_month, date.hour, date.gmtoffset) == (125, 11, 22, 8, 0)
    assert record.rock_ridge.dr_entries.tf_record.modification_time.minute == 26
    reader.close()


def test_menu_offers_live_install_and_unattended() -> None:
    kernel = type("Kernel", (), {"id": "6.12-ab", "cmdline": "console=tty0 quiet"})()
    text = bootloader.medium_config(VERSION, kernel).decode()
    assert "@" not in text
    assert text.count("menuentry ") == 3
    assert "/samepage/kernels/6.12-ab/vmlinuz console=tty0 quiet samepage.mode=live samepage.release=1.2.0 $1" in text
    assert "set default=live" in text
    assert "set timeout=3" in text


def test_environment_block_has_its_size() -> None:
    block = bootloader.environment_block()
    assert len(block) == 1024
    assert block.startswith(b"# GRUB Environment Block\n#")
