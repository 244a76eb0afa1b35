"""The kernel, its RAM disk and the boot loader's files as results in the store."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from appliance import bootloader, initrd
from appliance.model import Kernel, Lock
from appliance.release import CMDLINE
from appliance.rootfs import Rootfs
from appliance.store import Store, digest_of_files
from appliance.tools import Tools

CODE = Path(__file__).parent


def make_kernel(tree: Rootfs, store: Store) -> Kernel:
    """The kernel of the tree with a RAM disk made for it."""
    version = tree.kernel
    inputs = {
        "boot chain": tree.boot.parent.name,
        "initrd code": code_digest(["initrd.py", "boot/init.sh"]),
    }

    def build(folder: Path) -> None:
        shutil.copyfile(tree.boot / "boot" / f"vmlinuz-{version}", folder / "vmlinuz")
        initrd.build(tree.boot, folder / "initrd")
        digests = {name: digest(folder / name) for name in ("vmlinuz", "initrd")}
        (folder / "digests.json").write_text(json.dumps(digests), encoding="ascii")

    place = store.step("initrd", inputs, build)
    digests = json.loads((place / "digests.json").read_text(encoding="ascii"))
    return Kernel(version, place / "vmlinuz", place / "initrd", digests["vmlinuz"], digests["initrd"], CMDLINE)


def make_boot_files(tools: Tools, version: str, lock: Lock, store: Store) -> Path:
    """The folder of the boot loader's files for the medium and for installed disks."""
    templates = sorted(f"boot/{file.name}" for file in (CODE / "boot").glob("*.cfg"))
    inputs = {
        "tools": tools.version, "version": version, "clock": str(lock.epoch),
        "bootloader code": code_digest(["bootloader.py", *templates]),
    }  # fmt: skip
    return store.step("bootloader", inputs, lambda folder: bootloader.build(tools, folder, version, lock.epoch))


def code_digest(names: Iterable[str]) -> str:
    """A digest of files of this package: a step's own code is one of its inputs."""
    return digest_of_files({name: CODE / name for name in names})


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
