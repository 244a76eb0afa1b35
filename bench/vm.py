"""The untuned peer: a Debian VM with the same packages in their default configuration, and QEMU for every boot."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from appliance.apt import Mirrors
from appliance.targets.qemu import hardware_acceleration
from bench.debian import mmdebstrap
from bench.measure import BenchError, measure, remove_tree, scratch

GUEST = Path(__file__).parent / "guest"
MEMORY = 2048  # MiB, as the private-cloud layout gives its node
DISK_SIZE = "3G"
COMMAND_LINE = "root=/dev/vda ro quiet console=ttyS0"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerVm:
    """A bootable untuned Debian: an ext4 disk without partitions, and the kernel and initrd that were made in it."""

    disk: Path
    vmlinuz: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot: seconds of the guest's own clock and of the host's since QEMU started until all services answered."""

    kernel_to_healthy: float
    qemu_to_healthy: float
    memory: int  # bytes in use when idle, 0 where it was not asked for
    services: dict[str, float]


def peer_vm(packages: Sequence[str], cache: Path, mirrors: Mirrors) -> PeerVm:
    """The untuned VM, from the cache where the same one was built before. Needs root, as files keep their owners."""
    key = hashlib.sha256(repr((sorted(packages), COMMAND_LINE, DISK_SIZE)).encode())
    for file in sorted(GUEST.iterdir()):
        key.update(file.read_bytes())
    home = cache / f"untuned-vm-{key.hexdigest()[:16]}"
    if not home.is_dir():
        with scratch(cache, "untuned") as work:
            _build_peer(packages, work, mirrors)
            remove_tree(work / "tree")
            work.rename(home)
    return PeerVm(home / "disk", home / "vmlinuz", home / "initrd")


def _build_peer(packages: Sequence[str], work: Path, mirrors: Mirrors) -> None:
    tree = work / "tree"
    mmdebstrap(packages, tree, mirrors, work / "mmdebstrap.log")
    bench = tree / "opt/bench"
    bench.mkdir(parents=True)
    shutil.copy(GUEST / "ready.py", bench)
    for name in ("ready.service", "blame.service"):
        shutil.copy(GUEST / name, tree / "etc/systemd/system")
        (tree / "etc/systemd/system/multi-user.target.wants" / name).symlink_to(f"/etc/systemd/system/{name}")
    shutil.copy(GUEST / "wired.network", tree / "etc/systemd/network")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    (tree / "etc/hostname").write_text("untuned\n")
    # An installed system has its machine-id: without one every boot here would be a first boot, with presets.
    (tree / "etc/machine-id").write_text(hashlib.md5(b"untuned", usedforsecurity=False).hexdigest() + "\n")
    # As after a first boot: the units that catch up with an updated /usr have nothing to do.
    for marker in ("etc/.updated", "var/.updated"):
        (tree / marker).touch()
    measure(["chroot", tree, "systemctl", "enable", "systemd-networkd.service"], log=work / "enable.log")
    for name in ("vmlinuz", "initrd"):
        (found,) = (tree / "boot").glob("vmlinuz-*" if name == "vmlinuz" else "initrd.img-*")
        shutil.copy(found, work / name)
    measure(["/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, work / "disk", DISK_SIZE], log=work / "mke2fs.log")


def qemu_command(*options: str | Path) -> list[str]:
    """The same machine for every boot that is compared; changes to disks are thrown away."""
    accelerator = ["-accel", "kvm", "-cpu", "host"]
    if not hardware_acceleration():
        accelerator = ["-accel", "tcg,thread=multi", "-cpu", "max"]
    return [
        "qemu-system-x86_64", "-machine", "q35", *accelerator, "-smp", "2", "-m", str(MEMORY), "-display", "none",
        "-monitor", "none", "-no-reboot", "-snapshot", "-netdev", "user,id=net0",
        "-device", "virtio-net-pci,netdev=net0", "-device", "virtio-rng-pci", *map(str, options),
    ]


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background that is ended with the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(look: Callable[[], T | None], process: subprocess.Popen[bytes], timeout: float, what: str) -> T:
    """Poll until `look` gives a value. Raises BenchError after `timeout` seconds or when the machine ended."""
    deadline = time.monotonic() + timeout
    while (found := look()) is None:
        if process.poll() is not None:
            message = process.stderr.read().decode(errors="replace") if process.stderr else ""
            raise BenchError(f"the virtual machine ended before: {what}\n{message}")
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout:g} s: {what}")
        time.sleep(0.1)
    return found


def console_value(text: str, word: str) -> dict[str, float] | None:
    """The JSON that the guest's script printed after `word` on the serial console, once its line is complete."""
    found = re.search(rf"{word} (\{{.*\}})", text)
    return json.loads(found[1]) if found else None


def boot_peer(peer: PeerVm, *, memory: bool = True, blame: Path | None = None, timeout: float = 400) -> Boot:
    """Boot the untuned VM by QEMU's own loader (which spares it the firmware's disk reads) until all services answer.

    With `blame`, systemd's account of the boot is awaited too and the console kept in that file.
    """
    with tempfile.TemporaryDirectory() as folder:
        serial = blame or Path(folder) / "serial"
        serial.write_bytes(b"")
        command = qemu_command(
            "-kernel", peer.vmlinuz, "-initrd", peer.initrd,
            "-append", COMMAND_LINE + (" bench.blame" if blame else ""),
            "-drive", f"file={peer.disk},format=raw,if=virtio", "-serial", f"file:{serial}",
        )

        def said(word: str) -> Callable[[], dict[str, float] | None]:
            return lambda: console_value(serial.read_text(errors="replace"), word)

        started = time.monotonic()
        with running(command) as process:
            ready = wait_for(said("BENCH-READY"), process, timeout, "all services of the untuned VM answer")
            wall = time.monotonic() - started
            idle = wait_for(said("BENCH-MEMORY"), process, 120, "the untuned VM's memory") if memory else {}
            if blame:
                wait_for(
                    lambda: "BENCH-BLAMED" in serial.read_text(errors="replace") or None, process, 120, "the blame list"
                )
    healthy = ready.pop("healthy")
    return Boot(healthy, wall, int(idle.get("used", 0)), ready)
