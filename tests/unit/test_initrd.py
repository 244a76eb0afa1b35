"""The initial RAM disk: its format, its modules and its script."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import initrd
from appliance.errors import ApplianceError
from appliance.initrd import Entry

KERNEL = "6.12.0-test"


def unpack(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int], int]]:
    """Reads a newc archive: path -> (mode, content, device, mtime)."""
    found = {}
    position = 0
    while True:
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[start : start + 8], 16) for start in range(position + 6, position + 110, 8)]
        _, mode, uid, gid, _, mtime, size, _, _, major, minor, length, check = fields
        assert (uid, gid, check) == (0, 0, 0)
        name = archive[position + 110 : position + 109 + length].decode()
        start = position + (110 + length + 3) // 4 * 4
        position = start + (size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert not archive[position:].strip(b"\0")
            return found
        assert name not in found
        found[name] = (mode, archive[start : start + size], (major, minor), mtime)


NAMES = st.text("abc.-_é", min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(PATHS, st.binary(max_size=40), max_size=8))
def test_archive_reads_back_as_written(files: dict[str, bytes]) -> None:
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    plain = {path: content for path, content in files.items() if path not in folders}
    found = unpack(initrd.pack([initrd.plain(path, content) for path, content in plain.items()]))
    assert {path: entry[1] for path, entry in found.items() if stat.S_ISREG(entry[0])} == plain
    assert list(found) == sorted(found)
    for path in found:
        assert all(str(parent) in found for parent in Path(path).parents if str(parent) != ".")


def test_archive_is_what_cpio_reads() -> None:
    archive = initrd.pack(
        [
            initrd.program("init", b"#!/bin/sh\n"), initrd.link("bin/sh", "busybox"),
            Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        ]
    )  # fmt: skip
    cpio = ["cpio", "-tv", "--numeric-uid-gid", "--quiet"]
    lines = subprocess.run(cpio, input=archive, capture_output=True, check=True).stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["drwxr-xr-x", "lrwxrwxrwx", "drwxr-xr-x", "crw-------", "-rwxr-xr-x"]
    assert lines[1].endswith("bin/sh -> busybox")
    assert "5,   1" in lines[3]
    assert len(archive) % 512 == 0


def test_order_of_arrival_does_not_matter() -> None:
    one = [initrd.plain("b", b"2"), initrd.plain("a/c", b"1")]
    assert initrd.pack(one) == initrd.pack(reversed(one))


# --- modules -------------------------------------------------------------------------------------------------------

DEPENDENCIES = {
    "kernel/drivers/scsi/sd_mod.ko": ["kernel/drivers/scsi/scsi_mod.ko"],
    "kernel/drivers/scsi/scsi_mod.ko": [],
    "kernel/drivers/scsi/BusLogic.ko": ["kernel/drivers/scsi/scsi_mod.ko"],
    "kernel/fs/btrfs/btrfs.ko": ["kernel/lib/raid6/raid6_pq.ko"],
    "kernel/lib/raid6/raid6_pq.ko": [],
    "kernel/crypto/crc32c_generic.ko": [],
    "kernel/arch/x86/crypto/crc32c-intel.ko": [],
    "kernel/drivers/net/unused.ko": [],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A base tree with a few modules, busybox and klibc."""
    modules = tmp_path / initrd.MODULES / KERNEL
    for path in DEPENDENCIES:
        (modules / path).parent.mkdir(parents=True, exist_ok=True)
        (modules / path).write_bytes(b"\x7fELF" + path.encode())
    lines = [f"{path}: {' '.join(needs)}".rstrip() for path, needs in DEPENDENCIES.items()]
    (modules / "modules.dep").write_text("\n".join(lines) + "\n")
    (modules / "modules.alias").write_text(
        "# comment\nalias pci:v0000104Bd00001040* BusLogic\nalias crypto-crc32c crc32c_generic\n"
        "alias crypto-crc32c crc32c_intel\nalias scsi:t-0x00* sd_mod\nalias pci:v1* unused\n"
    )
    (modules / "modules.softdep").write_text("# comment\nsoftdep btrfs pre: crypto-crc32c post: unused\n")
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    for path in (initrd.BUSYBOX, initrd.FILE_MOUNT, "usr/lib/klibc-abc.so"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return tmp_path


def names(files: tuple[str, ...]) -> set[str]:
    return {initrd.module_name(file) for file in files}


def test_closure_follows_dependencies_and_soft_dependencies(tree: Path) -> None:
    index = initrd.read_index(tree / initrd.MODULES / KERNEL)
    assert names(initrd.closure(index, ["sd_mod"])) == {"sd_mod", "scsi_mod"}
    assert names(initrd.closure(index, ["btrfs"])) == {"btrfs", "raid6_pq", "crc32c_generic", "crc32c_intel"}
    assert names(initrd.closure(index, ["buslogic"])) == {"BusLogic", "scsi_mod"}
    assert initrd.closure(index, ["virtio-pci"]) == ()  # built in


def test_closure_names_every_missing_module(tree: Path) -> None:
    index = initrd.read_index(tree / initrd.MODULES / KERNEL)
    with pytest.raises(ApplianceError, match="nvme, ahci") as caught:
        initrd.closure(index, ["nvme", "sd_mod", "ahci"])
    assert caught.value.hint


def test_ram_disk_holds_script_tools_and_chosen_modules(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initrd, "WANTED_MODULES", ("btrfs", "sd_mod", "virtio_pci"))
    out = initrd.build(tree, tree / "initrd")
    found = unpack(out.read_bytes())
    folder = f"lib/modules/{KERNEL}"
    assert found["init"][1] == initrd.SCRIPT.read_bytes()
    assert stat.S_IMODE(found["init"][0]) == 0o755
    assert found["bin/busybox"][1] == initrd.BUSYBOX.encode()
    assert "usr/lib/klibc-abc.so" in found
    assert f"{folder}/kernel/drivers/net/unused.ko" not in found
    assert found[f"{folder}/kernel/fs/btrfs/btrfs.ko"][1].startswith(b"\x7fELF")
    dependencies = found[f"{folder}/modules.dep"][1].decode()
    assert "kernel/fs/btrfs/btrfs.ko: kernel/lib/raid6/raid6_pq.ko\n" in dependencies
    assert "unused" not in dependencies + found[f"{folder}/modules.alias"][1].decode()
    assert {entry[3] for entry in found.values()} == {0}
    assert initrd.build(tree, tree / "again").read_bytes() == out.read_bytes()


def lose_index(tree: Path) -> None:
    (tree / initrd.MODULES / KERNEL / "modules.softdep").unlink()


def lose_busybox(tree: Path) -> None:
    (tree / initrd.BUSYBOX).unlink()


def add_kernel(tree: Path) -> None:
    (tree / initrd.MODULES / "6.13").mkdir()
    (tree / initrd.MODULES / "6.13" / "modules.dep").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lose_index, "modules.softdep"), (lose_busybox, "/usr/bin/busybox"), (add_kernel, "6.12.0-test, 6.13")],
)
def test_spoiled_base_is_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(initrd, "WANTED_MODULES", ("sd_mod",))
    spoil(tree)
    with pytest.raises(ApplianceError, match=re.escape(message)) as caught:
        list(initrd.entries(tree))
    assert caught.value.hint


def test_compressed_modules_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initrd, "WANTED_MODULES", ("packed",))
    index = tree / initrd.MODULES / KERNEL / "modules.dep"
    index.write_text("kernel/packed.ko.xz:\n")
    with pytest.raises(ApplianceError, match="compressed"):
        list(initrd.entries(tree))


# --- the script ----------------------------------------------------------------------------------------------------


def test_script_is_valid_shell() -> None:
    subprocess.run(["sh", "-n", initrd.SCRIPT], check=True)


def test_every_command_of_the_script_is_in_the_ram_disk() -> None:
    text = re.sub(r"\$\(\([^)]*\)\)|\$\{[^}]*\}|(^|\s)#.*|'[^']*'|\"[^\"]*\"", " ", initrd.SCRIPT.read_text())
    functions = set(re.findall(r"^(\w+)\(\)", text, re.MULTILINE))
    keywords = {"if", "then", "else", "fi", "while", "do", "done", "for", "case", "esac", "in"}
    builtins = {"return", "continue", "local", "read", "echo", "set", "wait", "exec"}
    known = functions | keywords | builtins | set(initrd.APPLETS) | {"file_mount"}
    used = set(re.findall(r"(?:^|[;&|({]|\bthen\b|\bdo\b|\belse\b|\bif\b|!)\s*([a-z_]+)(?=\s)", text, re.MULTILINE))
    assert used - known == set()
    assert set(initrd.APPLETS) - {"sh"} <= set(re.findall(r"[a-z_]+", text))
