"""samepage-install: turns a disk into a node, from the live medium. Part of the node's code.

    samepage-install [--auto] [--disk DEVICE] [--overwrite]   on a live system, as root
    samepage-install --boot                                    from the initramfs; the kernel command line says the rest

Exit status: 0 installed; 1 failed, and the disk that was taken cannot be started; 2 refused or called off, nothing was
written; 64 wrong usage. The boot code is written last, so a disk with half an installation never starts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from appliance.node import disklayout, paths
from appliance.node.disks import Disk, DiskError, choose, find_disks, human, refusal
from appliance.node.release import File, LayerRecord, Manifest, ReleaseError, boot_record, dump_layers, parse
from appliance.node.terminal import Terminal

TARGET = paths.RUN / "target"
_BLOCK = 4 << 20


class InstallError(Exception):
    """The installation broke off after the disk was touched; the message says at what."""


class Wish(NamedTuple):
    """What the user asked for, on the command line of the program or of the kernel."""

    auto: bool = False
    disk: str = ""
    overwrite: bool = False
    boot: bool = False
    wait: bool = True  # after a failure at boot: until somebody presses Enter


def from_kernel(cmdline: str) -> Wish:
    """The wish on the kernel's command line: samepage.install=, .disk=, .overwrite=, .onfail=."""
    words: Mapping[str, str] = dict(word.split("=", 1) for word in cmdline.split() if "=" in word)
    return Wish(
        auto=words.get("samepage.install") == "auto",
        disk=words.get("samepage.disk", ""),
        overwrite=words.get("samepage.overwrite") == "yes",
        boot=True,
        wait=words.get("samepage.onfail") != "poweroff",
    )


class Source(NamedTuple):
    """The release on the medium: its manifest, and where each file of it stands."""

    manifest: Manifest
    content: bytes  # of release.json
    records: tuple[LayerRecord, ...]
    medium: Path

    def files(self) -> list[tuple[Path, str, File]]:
        """(file on the medium, path on the state partition, digest and size)."""
        kernel = self.manifest.kernel
        folder = f"{paths.KERNELS}/{kernel.id}"
        found = [
            (self.medium / folder / name, f"{folder}/{name}", file)
            for name, file in (("vmlinuz", kernel.vmlinuz), ("initrd", kernel.initrd))
        ]
        for record in self.records:
            image = paths.image_name(record.kind, record.digest)
            place = paths.PACKED / record.kind / image
            found.append((place, f"{paths.LAYERS}/{image}", File(record.digest, record.size)))
        return found

    @property
    def size(self) -> int:
        return sum(file.size for _, _, file in self.files())

    @property
    def needed(self) -> int:
        """Bytes that the disk must have."""
        least = disklayout.STATE_START + disklayout.TAIL + self.size + disklayout.MINIMUM_DATA
        return max(least, disklayout.MINIMUM_DISK)


def read_source(run: Path = paths.RUN) -> Source:
    """The booted release on the live medium. Raises DiskError where this is no live system."""
    try:
        mode = (run / paths.MODE.name).read_text().strip()
        content = (run / paths.RELEASE.name).read_bytes()
        manifest = parse(content)
        medium = run / paths.MEDIUM.name / paths.MEDIUM_ROOT
        digests = set((medium / paths.RELEASES / manifest.version / "layers").read_text().split())
    except (OSError, ReleaseError) as error:
        raise DiskError(f"the release of this system cannot be read: {error}") from error
    if mode != "live":
        raise DiskError("this system runs from its disk; start the medium to install")
    records = tuple(record for record in manifest.layers if record.digest in digests)
    return Source(manifest, content, records, medium)


# --- the steps -----------------------------------------------------------------------------------------------------


def command(*words: str, stdin: bytes | None = None) -> None:
    """Run a program of the system. Raises InstallError with what it said."""
    done = subprocess.run(words, input=stdin, capture_output=True, check=False)
    if done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise InstallError(f"{words[0]} ended with status {done.returncode}: {said}")


def copy(source: Path, target: Path, meant: File, report: Callable[[int], None]) -> None:
    """Copy a file and compare its digest on the way. Raises InstallError when it is not the file it should be."""
    digest = hashlib.sha256()
    size = 0
    with source.open("rb") as reader, target.open("xb") as writer, ThreadPoolExecutor(1) as beside:
        while block := reader.read(_BLOCK):
            hashing = beside.submit(digest.update, block)
            writer.write(block)
            hashing.result()
            size += len(block)
            report(len(block))
        writer.flush()
        os.fsync(writer.fileno())
    if digest.hexdigest() != meant.digest or size != meant.size:
        raise InstallError(f"{source.name} on the medium is damaged: its digest is not the one of the release")


def install(source: Source, disk: Disk, say: Callable[[str], None]) -> None:
    """Write the release of the medium to the disk. Raises InstallError or OSError; the disk then does not start."""
    started = time.monotonic()
    device = disk.device
    say("partitions ...")
    with open(device, "r+b", buffering=0) as file:
        file.write(bytes(disklayout.SECTOR))  # what was there does not start any more
        os.fsync(file.fileno())
    command("sfdisk", "--quiet", "--wipe", "always", "--wipe-partitions", "always", device,
            stdin=disklayout.partition_script())  # fmt: skip
    state = disklayout.partition_device(device, disklayout.STATE_NUMBER)
    _wait_for(Path(state))
    command("mkfs.btrfs", "--quiet", "--force", "--label", paths.STATE_LABEL, state)
    TARGET.mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "btrfs", "-o", "noatime", state, str(TARGET))
    try:
        _fill(source, TARGET, say)
    finally:
        command("umount", str(TARGET))
    say("boot code ...")
    folder = source.medium / paths.MEDIUM_BOOT
    files = disklayout.BootFiles(*((folder / name).read_bytes() for name in ("boot.img", "core.img", "esp.img")))
    with open(device, "r+b") as file:
        disklayout.write_boot_code(file, files)
        os.fsync(file.fileno())
    say(f"Samepage {source.manifest.version} is installed on {device} ({time.monotonic() - started:.0f} s).")


def _wait_for(node: Path) -> None:
    deadline = time.monotonic() + 10
    while not node.exists():
        if time.monotonic() > deadline:
            raise InstallError(f"the kernel does not show the new partition {node}")
        time.sleep(0.1)


def _fill(source: Source, root: Path, say: Callable[[str], None]) -> None:
    """The content of the state partition; the boot record comes last."""
    record = f"{paths.RELEASES}/{source.manifest.version}"
    for name in (paths.LAYERS, f"{paths.KERNELS}/{source.manifest.kernel.id}", record, paths.BOOT, paths.DATA):
        (root / name).mkdir(parents=True)
    (root / paths.IDENTITY / "etc").mkdir(parents=True)
    (root / paths.IDENTITY).chmod(0o711)  # services pass through to folders of their own
    command("btrfs", "subvolume", "create", str(root / paths.DATA / "1"))
    total, done, shown = source.size, 0, 0

    def report(count: int) -> None:
        nonlocal done, shown
        done += count
        tenth = done * 10 // total
        if tenth > shown:
            shown = tenth
            say(f"copying and checking: {tenth * 10} % of {human(total)}")

    for file, place, meant in source.files():
        copy(file, root / place, meant, report)
    (root / record / "release.json").write_bytes(source.content)
    (root / record / "layers").write_bytes(dump_layers(source.records))
    _keep_credentials(paths.INITRD_CREDENTIALS, root / paths.CREDENTIALS)
    os.sync()
    (root / paths.SELECTED).write_bytes(boot_record(source.manifest, 1))
    os.sync()


def _keep_credentials(given: Path, kept: Path) -> None:
    """Credentials of the config drive belong to the node from now on, whether the drive stays or not."""
    files = [file for file in given.glob("*") if file.is_file()] if given.is_dir() else []
    if not files:
        return
    kept.mkdir(mode=0o700)
    for file in files:
        target = kept / f"{file.name}.cred"
        shutil.copyfile(file, target)
        target.chmod(0o400)


# --- the conversation ----------------------------------------------------------------------------------------------


def ask_for_disk(disks: Sequence[Disk], needed: int, terminal: Terminal) -> Disk:
    """Let somebody choose a disk and agree to lose what is on it. Raises DiskError when it is called off."""
    usable = [disk for disk in disks if not refusal(disk, needed, overwrite=True)]
    for disk in disks:
        number = f"{usable.index(disk) + 1}" if disk in usable else "-"
        terminal.say(f"  {number:>2}  {disk.describe()}")
    if not usable:
        raise DiskError(f"none of these disks can be taken; {human(needed)} are needed")
    answer = terminal.ask("Number of the disk to install on, or Enter to leave everything as it is: ").strip()
    if not answer.isdigit() or not 1 <= int(answer) <= len(usable):
        raise DiskError("called off")
    disk = usable[int(answer) - 1]
    word = "overwrite" if disk.content else "yes"
    held = ", ".join(disk.content)
    terminal.say(f"{disk.device} {f'holds {held}: all of it will be lost' if held else 'is empty'}.")
    if terminal.ask(f"Type the word {word} to install on {disk.device}: ").strip() != word:
        raise DiskError("called off")
    return disk


def converse(wish: Wish, terminal: Terminal) -> int:
    """The whole installation, with its messages; returns the exit status."""
    terminal.say("")
    try:
        source = read_source()
        terminal.say(f"Samepage {source.manifest.version}: installation")
        disks = find_disks()
        if wish.auto:
            disk = choose(disks, wish.disk, source.needed, overwrite=wish.overwrite)
        elif wish.disk:
            disk = choose(disks, wish.disk, source.needed, overwrite=wish.overwrite)
            if terminal.ask(f"Type the word yes to install on {disk.device}: ").strip() != "yes":
                raise DiskError("called off")
        else:
            disk = ask_for_disk(disks, source.needed, terminal)
        terminal.say(f"Installing on {disk.describe()}")
        install(source, disk, terminal.say)
    except DiskError as error:
        terminal.say(f"Installation refused: {error}")
        terminal.say("Nothing was written.")
        return 2
    except (InstallError, OSError) as error:
        terminal.say(f"Installation FAILED: {error}")
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="samepage-install", description="Install the appliance on a disk.")
    parser.add_argument("--auto", action="store_true", help="ask nothing; takes the only empty disk, or --disk")
    parser.add_argument("--disk", default="", metavar="DEVICE", help="the disk to take, for example /dev/vda")
    parser.add_argument("--overwrite", action="store_true", help="take a disk that holds data; all of it is lost")
    parser.add_argument("--boot", action="store_true", help=argparse.SUPPRESS)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as error:
        return 64 if error.code else 0
    wish = Wish(options.auto, options.disk, options.overwrite)
    if options.boot:
        wish = from_kernel(Path("/proc/cmdline").read_text())
    if os.geteuid() != 0:
        print("samepage-install: only root can write to disks", file=sys.stderr)
        return 2
    terminal = Terminal.of_machine() if wish.boot else Terminal.of_process()
    status = converse(wish, terminal)
    if wish.boot and status and wish.wait:
        terminal.ask("Press Enter for the live system, or switch the machine off. ")
    return status


if __name__ == "__main__":
    sys.exit(main())
