"""Trying a release by a restart, so that the old one comes back by itself. Part of the node's own code.

A trial has a deadline that nothing in it can move: the kernel's software watchdog is armed before the restart (by this
program, or for another kernel by the initramfs) and switched off by whoever finds the release healthy. Until then a
power-on boots the old release.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess

from appliance.node.upgrade import mounts
from appliance.node.upgrade.services import run, systemctl

MARK = "/run/samepage/trial"  # there during a trial; the initramfs makes it too
HEALTH_FILE = "/run/samepage/health.json"
RELEASE_FILE = "/run/samepage/release.json"
WORD = "samepage.trial"  # on the kernel's command line: seconds of the trial
_WATCHDOGS = "/sys/class/watchdog"
_SOFTDOG = "Software Watchdog"
_SETTIMEOUT = 0xC0045706  # WDIOC_SETTIMEOUT of linux/watchdog.h
_ESP = "/run/samepage/esp"
_ESP_NUMBER = "2"
_BLOCK_SIZE = 1024  # of GRUB's environment block


class TrialError(OSError):
    """The trial cannot begin; nothing has changed."""


# --- the watchdog ----------------------------------------------------------------------------------------------------


def _softdog() -> str:
    """Device of the software watchdog; empty where it is not loaded."""
    for name in sorted(os.listdir(_WATCHDOGS)) if os.path.isdir(_WATCHDOGS) else ():
        try:
            with open(f"{_WATCHDOGS}/{name}/identity", encoding="ascii") as file:
                if file.read().strip() == _SOFTDOG:
                    return f"/dev/{name}"
        except OSError:
            continue
    return ""


def ready() -> str:
    """Load the watchdog, which takes a while; its device, empty where this kernel has none."""
    if not (device := _softdog()):
        subprocess.run(["modprobe", "-q", "softdog", "nowayout=0"], check=False)
        device = _softdog()
    return device


def arm(seconds: int) -> None:
    """Restart the machine in so many seconds, whatever happens, unless `disarm` comes first. Raises TrialError."""
    device = ready()
    if not device:
        raise TrialError(19, "this kernel has no software watchdog")
    with open(device, "wb", buffering=0) as file:
        fcntl.ioctl(file, _SETTIMEOUT, struct.pack("i", seconds))
        file.write(b".")


def disarm() -> None:
    """Switch the watchdog off, where it runs."""
    if device := _softdog():
        with open(device, "wb", buffering=0) as file:
            file.write(b"V")


# --- one boot of another kernel --------------------------------------------------------------------------------------


def environment(entry: str) -> bytes:
    """GRUB's environment block that chooses an entry once."""
    return f"# GRUB Environment Block\nnext_entry={entry}\n".encode().ljust(_BLOCK_SIZE, b"#")


def boot_once(device: str) -> None:
    """Have GRUB boot try.cfg the next time and only then. `device` is that of the state partition. Raises TrialError.

    The block is overwritten in place: all that counts lies in its first sector, so it is old or new, never torn.
    """
    name = os.path.basename(device)
    disk = os.path.dirname(os.path.realpath(f"/sys/class/block/{name}"))
    for entry in os.listdir(disk):
        number = os.path.join(disk, entry, "partition")
        if os.path.exists(number):
            with open(number, encoding="ascii") as file:
                if file.read().strip() == _ESP_NUMBER:
                    return _write_environment(f"/dev/{entry}")
    raise TrialError(2, f"the disk of {device} has no EFI system partition")


def _write_environment(esp: str) -> None:
    os.makedirs(_ESP, exist_ok=True)
    run("mount", "-t", "vfat", "-o", "sync", esp, _ESP)
    try:
        with open(f"{_ESP}/grub/grubenv", "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != _BLOCK_SIZE:
                raise TrialError(22, "GRUB's environment block is damaged; write an empty one")
            file.write(environment("try"))
            os.fsync(file.fileno())
    finally:
        run("umount", _ESP)


# --- restarts --------------------------------------------------------------------------------------------------------


def show_release(manifest: bytes) -> None:
    """Make a release's manifest the one that the node says it runs."""
    with open(RELEASE_FILE + ".new", "wb") as file:
        file.write(manifest)
    os.replace(RELEASE_FILE + ".new", RELEASE_FILE)


def soft_reboot(manifest: bytes, *, trial: bool) -> None:
    """Change to the root at mounts.NEXT_ROOT, without the kernel. Returns at once.

    It keeps the count of units' starts, and one that has used it up would not start: `forget_failures` comes before.
    """
    show_release(manifest)
    if os.path.exists(HEALTH_FILE):
        os.unlink(HEALTH_FILE)
    if trial:
        with open(MARK, "wb"):
            pass
    elif os.path.exists(MARK):
        os.unlink(MARK)
    systemctl("--no-block", "soft-reboot")


def reboot() -> None:
    """Restart with the kernel. Returns at once."""
    mounts.drop_next_root()  # or systemd would take it for the next root
    systemctl("--no-block", "reboot")


def end() -> None:
    """The trial is over."""
    disarm()
    if os.path.exists(MARK):
        os.unlink(MARK)
