"""The finished ISO and disk image, opened again."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pycdlib
import pytest

from appliance import bootloader, disk, iso
from appliance.node import disklayout, paths
from appliance.node.release import parse, parse_layers
from appliance.pipeline import Built, Output

MIB = 1 << 20


@pytest.fixture(scope="module")
def image(output: Output) -> Path:
    return output.artifact.path


@pytest.fixture(scope="module")
def found(image: Path) -> Mapping[str, str]:
    """Digest of every file of the ISO."""
    return iso.read_back(image)


def content(image: Path, path: str) -> bytes:
    reader = pycdlib.PyCdlib()
    reader.open(str(image))
    try:
        with reader.open_file_from_iso(rr_path=f"/{path}") as file:
            return bytes(file.read())
    finally:
        reader.close()


def test_iso_is_small_and_has_its_digest(output: Output) -> None:
    path = output.artifact.path
    assert path.stat().st_size <= 300 * 10**6
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == output.artifact.sha256
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{output.artifact.sha256}  {path.name}\n"


def test_every_file_has_the_digest_of_the_release(built: Built, found: Mapping[str, str]) -> None:
    release = built.release
    wanted = iso.contents(release, built.boot)
    del wanted[iso.ELTORITO_PATH]  # patched with its own place; see the unit tests
    assert {path: found.get(path) for path in wanted} == {path: file.sha256() for path, file in wanted.items()}
    assert set(found) == {*wanted, iso.ELTORITO_PATH}
    folder = f"{paths.MEDIUM_ROOT}/{paths.KERNELS}/{release.kernel.id}"
    assert found[f"{folder}/vmlinuz"] == release.kernel.vmlinuz_digest
    for layer in release.layers:
        packed = f"{paths.MEDIUM_ROOT}/{paths.LAYERS}/{paths.packed_name(layer.kind, layer.digest)}"
        assert found[packed] == layer.packed_digest


def test_records_on_the_medium_agree_with_each_other(built: Built, image: Path, found: Mapping[str, str]) -> None:
    folder = f"{paths.MEDIUM_ROOT}/{paths.RELEASES}/{built.release.version}"
    manifest = parse(content(image, f"{folder}/release.json"))
    layers = parse_layers(content(image, f"{folder}/layers"))
    assert layers == {record.kind: record.digest for record in manifest.layers_of()}
    for record in manifest.layers_of():
        assert f"{paths.MEDIUM_ROOT}/{paths.LAYERS}/{paths.packed_name(record.kind, record.digest)}" in found
    menu = content(image, "boot/grub/grub.cfg").decode()
    assert menu.count(f"/samepage/kernels/{manifest.kernel.id}/") == 2
    assert f"samepage.release={manifest.version}" in menu


@pytest.mark.parametrize("name", ["grub-disk.cfg", "grub-medium.cfg"])
def test_configurations_are_valid_for_grub(built: Built, name: str) -> None:
    built.tools.run("grub-script-check", bootloader.TEMPLATES / name)


def test_layers_in_the_squashfs_are_the_images_themselves(built: Built) -> None:
    for layer in built.layers:
        name = paths.image_name(layer.kind, layer.digest)
        program = built.tools.command("unsquashfs", "-cat", layer.packed, name)
        with subprocess.Popen(program, stdout=subprocess.PIPE, env=built.tools.environment) as packed:
            assert packed.stdout is not None
            digest = hashlib.sha256()
            while block := packed.stdout.read(MIB):
                digest.update(block)
        assert digest.hexdigest() == layer.digest


def test_disk_image_has_what_the_installer_leaves(built: Built, tmp_path: Path) -> None:
    artifact = disk.write(built.release, built.boot, tmp_path / "a.raw", built.tools, size=5 << 30)
    assert artifact.size == 5 << 30
    parts = (bootloader.DISK_BOOT, bootloader.DISK_CORE, bootloader.DISK_ESP)
    boot, core, esp = ((built.boot / name).read_bytes() for name in parts)
    with artifact.path.open("rb") as file:
        sector = os.pread(file.fileno(), 512, 0)
        assert sector[:0x5C] == boot[:0x5C]
        assert struct.unpack_from("<Q", sector, 0x5C) == (disklayout.BIOS_START // 512,)
        assert sector[510:] == b"\x55\xaa"
        assert os.pread(file.fileno(), len(core) - 512, MIB + 512) == core[512:]
        assert os.pread(file.fileno(), len(esp), disklayout.ESP_START) == esp
        assert os.pread(file.fileno(), 8, disklayout.STATE_START + 65536 + 64) == b"_BHRfS_M"
    table = built.tools.run("sfdisk", "--dump", artifact.path).stdout.decode()
    assert table.count("samepage-") == 3
    verified = built.tools.run("sfdisk", "--verify", artifact.path).stdout.decode()
    assert "No errors detected" in verified

    state = tmp_path / "state.btrfs"
    with artifact.path.open("rb") as file, state.open("wb") as out:
        file.seek(disklayout.STATE_START)
        out.truncate(artifact.size - disklayout.STATE_START - disklayout.TAIL)
        position = disklayout.STATE_START
        while position < artifact.size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            os.copy_file_range(file.fileno(), out.fileno(), position - start, start, start - disklayout.STATE_START)
    artifact.path.unlink()
    check = built.tools.run("btrfs", "check", "--readonly", state)
    assert b"no error found" in check.stdout + check.stderr
    restored = tmp_path / "restored"
    restored.mkdir()
    built.tools.run("btrfs", "restore", state, restored)
    names = {str(path.relative_to(restored)) for path in restored.rglob("*") if path.is_file()}
    record = f"releases/{built.release.version}"
    kernel = f"kernels/{built.release.kernel.id}"
    layers = {f"layers/{paths.image_name(layer.kind, layer.digest)}" for layer in built.layers}
    assert names == layers | {
        f"{kernel}/vmlinuz", f"{kernel}/initrd", f"{record}/release.json", f"{record}/layers", paths.SELECTED,
    }  # fmt: skip
    for layer in built.layers:
        with (restored / paths.LAYERS / paths.image_name(layer.kind, layer.digest)).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == layer.digest
