"""Looks at the host and names, for everything missing, the exact command that mends it."""

from __future__ import annotations

import getpass
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance import hostsetup
from appliance.run import run

CACHE_NEED = 5_000_000_000  # bytes: package files, unpacked trees, layers of one cold build
DIST_NEED = 700_000_000  # bytes: an ISO and a disk
MEMORY_NEED = 3_000_000_000  # bytes: the build, or one node of 2 GiB
SUBIDS = 65_536

Level = Literal["ok", "missing", "optional"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `missing` stops a build or a boot; `optional` costs a feature or speed; `fix` mends it."""

    topic: str
    level: Level
    detail: str
    fix: str = ""


def examine(project: Path, cache: Path) -> list[Finding]:
    """All findings in the order of the work: tools, permissions, machine."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        packages,
        user_namespaces,
        virtualisation,
        container_engine,
        lambda: disk_space(project, cache),
        lambda: memory(Path("/proc/meminfo").read_text(encoding="ascii")),
    )
    return [finding for check in checks for finding in check()]


def packages() -> Iterator[Finding]:
    """The host packages of every set."""
    for name, members in hostsetup.SETS.items():
        absent = [package.name for package in members if not package.installed]
        if not members:
            continue
        if absent:
            level: Level = "optional" if name in hostsetup.OPTIONAL_SETS else "missing"
            yield Finding(f"packages to {name}", level, f"not installed: {', '.join(absent)}", hostsetup.advice(absent))
        else:
            yield Finding(f"packages to {name}", "ok", ", ".join(package.name for package in members))


def user_namespaces(
    uid: int | None = None, proc: Path = Path("/proc/sys"), etc: Path = Path("/etc")
) -> Iterator[Finding]:
    """Whether the build can own files as other users without being root."""
    topic = "user namespaces"
    if (os.geteuid() if uid is None else uid) == 0:
        yield Finding(topic, "ok", "not needed: root builds without them")
        return
    user = getpass.getuser()
    for name, bad, fix in (
        ("kernel/unprivileged_userns_clone", "0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sudo sysctl -w user.max_user_namespaces=15000"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ):
        file = proc / name
        if file.exists() and file.read_text(encoding="ascii").strip() == bad:
            yield Finding(topic, "missing", f"{name.replace('/', '.')} is {bad}: the kernel refuses them to users", fix)
            return
    for name in ("subuid", "subgid"):
        if subordinate(etc / name, user) < SUBIDS:
            option = "--add-subuids" if name == "subuid" else "--add-subgids"
            yield Finding(
                topic, "missing", f"/etc/{name} grants {user} fewer than {SUBIDS} numbers",
                f"sudo usermod {option} 100000-{100000 + SUBIDS - 1} {user}",
            )  # fmt: skip
            return
    if run(["unshare", "--user", "--map-root-user", "true"], check=False).returncode != 0:
        yield Finding(
            topic,
            "missing",
            "unshare --user fails here, in a container perhaps",
            "build as root, or outside of the container",
        )
        return
    yield Finding(topic, "ok", f"usable by {user}")


def subordinate(file: Path, user: str) -> int:
    """How many subordinate numbers the file grants to the user."""
    try:
        rows = [line.split(":") for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return sum(int(row[2]) for row in rows if len(row) == 3 and row[0] in (user, str(os.getuid())) and row[2].isdigit())


def virtualisation(cpuinfo: Path = Path("/proc/cpuinfo"), device: Path = Path("/dev/kvm")) -> Iterator[Finding]:
    """KVM counts only where the processor has vmx or svm: the device alone may hang a guest."""
    flags = set(cpuinfo.read_text(encoding="utf-8").split())
    if not flags & {"vmx", "svm"}:
        yield Finding(
            "hardware virtualisation",
            "optional",
            "the processor shows neither vmx nor svm: nodes are emulated, about 20 times slower",
        )
    elif not device.exists():
        yield Finding(
            "hardware virtualisation",
            "optional",
            f"{device} is missing",
            "sudo modprobe kvm-intel || sudo modprobe kvm-amd",
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding(
            "hardware virtualisation",
            "optional",
            f"{device} is not yours to use",
            f"sudo usermod -aG kvm {getpass.getuser()}, then log in again",
        )
    else:
        yield Finding("hardware virtualisation", "ok", "KVM")


def container_engine() -> Iterator[Finding]:
    """Whether `up --target docker` would find an engine."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=5)
        version = client.version()["Version"]
        client.close()
    except (DockerException, OSError) as error:
        denied = "Permission denied" in str(error)
        if shutil.which("dockerd", path=hostsetup.SYSTEM_PATH) is None:
            fix = hostsetup.advice(["docker.io"])
        elif denied:
            fix = f"sudo usermod -aG docker {getpass.getuser()}, then log in again"
        else:
            managed = Path("/run/systemd/system").is_dir()
            fix = "sudo systemctl start docker" if managed else "sudo sh -c 'dockerd >/var/log/dockerd.log 2>&1 &'"
        yield Finding(
            "container engine", "optional", "permission denied" if denied else "no Docker engine answers", fix
        )
        return
    yield Finding("container engine", "ok", f"Docker {version}")


def disk_space(project: Path, cache: Path) -> Iterator[Finding]:
    """Room for a cold build, by file system."""
    for topic, folder, need, variable in (
        (
            "space for the cache",
            cache,
            CACHE_NEED,
            "set SAMEPAGE_CACHE to a folder with more room, or run: ./build.py clean --cache",
        ),
        ("space for dist/", project, DIST_NEED, "make room, or write elsewhere with: ./build.py iso --output-dir DIR"),
    ):
        free = free_bytes(folder)
        text = f"{free / 1e9:.1f} GB free at {folder}, {need / 1e9:.1f} GB wanted"
        yield Finding(topic, "ok" if free >= need else "missing", text, "" if free >= need else variable)


def free_bytes(folder: Path) -> int:
    """Free space for this user at the folder, or at the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def memory(meminfo: str) -> Iterator[Finding]:
    """Available memory, from the text of /proc/meminfo."""
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    text = f"{available / 1e9:.1f} GB available, {MEMORY_NEED / 1e9:.1f} GB wanted"
    if available >= MEMORY_NEED:
        yield Finding("memory", "ok", text)
    else:
        yield Finding(
            "memory", "optional", text, "end other programs, or give nodes less with: ./build.py up --memory 1024"
        )
