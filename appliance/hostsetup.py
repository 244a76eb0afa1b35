"""The only list of what the builder needs from the host's distribution, and how to install it.

Standard library only: `build.py` uses it before the virtual environment exists, `doctor` to say what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class HostPackage(NamedTuple):
    """A Debian package; it counts as installed when one of `proofs` (program names or absolute paths) is there."""

    name: str
    proofs: tuple[str, ...]
    purpose: str

    @property
    def installed(self) -> bool:
        return any(
            Path(proof).exists() if proof.startswith("/") else shutil.which(proof, path=SYSTEM_PATH) is not None
            for proof in self.proofs
        )


# Each set includes those before it.
SETS: dict[str, tuple[HostPackage, ...]] = {
    "python": (),
    "build": (
        HostPackage("mmdebstrap", ("mmdebstrap",), "unpacks the appliance's packages into a tree"),
        HostPackage("uidmap", ("newuidmap",), "lets the build own files as other users without root"),
        HostPackage(
            "debian-archive-keyring",
            ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"),
            "verifies the package archive",
        ),
        HostPackage("ca-certificates", ("/etc/ssl/certs/ca-certificates.crt",), "reaches package archives over HTTPS"),
    ),
    "boot": (
        HostPackage("qemu-system-x86", ("qemu-system-x86_64",), "runs the appliance as a virtual machine"),
        HostPackage("qemu-utils", ("qemu-img",), "makes virtual disks"),
        HostPackage("ovmf", ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"), "UEFI firmware"),
        HostPackage("openssh-client", ("ssh",), "logs in to a node"),
    ),
    "test": (
        HostPackage("chromium", ("chromium", "google-chrome"), "shows the web page to its test"),
        HostPackage("chromium-driver", ("chromedriver",), "drives the browser"),
        HostPackage("docker.io", ("dockerd",), "runs the appliance as a system container"),
        HostPackage("iptables", ("iptables",), "the container engine's network"),
        HostPackage("openssl", ("openssl",), "makes a certificate for a server that a test asks"),
        HostPackage("mtools", ("mcopy",), "reads the EFI partition that was written"),
        HostPackage("ruby", ("ruby",), "reads the Vagrantfile"),
        HostPackage("cpio", ("cpio",), "reads the RAM disk that was written"),
        HostPackage("groff-base", ("groff",), "reads the manual page of the node's tool"),
    ),
}
OPTIONAL_SETS = frozenset({"test"})  # without these, tests are skipped with the reason


def missing(set_name: str) -> list[HostPackage]:
    """Packages of the set, and of the sets before it, that are not installed."""
    found: list[HostPackage] = []
    for name, packages in SETS.items():
        found += [package for package in packages if not package.installed]
        if name == set_name:
            break
    return found


def install_command(names: Iterable[str], geteuid: int | None = None) -> list[str]:
    """The command that installs packages without asking anything."""
    root = (os.geteuid() if geteuid is None else geteuid) == 0
    return [
        *([] if root else ["sudo", "DEBIAN_FRONTEND=noninteractive"]),
        "apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", *names,
    ]  # fmt: skip


def advice(names: Iterable[str]) -> str:
    """The same as a user types it."""
    return " ".join([*([] if os.geteuid() == 0 else ["sudo"]), "apt-get", "install", *names])


def install(names: Sequence[str]) -> str:
    """Installs packages; returns an error text, empty when all went well."""
    if shutil.which("apt-get") is None:
        return f"this host has no apt-get; install what corresponds to: {', '.join(names)}"
    if os.geteuid() != 0 and shutil.which("sudo") is None:
        return f"neither root nor sudo; ask an administrator to run: apt-get install {' '.join(names)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = _quiet(install_command(names), environment)
    if done.returncode != 0:  # the package lists may be missing or older than the archive
        _quiet([*([] if os.geteuid() == 0 else ["sudo"]), "apt-get", "update", "-qq"], environment)
        done = _quiet(install_command(names), environment)
    return "" if done.returncode == 0 else "\n".join(done.stdout.strip().splitlines()[-12:])


def _quiet(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        stdin=None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
