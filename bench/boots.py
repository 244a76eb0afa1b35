"""From power on until every probe is good, and the memory in use then: the appliance beside an untuned Debian VM."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from appliance.node.health import HEALTH_FILE
from appliance.targets.base import Instance, Request
from appliance.targets.qemu import Qemu
from bench.measure import BenchError, cpu_of, scratch
from bench.report import Figure, of_runs, paired_ratio
from bench.vm import MEMORY, Boot, boot_peer, peer_vm, pid_of
from bench.workshop import Workshop

SETTLE = 30.0  # s from healthy until the memory is read, as in guest/ready.py
HEALTHY = re.compile(r"healthy, \d+ s after the start")


def live(shop: Workshop) -> None:
    """The ISO as a CD. Each boot is a first one: keys, certificate and database are made, which the VM has already."""
    with scratch(shop.cache, "live") as folder:
        compare(shop, "live", Request("bench", shop.iso, "iso", MEMORY), folder)


def installed(shop: Workshop) -> None:
    """An installed node that was booted before, as the VM."""
    with scratch(shop.cache, "installed") as folder:
        compare(shop, "installed", Request("bench", installed_disk(shop.iso, folder), "disk", MEMORY), folder)


def compare(shop: Workshop, bench: str, request: Request, folder: Path) -> None:
    """Appliance and untuned VM in turns: kernel's start to healthy, QEMU's start to healthy, memory in use."""
    peer = peer_vm(shop.packages, shop.cache, shop.mirrors)
    ours: list[Boot] = []
    theirs: list[Boot] = []
    for number in range(shop.rounds):
        theirs.append(boot_peer(peer, folder / f"peer-{number}"))
        ours.append(boot_appliance(request, folder / f"ours-{number}"))
    mine, other = [one.kernel_to_healthy for one in ours], [one.kernel_to_healthy for one in theirs]
    shop.add(
        of_runs(bench, "kernel to healthy", mine, "s"),
        of_runs(bench, "untuned VM, kernel to healthy", other, "s"),
        Figure(bench, "to untuned VM", paired_ratio(mine, other), "x", 0.6),
        of_runs(bench, "QEMU's CPU until healthy", [one.cpu for one in ours], "CPU s", note="firmware and GRUB"),
        of_runs(bench, "untuned VM, QEMU's CPU", [one.cpu for one in theirs], "CPU s", note="-kernel"),
        of_runs(bench, "QEMU to healthy", [one.qemu_to_healthy for one in ours], "s", note="firmware and GRUB"),
        of_runs(bench, "untuned VM, QEMU to healthy", [one.qemu_to_healthy for one in theirs], "s", note="-kernel"),
        of_runs(bench, "memory, idle", [one.memory / 1e6 for one in ours], "MB", 300.0),
        of_runs(bench, "untuned VM, memory, idle", [one.memory / 1e6 for one in theirs], "MB"),
    )


def installed_disk(iso: Path, folder: Path) -> Path:
    """A disk that the ISO installed itself on, after a first boot and a clean shutdown."""
    target, home = Qemu(), folder / "install"
    home.mkdir()
    instance = target.up(Request("bench", iso, "install", MEMORY), home)
    try:
        await_healthy(target, instance, 600)
        target.execute(instance, ["systemctl", "poweroff"])
        until(lambda: target.state(instance) != "running", 120, "the installed node switched itself off")
    finally:
        target.down(instance)
    disk = folder / "installed.qcow2"
    shutil.move(home / "disk.qcow2", disk)
    return disk


def boot_appliance(request: Request, folder: Path) -> Boot:
    """One boot of an image, whose file stays as it is.

    The node is left alone until its console says that it is healthy, because each ssh connection costs an emulated
    processor a second or two; the times come from the node's own record.
    """
    target = Qemu()
    folder.mkdir()
    started = time.monotonic()
    instance = target.up(request, folder)
    try:
        await_healthy(target, instance, 400)
        cpu = cpu_of(pid_of(folder))
        time.sleep(SETTLE)
        script = f"cat /proc/meminfo; echo; cat /proc/uptime; echo; cat {HEALTH_FILE}"
        meminfo, uptime, health = target.execute(instance, ["sh", "-c", script]).stdout.decode().split("\n\n", 2)
        began = time.monotonic() - float(uptime.split()[0])
    finally:
        target.down(instance)
    record = json.loads(health)
    if not record["healthy"]:
        raise BenchError(f"the node says that it is not healthy: {health}")
    seconds = float(record["boot_seconds"])
    return Boot(seconds, began + seconds - started, cpu, memory_in_use(meminfo), {})


def await_healthy(target: Qemu, instance: Instance, timeout: float) -> None:
    """Watch the console, which costs the node nothing."""

    def healthy() -> bool:
        if target.state(instance) != "running":
            raise BenchError(f"the virtual machine ended:\n{target.console(instance)[-1000:]}")
        return bool(HEALTHY.search(target.console(instance)))

    until(healthy, timeout, "the console says that the node is healthy")


def until(done: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll. Raises BenchError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout:g} s: {what}")
        time.sleep(0.2)


def memory_in_use(meminfo: str) -> int:
    """Bytes that are not available to new programs, from the text of /proc/meminfo."""
    pairs = (line.partition(":")[::2] for line in meminfo.splitlines() if line)
    kib = {name: int(rest.split()[0]) for name, rest in pairs}
    return (kib["MemTotal"] - kib["MemAvailable"]) * 1024
