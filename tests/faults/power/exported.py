"""A disk of this host whose writes are logged, without a virtual machine: qemu-storage-daemon and a loop device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appliance.errors import ApplianceError
from appliance.run import run

WAIT = 20  # seconds


def block_devices(image: Path, form: str, log: Path) -> list[str]:
    """The -blockdev values of a disk called "logged" over an image. An empty log must exist.

    Flushes end at once, or the writes that end meanwhile would be logged before them, as if the flush held for them.
    """
    quick = "cache.no-flush=on,discard=unmap"
    image_node = [f"driver=file,node-name=image,filename={image},{quick}"]
    if form != "raw":
        image_node += [f"driver={form},node-name=format,file=image,{quick}"]
    return [
        *image_node,
        f"driver=file,node-name=log,filename={log},{quick}",
        f"driver=blklogwrites,node-name=logged,file={'image' if form == 'raw' else 'format'},log=log,discard=unmap",
    ]


@contextmanager
def logged_device(image: Path, log: Path, folder: Path) -> Iterator[str]:
    """A loop device over the raw image; everything written to it is in the log."""
    window, pid = folder / "window", folder / "daemon.pid"
    for file in (window, log):
        file.touch()
    blocks = [word for value in block_devices(image, "raw", log) for word in ("--blockdev", value)]
    export = f"type=fuse,id=window,node-name=logged,mountpoint={window},writable=on"
    words = ["qemu-storage-daemon", *blocks, "--export", export, "--pidfile", str(pid), "--daemonize"]
    run(words, timeout=WAIT, hint="install qemu-system-common; /dev/fuse must be there")
    try:
        device = run(["losetup", "--find", "--show", window]).stdout.decode().strip()
        try:
            yield device
        finally:
            run(["losetup", "--detach", device])
    finally:
        number = int(pid.read_text())
        os.kill(number, 15)
        end = time.monotonic() + WAIT
        while Path(f"/proc/{number}").exists() and time.monotonic() < end:
            time.sleep(0.02)
        with suppress(ApplianceError):  # it is gone with the daemon, unless the daemon died
            run(["umount", window])


def missing() -> str:
    """Why disks cannot be looked into here; empty where they can."""
    import shutil

    if os.geteuid() != 0:
        return "only root can mount a disk image"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices here"
    if "btrfs" not in Path("/proc/filesystems").read_text().split():
        return "the kernel of this host has no btrfs"
    absent = [name for name in ("losetup", "qemu-img", "qemu-storage-daemon") if shutil.which(name) is None]
    return f"missing: {', '.join(absent)}" if absent else ""


def missing_export() -> str:
    return missing() or ("" if Path("/dev/fuse").exists() else "there is no /dev/fuse here")
