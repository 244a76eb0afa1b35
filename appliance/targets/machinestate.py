"""Freezes a running QEMU node into a folder and wakes copies of it, which takes seconds where a boot takes minutes.

The frozen folder holds the node's memory, disks and keys. Each copy writes to overlays of its own.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from appliance.run import run
from appliance.targets.base import REQUEST_FILE, Instance, NodeError, load_request, nodes_folder, save
from appliance.targets.qemu import Qemu, start
from appliance.targets.qmp import Qmp

MEMORY_FILE = "memory"
UNLIMITED = 1 << 40  # bytes per second
KEPT = ("disk.qcow2", "firmware.qcow2", "id_ed25519", "id_ed25519.pub", "known_hosts", REQUEST_FILE)


def freeze(instance: Instance, into: Path, timeout: float = 300) -> None:
    """Writes the node's whole state to the folder and ends the node. Raises NodeError after `timeout` seconds."""
    into.mkdir(parents=True)
    with Qmp(Path(instance.details["sockets"]) / "qmp", timeout=timeout) as qmp:
        qmp.execute("stop")
        qmp.execute("migrate-set-parameters", **{"max-bandwidth": UNLIMITED})
        qmp.execute("migrate", uri=f"exec:cat > '{into / MEMORY_FILE}'")
        _wait(qmp, timeout)
    Qemu().down(instance)
    for name in KEPT:
        if (instance.folder / name).exists():
            shutil.copy2(instance.folder / name, into / name)


def _wait(qmp: Qmp, timeout: float) -> None:
    end = time.monotonic() + timeout
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled") or time.monotonic() > end:
            raise NodeError(f"the virtual machine's memory could not be moved: {status}")
        time.sleep(0.1)


def wake(frozen: Path, project: Path, name: str, timeout: float = 120) -> Instance:
    """Starts a copy of the frozen node under its own name; it goes on where the frozen one stopped."""
    folder = nodes_folder(project) / name
    folder.mkdir(parents=True)
    request = replace(load_request(frozen), name=name)
    try:
        for entry in KEPT:
            source = frozen / entry
            if entry == "disk.qcow2" and source.exists():
                run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", source.resolve(), folder / entry])
            elif source.exists():
                shutil.copy2(source, folder / entry)
        known = folder / "known_hosts"
        known.unlink(missing_ok=True)  # the copy answers on another port
        credentials = {"ssh.authorized_keys.root": (folder / "id_ed25519.pub").read_bytes()}
        instance = start(request, folder, credentials, ["-incoming", f"exec:cat '{frozen.resolve() / MEMORY_FILE}'"])
        try:
            with Qmp(Path(instance.details["sockets"]) / "qmp", timeout=timeout) as qmp:
                end = time.monotonic() + timeout
                while qmp.execute("query-status")["status"] == "inmigrate":
                    if time.monotonic() > end:
                        raise NodeError(f"the node {name!r} did not wake within {timeout:.0f} s")
                    time.sleep(0.1)
                qmp.execute("cont")
        except BaseException:
            Qemu().down(instance)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    save(instance)
    return instance
