"""Which disks a machine has, what is on them, and which one an installation may take. Part of the node's code.

The kernel's own lists are read (sysfs, mountinfo), so this works where no udev runs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_NOT_DISKS = ("loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtd", "mmcblk0boot")
_LOOKED_AT = 1 << 20  # bytes at the start of a disk that must be zero for it to count as empty


class DiskError(Exception):
    """No disk may be taken; the message says why and what to do. Nothing was written."""


class Disk(NamedTuple):
    device: str  # /dev/vda
    size: int  # bytes
    model: str
    removable: bool
    in_use: str  # why it may never be taken; empty: it may
    content: tuple[str, ...]  # what is on it: partitions, signatures; empty: nothing

    def describe(self) -> str:
        """One line: device, size, model and what is on it."""
        holds = f"holds {', '.join(self.content)}" if self.content else "empty"
        holds = f"in use: {self.in_use}" if self.in_use else holds
        return f"{self.device:<14} {human(self.size):>9}  {self.model or 'no model name':<24}  {holds}"


def human(size: int) -> str:
    """Decimal units, as disks are sold."""
    return f"{size / 1e9:.1f} GB" if size < 1e12 else f"{size / 1e12:.1f} TB"


def find_disks(
    sys: Path = Path("/sys"), dev: Path = Path("/dev"), mounts: Path = Path("/proc/self/mountinfo")
) -> list[Disk]:
    """Every disk that could be written to, by name, with what is on it."""
    used = _used(sys, mounts)
    found = []
    for block in sorted((sys / "block").iterdir()):
        name = block.name
        if name.startswith(_NOT_DISKS) or _text(block / "ro") == "1":
            continue
        size = int(_text(block / "size") or 0) * 512
        if not size:
            continue
        vendor, model = _text(block / "device/vendor"), _text(block / "device/model")
        label = " ".join(f"{'' if vendor.startswith('0x') else vendor} {model}".split())
        in_use = used.get(name, "")
        content = () if in_use else tuple(_content(block, dev / name))
        found.append(Disk(str(dev / name), size, label, _text(block / "removable") == "1", in_use, content))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _used(sys: Path, mounts: Path) -> dict[str, str]:
    """Disks that are mounted, or hold something mounted, by name; also those beneath loop devices' files and swap."""
    used: dict[str, str] = {}
    for line in _text(mounts).splitlines():
        words = line.split()
        place, after = words[4], words[words.index("-") + 1 :]
        source = after[1] if len(after) > 1 else ""
        # btrfs has an anonymous number in the third field: only its source names the device
        numbers = sys / "dev/block" / words[2]
        node = numbers if numbers.exists() else sys / "class/block" / source.removeprefix("/dev/")
        if not node.exists() or (not source.startswith("/dev/") and node != numbers):
            continue
        whole = node.resolve()
        if (whole / "partition").exists():
            whole = whole.parent
        used.setdefault(whole.name, f"mounted on {place}")
    return used


def _content(block: Path, device: Path) -> Iterable[str]:
    partitions = sum(1 for child in block.iterdir() if (child / "partition").exists())
    if partitions:
        yield f"{partitions} partition{'s' if partitions > 1 else ''}"
    signatures = _signatures(device)
    yield from signatures
    if not partitions and not signatures and _first_bytes(device).strip(b"\0"):
        yield "data of an unknown kind"


def _signatures(device: Path) -> list[str]:
    """Names of the partition tables and file systems that wipefs sees. An unreadable disk counts as one with data."""
    done = subprocess.run(
        ["wipefs", "--no-act", "--noheadings", "--output", "TYPE", device], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return ["something that cannot be read"]
    return sorted({line.strip() for line in done.stdout.splitlines() if line.strip()})


def _first_bytes(device: Path) -> bytes:
    try:
        with device.open("rb") as file:
            return file.read(_LOOKED_AT)
    except OSError:
        return b"unreadable"


# --- choosing ------------------------------------------------------------------------------------------------------


def refusal(disk: Disk, needed: int, *, overwrite: bool) -> str:
    """Why this disk may not be taken; empty when it may. `needed` is in bytes."""
    if disk.in_use:
        return f"{disk.device} is in use ({disk.in_use})"
    if disk.size < needed:
        return f"{disk.device} has {human(disk.size)}, at least {human(needed)} are needed"
    if disk.content and not overwrite:
        return f"{disk.device} holds {', '.join(disk.content)}; nothing is overwritten without samepage.overwrite=yes"
    return ""


def choose(disks: Sequence[Disk], named: str, needed: int, *, overwrite: bool) -> Disk:
    """The disk that an unattended installation takes: the one named, otherwise the only one that fits.

    Raises DiskError that names the disks and the reasons.
    """
    listing = "".join(f"\n  {disk.describe()}" for disk in disks) or "\n  none"
    if named:
        device = str(Path(named).resolve()) if Path(named).exists() else named
        chosen = next((disk for disk in disks if disk.device in (named, device)), None)
        if chosen is None:
            raise DiskError(f"there is no disk {named}. Disks of this machine:{listing}")
        if reason := refusal(chosen, needed, overwrite=overwrite):
            raise DiskError(reason)
        return chosen
    fitting = [disk for disk in disks if not disk.removable and not refusal(disk, needed, overwrite=overwrite)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(disk.device for disk in fitting)
        raise DiskError(f"more than one disk could be taken ({names}); name one with samepage.disk=. Disks:{listing}")
    reasons = "".join(f"\n  {refusal(disk, needed, overwrite=overwrite) or disk.describe()}" for disk in disks)
    raise DiskError(f"no disk can be taken:{reasons or ' this machine has none'}")
