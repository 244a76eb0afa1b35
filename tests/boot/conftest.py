"""The machines of the boot tests. Boots are slow, so one build and two installed nodes serve all tests.

`node` was installed from the menu of the CD under BIOS; `second` by kernel command line over a disk with data, and runs
under UEFI.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.console import Console
from appliance.pipeline import Options, build_iso
from appliance.run import run
from appliance.targets import base, qemu
from appliance.targets.qmp import Serial

PROJECT = Path(__file__).parents[2]
DEADLINE = 900  # seconds that a boot, or an installation, may take on a slow machine that does other work too
GIB = 1 << 30

TARGET = qemu.Qemu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.boot)
            item.add_marker(pytest.mark.timeout(2 * DEADLINE))


@dataclass(frozen=True)
class Node:
    """A booted node: its URL and commands on it."""

    instance: base.Instance

    @property
    def url(self) -> str:
        return self.instance.url.rstrip("/")

    def ssh(self, command: str) -> str:
        """What a shell command prints on the node, run as root; fails the test when the command fails."""
        done = TARGET.execute(self.instance, ["sh", "-c", command])
        assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr).decode(errors='replace')}"
        return done.stdout.decode()

    def wait(self) -> None:
        base.wait_healthy(TARGET, self.instance, DEADLINE)

    def serial(self) -> Serial:
        return Serial(Path(self.instance.details["sockets"]) / "serial")

    def restart(self) -> None:
        """Restart from inside and wait until the new boot is healthy."""
        before = self.ssh("cat /proc/sys/kernel/random/boot_id")
        TARGET.execute(self.instance, ["systemctl", "reboot"])
        end_of_boot(self, before)
        self.wait()


def end_of_boot(node: Node, boot: str) -> None:
    """Wait until commands no longer reach the boot with that id."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        done = TARGET.execute(node.instance, ["cat", "/proc/sys/kernel/random/boot_id"])
        if done.returncode == 0 and done.stdout.decode() != boot:
            return
        time.sleep(2)
    raise AssertionError("the node did not restart")


Start = Callable[..., Node]


@pytest.fixture(scope="package")
def iso(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ISO in SAMEPAGE_ISO, so that a finished image can be tested; otherwise this checkout's."""
    if finished := os.environ.get("SAMEPAGE_ISO"):
        return Path(finished)
    return build_iso(Options(PROJECT, output=tmp_path_factory.mktemp("dist")), Console("none")).artifact.path


@pytest.fixture(scope="package")
def _machines() -> Iterator[Start]:
    """Starts virtual machines; all are gone at the end. `extra` are QEMU's words, `backing` a disk with content."""
    started: list[Node] = []

    def start(
        name: str, image: Path, kind: str = "install", *, firmware: str = "bios", extra: Sequence[str] = (),
        backing: str = "", **hardware: str,
    ) -> Node:  # fmt: skip
        folder = Path(tempfile.mkdtemp(prefix=f"samepage-{name}-"))
        request = base.Request(name, image, kind=kind, firmware=firmware, hardware=hardware)  # type: ignore[arg-type]  # kind is a word
        key = TARGET._make_key(folder)
        qemu.prepare_disks(request, folder)
        if backing:
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, folder / "disk.qcow2"])
        node = Node(qemu.start(request, folder, {"ssh.authorized_keys.root": key}, extra))
        started.append(node)
        return node

    yield start
    for node in started:
        stop(node)


def stop(node: Node) -> None:
    TARGET.down(node.instance)
    shutil.rmtree(node.instance.folder, ignore_errors=True)


@pytest.fixture(scope="package")
def machines(_machines: Start) -> Start:
    return _machines


@pytest.fixture
def machine(_machines: Start) -> Iterator[Start]:
    """Like `machines`, but what it starts ends with the test."""
    mine: list[Node] = []

    def start(*arguments: object, **options: object) -> Node:
        mine.append(_machines(*arguments, **options))
        return mine[-1]

    yield start
    for node in mine:
        stop(node)


@contextmanager
def choose(node: Node, key: str) -> Iterator[Serial]:
    """Press a key in the medium's menu, on the serial console; gives the console.

    A key can get lost while firmware and menu still draw: the menu counts on then, and a person presses again.
    """
    with node.serial() as serial:
        serial.expect("unattended", DEADLINE)
        seen = ""
        while not seen.startswith("Samepage"):
            serial.type(key)
            seen = serial.expect(r"automatically in [0-2]s|Booting `.*'|Samepage \S+ \.\.\.", DEADLINE).group()
            assert not seen.startswith("Booting"), f"the menu took no key {key}: {seen}"
        yield serial


CREDENTIAL = "samepage.test"  # on the config drive of `node`
CREDENTIAL_VALUE = b"from the drive\n"


@pytest.fixture(scope="package")
def config_drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FAT disk that carries one credential."""
    folder = tmp_path_factory.mktemp("config")
    image, credential = folder / "config.img", folder / f"{CREDENTIAL}.cred"
    credential.write_bytes(CREDENTIAL_VALUE)
    image.write_bytes(bytes(1440 << 10))
    run(["mformat", "-i", image, "-f", "1440", "-v", "SAMEPAGECFG", "::"])
    run(["mcopy", "-i", image, credential, "::"])
    return image


@pytest.fixture(scope="package")
def node(iso: Path, machines: Start, config_drive: Path) -> Node:
    """Installed from the CD's menu under BIOS, restarted by the installer, started from its disk."""
    drive = ["-drive", f"if=none,id=config,format=raw,file={config_drive}", "-device", "virtio-blk-pci,drive=config"]
    made = machines("node", iso, extra=drive)
    with choose(made, "u") as serial:
        serial.expect(r"Installing on /dev/vda .*empty", DEADLINE)
        serial.expect(r"Samepage \S+ is installed on /dev/vda", DEADLINE)
        serial.expect(r"\(selected\)", DEADLINE)  # GRUB of the disk
    made.wait()
    return made


@pytest.fixture(scope="package")
def disk_with_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that holds a file system of somebody's."""
    folder = tmp_path_factory.mktemp("data")
    raw, image = folder / "data.raw", folder / "data.qcow2"
    with raw.open("wb") as file:
        file.truncate(16 * GIB)
    run(["mke2fs", "-q", "-t", "ext4", "-L", "precious", "-E", "lazy_itable_init=1,nodiscard", raw])
    run(["qemu-img", "convert", "-O", "qcow2", raw, image])
    raw.unlink()
    return image


def direct(iso: Path, folder: Path, words: str) -> list[str]:
    """QEMU's words that start the ISO's kernel with more words on its command line, without the menu."""
    kernel, initrd, line = qemu.kernel_of_iso(iso, folder)
    return ["-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"{line} {words}"]


NICS = ("e1000", "e1000e", "pcnet", "vmxnet3")


@pytest.fixture(scope="package")
def second(iso: Path, machines: Start, disk_with_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Installed by kernel command line over a disk with data, then started under UEFI with all usual network cards."""
    folder = tmp_path_factory.mktemp("second")
    words = "samepage.install=auto samepage.disk=/dev/vda samepage.overwrite=yes samepage.onfail=poweroff"
    installer = machines("second-install", iso, extra=direct(iso, folder, words), backing=str(disk_with_data))
    qemu.wait_installed(installer.instance, DEADLINE)
    TARGET.down(installer.instance)
    disk = (installer.instance.folder / "disk.qcow2").rename(folder / "disk.qcow2")
    # a network of its own for each, or answers would leave by the wrong card
    networks = [f"user,model={card},net=10.0.{number}.0/24" for number, card in enumerate(NICS, start=10)]
    cards = [word for network in networks for word in ("-nic", network)]
    made = machines("second", disk, "disk", firmware="uefi", extra=cards)
    made.wait()
    return made
