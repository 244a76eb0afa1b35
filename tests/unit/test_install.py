"""The installer: which disks it sees, which one it takes, when it refuses, and that it checks what it copies."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.node import disks, install, paths
from appliance.node.disks import Disk, DiskError, choose, find_disks, refusal
from appliance.node.install import InstallError, Wish, from_kernel
from appliance.node.release import File, KernelRecord, LayerRecord, Manifest, dump, dump_layers
from appliance.node.terminal import Terminal

GB = 10**9


def disk(name: str = "vda", size: int = 16 * GB, **changes: object) -> Disk:
    found = Disk(f"/dev/{name}", size, "QEMU HARDDISK", False, "", ())
    return found._replace(**changes)  # type: ignore[arg-type]


FULL = disk("vdb", content=("2 partitions", "gpt"))


# --- finding -------------------------------------------------------------------------------------------------------


class Machine:
    """A made-up /sys, /dev and mountinfo."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev, self.mounts = root / "sys", root / "dev", root / "mountinfo"
        for folder in ("sys/block", "sys/dev/block", "sys/class/block", "dev"):
            (root / folder).mkdir(parents=True)
        self.mounts.write_text("22 1 0:5 / /proc rw - proc proc rw\n")

    def add(self, name: str, size: int, number: int, partitions: int = 0, **attributes: str) -> None:
        block = self.sys / "block" / name
        for path, text in {"size": str(size // 512), "ro": "0", "removable": "0", **attributes}.items():
            file = block / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        for part in range(1, partitions + 1):
            self._node(f"{name}{part}", block / f"{name}{part}", number * 16 + part)
            (block / f"{name}{part}" / "partition").write_text(f"{part}\n")
        self._node(name, block, number * 16)
        (self.dev / name).write_bytes(bytes(1 << 16))

    def _node(self, name: str, folder: Path, minor: int) -> None:
        folder.mkdir(exist_ok=True)
        (self.sys / "class/block" / name).symlink_to(folder)
        (self.sys / "dev/block" / f"8:{minor}").symlink_to(folder)

    def mount(self, device: str, number: str, place: str) -> None:
        with self.mounts.open("a") as file:
            file.write(f"30 1 {number} / {place} rw,relatime shared:1 - btrfs /dev/{device} rw\n")

    def find(self) -> dict[str, Disk]:
        return {found.device.rsplit("/", 1)[-1]: found for found in find_disks(self.sys, self.dev, self.mounts)}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(disks, "_signatures", lambda device: ["ext4"] if device.name == "sdc" else [])
    return Machine(tmp_path)


def test_disks_are_found_with_size_model_and_content(machine: Machine) -> None:
    machine.add("sda", 16 * GB, 1, device__vendor="ATA", device__model="VBOX HARDDISK")
    machine.add("sdb", 8 * GB, 2, partitions=2, removable="1")
    machine.add("sdc", 8 * GB, 3)
    machine.add("vda", 4 * GB, 4, device__vendor="0x1af4")
    for index, name in enumerate(("loop0", "sr0", "fd0", "ram1", "zram0"), start=5):
        machine.add(name, GB, index)
    machine.add("sdd", 0, 11)
    machine.add("sde", GB, 12, ro="1")
    (machine.dev / "vda").write_bytes(b"\0" * 700 + b"x")
    found = machine.find()
    assert list(found) == ["sda", "sdb", "sdc", "vda"]
    assert (found["sda"].model, found["sda"].content, found["sda"].size) == ("ATA VBOX HARDDISK", (), 16 * GB)
    assert (found["sdb"].content, found["sdb"].removable) == (("2 partitions",), True)
    assert found["sdc"].content == ("ext4",)
    assert (found["vda"].content, found["vda"].model) == (("data of an unknown kind",), "")
    line = found["sda"].describe()
    assert "16.0 GB" in line
    assert line.endswith("empty")


@pytest.mark.parametrize(("device", "number"), [("sda", "8:16"), ("sda2", "8:18"), ("sda2", "0:41")])
def test_the_disk_booted_from_is_never_taken(machine: Machine, device: str, number: str) -> None:
    machine.add("sda", 16 * GB, 1, partitions=2)
    machine.add("sdb", 16 * GB, 2)
    machine.mount(device, number, "/run/samepage/medium")
    found = machine.find()
    assert found["sda"].in_use == "mounted on /run/samepage/medium"
    assert "in use" in refusal(found["sda"], GB, overwrite=True)
    assert not found["sdb"].in_use
    assert choose(list(found.values()), "", GB, overwrite=True).device == found["sdb"].device


# --- choosing ------------------------------------------------------------------------------------------------------


def test_the_only_empty_disk_is_taken() -> None:
    small = disk("vdc", 2 * GB)
    stick = disk("sda", removable=True)
    assert choose([FULL, small, stick, disk()], "", 4 * GB, overwrite=False) == disk()
    assert choose([FULL, disk()], "/dev/vda", 4 * GB, overwrite=False) == disk()
    assert choose([FULL, disk()], "/dev/vdb", 4 * GB, overwrite=True) == FULL


@pytest.mark.parametrize(
    ("disks_here", "named", "overwrite", "message"),
    [
        ([FULL], "", False, r"/dev/vdb holds 2 partitions, gpt; .*samepage.overwrite=yes"),
        ([FULL], "/dev/vdb", False, r"/dev/vdb holds 2 partitions, gpt"),
        ([disk(), disk("vdc")], "", False, r"\(/dev/vda, /dev/vdc\); name one with samepage.disk="),
        ([disk(), FULL], "", True, r"more than one disk"),
        ([disk()], "/dev/sdq", True, r"there is no disk /dev/sdq(?s:.*)/dev/vda"),
        ([disk(size=3 * GB)], "", True, r"/dev/vda has 3.0 GB, at least 4.0 GB are needed"),
        ([disk(size=3 * GB)], "/dev/vda", True, r"at least 4.0 GB"),
        ([disk(in_use="mounted on /state")], "/dev/vda", True, r"/dev/vda is in use \(mounted on /state\)"),
        ([], "", True, r"this machine has none"),
    ],
)
def test_refusals_name_the_disk_and_the_reason(
    disks_here: list[Disk], named: str, overwrite: bool, message: str
) -> None:
    with pytest.raises(DiskError, match=message):
        choose(disks_here, named, 4 * GB, overwrite=overwrite)


def test_kernel_command_line() -> None:
    line = "quiet samepage.install=auto samepage.disk=/dev/vda samepage.overwrite=yes samepage.onfail=poweroff"
    assert from_kernel(line) == Wish(auto=True, disk="/dev/vda", overwrite=True, boot=True, wait=False)
    assert from_kernel("samepage.install=interactive samepage.overwrite=no") == Wish(boot=True)


# --- the conversation ----------------------------------------------------------------------------------------------


class Person:
    """Types answers into a pipe and reads what was said."""

    def __init__(self) -> None:
        self.reader, self._answers = os.pipe()
        self._said, self.writer = os.pipe()

    def types(self, *lines: str) -> None:
        def typing() -> None:
            for line in lines:
                os.write(self._answers, f"{line}\n".encode())
                finished.wait(0.1)
            os.close(self._answers)

        finished = threading.Event()
        threading.Thread(target=typing).start()

    def heard(self) -> str:
        os.close(self.writer)
        with os.fdopen(self._said) as file:
            return file.read()


@pytest.fixture
def person() -> Iterator[Person]:
    somebody = Person()
    yield somebody
    os.close(somebody.reader)


@pytest.fixture
def terminal(person: Person) -> Terminal:
    return Terminal(((person.reader, person.writer),))


def test_a_disk_with_data_needs_the_whole_word(person: Person, terminal: Terminal) -> None:
    person.types("2", "overwrite")
    assert install.ask_for_disk([disk(size=GB), disk("vdc"), FULL], 4 * GB, terminal) == FULL
    said = person.heard()
    assert "   -  /dev/vda" in said
    assert "   2  /dev/vdb" in said
    assert "holds 2 partitions, gpt: all of it will be lost" in said


@pytest.mark.parametrize("answers", [(), ("",), ("0",), ("3",), ("x",), ("1", "no"), ("2", "yes")])
def test_anything_else_calls_it_off(person: Person, terminal: Terminal, answers: tuple[str, ...]) -> None:
    person.types(*answers)
    with pytest.raises(DiskError, match="called off"):
        install.ask_for_disk([disk(), FULL], 4 * GB, terminal)
    person.heard()


def test_what_was_typed_before_a_question_is_no_answer() -> None:
    keyboard, reader = pty.openpty()

    def typing() -> None:
        said = b""
        while b"Which?" not in said:
            said += os.read(keyboard, 4096)
        os.write(keyboard, b"none\n")

    os.write(keyboard, b"1\n")
    assert select.select([reader], [], [], 10)[0], "nothing was typed ahead"
    person = threading.Thread(target=typing)
    person.start()
    assert Terminal(((reader, reader),)).ask("Which? ") == "none"
    person.join()
    os.close(keyboard)
    os.close(reader)


def test_refusal_is_said_and_is_a_status(
    person: Person, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = live_system(tmp_path)
    monkeypatch.setattr(install, "read_source", lambda: source)
    monkeypatch.setattr(install, "find_disks", lambda: [FULL])
    assert install.converse(Wish(auto=True), terminal) == 2
    said = person.heard()
    assert "Samepage 1.2.0: installation" in said
    assert "/dev/vdb holds" in said
    assert "Nothing was written." in said


def test_failure_is_said_and_is_a_status(
    person: Person, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise InstallError("sfdisk ended with status 1")

    source = live_system(tmp_path)
    monkeypatch.setattr(install, "read_source", lambda: source)
    monkeypatch.setattr(install, "find_disks", lambda: [disk()])
    monkeypatch.setattr(install, "install", broken)
    assert install.converse(Wish(auto=True), terminal) == 1
    said = person.heard()
    assert "Installing on /dev/vda" in said
    assert "Installation FAILED: sfdisk ended with status 1" in said


# --- copying -------------------------------------------------------------------------------------------------------


def live_system(root: Path) -> install.Source:
    """A medium and /run/samepage with a release of tiny files."""
    run = root / "run"
    medium = run / "medium" / paths.MEDIUM_ROOT
    kernel_folder = medium / paths.KERNELS / "k1"
    record = medium / paths.RELEASES / "1.2.0"
    for folder in (kernel_folder, record):
        folder.mkdir(parents=True)

    def put(path: Path, content: bytes) -> File:
        path.write_bytes(content)
        return File(hashlib.sha256(content).hexdigest(), len(content))

    vmlinuz, initrd = put(kernel_folder / "vmlinuz", b"kernel"), put(kernel_folder / "initrd", b"initrd")
    kinds = ("base", "app", "config")
    layers = tuple(LayerRecord(kind, "", hashlib.sha256(kind.encode()).hexdigest(), 4) for kind in kinds)
    other = LayerRecord("config", "other", "9" * 64, 4)
    manifest = Manifest(
        "1.2.0", "private-cloud", "amd64", 1, 0, (*layers, other), KernelRecord("k1", "6", "quiet", vmlinuz, initrd), ()
    )
    (record / "layers").write_bytes(dump_layers(layers))
    (run / "release.json").write_bytes(dump(manifest))
    (run / "mode").write_text("live\n")
    return install.read_source(run)


def test_source_knows_its_files_and_needs_room(tmp_path: Path) -> None:
    source = live_system(tmp_path)
    assert [place for _, place, _ in source.files()][:2] == ["kernels/k1/vmlinuz", "kernels/k1/initrd"]
    assert [record.node for record in source.records] == ["", "", ""]
    assert source.needed >= 4 * GB


def test_only_a_live_system_installs(tmp_path: Path) -> None:
    live_system(tmp_path)
    (tmp_path / "run" / "mode").write_text("installed\n")
    with pytest.raises(DiskError, match="runs from its disk"):
        install.read_source(tmp_path / "run")
    (tmp_path / "run" / "release.json").write_text("{}")
    with pytest.raises(DiskError, match="cannot be read"):
        install.read_source(tmp_path / "run")


def test_copy_checks_the_digest(tmp_path: Path) -> None:
    source = tmp_path / "layer"
    source.write_bytes(b"x" * 100_000)
    reported: list[int] = []
    good = File(hashlib.sha256(source.read_bytes()).hexdigest(), 100_000)
    install.copy(source, tmp_path / "copy", good, reported.append)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert sum(reported) == 100_000
    with pytest.raises(InstallError, match="damaged"):
        install.copy(source, tmp_path / "other", File("0" * 64, 100_000), reported.append)


def test_credentials_of_the_config_drive_are_kept_private(tmp_path: Path) -> None:
    given, kept = tmp_path / "given", tmp_path / "kept"
    install._keep_credentials(given, kept)
    assert not kept.exists()
    given.mkdir()
    (given / "ssh.authorized_keys.root").write_text("ssh-ed25519 AAAA")
    install._keep_credentials(given, kept)
    file = kept / "ssh.authorized_keys.root.cred"
    assert file.read_text() == "ssh-ed25519 AAAA"
    assert (kept.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o400)
