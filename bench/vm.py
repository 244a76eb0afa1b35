"""The untuned peer: a Debian VM with the same packages in their default configuration."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.apt import Mirrors
from appliance.targets.base import Request
from appliance.targets.qemu import Qemu, prepare_disks, start
from bench.debian import mmdebstrap
from bench.measure import BenchError, cpu_of, measure, remove_tree, scratch

GUEST = Path(__file__).parent / "guest"
MEMORY = 2048  # MiB, as the private-cloud layout gives its node
DISK_SIZE = "3G"
COMMAND_LINE = "root=/dev/vda ro quiet console=ttyS0"


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
    cpu: float  # CPU seconds of QEMU until then, which other load on the host changes least
    memory: int  # bytes in use when idle
    services: dict[str, float]  # seconds of the guest's clock when each service answered first, where that is known


def peer_vm(packages: Sequence[str], cache: Path, mirrors: Mirrors) -> PeerVm:
    """The untuned VM, from the cache where the same one was built before. Needs root, as files keep their owners."""
    key = hashlib.sha256(repr((sorted(packages), COMMAND_LINE, DISK_SIZE)).encode())
    for file in (*sorted(GUEST.iterdir()), Path(__file__)):
        key.update(file.read_bytes())
    home = cache / f"untuned-{key.hexdigest()[:16]}"
    if not home.is_dir():
        for stale in cache.glob("untuned-*"):
            remove_tree(stale)
        with scratch(cache, "untuned") as work:
            _build(packages, work, mirrors)
            remove_tree(work / "tree")
            work.rename(home)
    return PeerVm(home / "disk", home / "vmlinuz", home / "initrd")


def _build(packages: Sequence[str], work: Path, mirrors: Mirrors) -> None:
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
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (found,) = (tree / "boot").glob(pattern)
        shutil.copy(found, work / name)
    measure(["/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, work / "disk", DISK_SIZE], log=work / "mke2fs.log")


def pid_of(folder: Path) -> int:
    """The QEMU process of the machine whose files are in `folder`."""
    return int((folder / "pid").read_text())


def console_value(text: str, word: str) -> dict[str, float] | None:
    """The JSON that guest/ready.py printed after `word` on the serial console, once its line is complete."""
    found = re.search(rf"^{word} (\{{.*\}})", text, re.MULTILINE)
    return json.loads(found[1]) if found else None


def boot_peer(peer: PeerVm, folder: Path, *, blame: bool = False, timeout: float = 400) -> Boot:
    """Boot the untuned VM in the machine that the appliance gets, until all services answer and memory is read.

    QEMU loads kernel and initrd itself, which spares the VM the firmware's disk reads. `folder` is made, and left to
    the caller with the console's log in it; with `blame` that holds systemd's account of the boot too.
    """
    folder.mkdir()
    request = Request("untuned", peer.disk, "disk", MEMORY)
    prepare_disks(request, folder)
    line = COMMAND_LINE + (" bench.blame" if blame else "")
    target, started = Qemu(), time.monotonic()
    loader = ("-kernel", str(peer.vmlinuz), "-initrd", str(peer.initrd), "-append", line)
    instance = start(request, folder, {}, loader)
    wall = cpu = 0.0
    try:
        while True:
            text = target.console(instance)
            ready, memory = console_value(text, "BENCH-READY"), console_value(text, "BENCH-MEMORY")
            if ready and not wall:
                wall, cpu = time.monotonic() - started, cpu_of(pid_of(folder))
            if ready and memory and (not blame or "BENCH-BLAMED" in text):
                break
            if target.state(instance) != "running" or time.monotonic() > started + timeout:
                raise BenchError(f"the untuned VM did not become ready:\n{text[-1000:]}")
            time.sleep(0.2)
    finally:
        target.down(instance)
    return Boot(ready.pop("healthy"), wall, cpu, int(memory["used"]), ready)
