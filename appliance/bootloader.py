"""GRUB for the medium and for installed disks, under BIOS and UEFI, as a handful of small files.

Everything GRUB needs is linked into its core image, so no folder of modules stands on a disk and its configuration is
a static file. The same files are used by the ISO, by disk images and, from the medium, by the installer.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from appliance.errors import ApplianceError
from appliance.model import Kernel, ToolBox

TEMPLATES = Path(__file__).with_name("boot")

# Files of a boot folder
ELTORITO = "eltorito.img"  # BIOS boot of a CD: cdboot.img and the core image behind it
HYBRID_MBR = "hybrid.img"  # first sector of the ISO, for a BIOS that boots it as a disk
EFI_MEDIUM = "efi.img"  # FAT file system with the UEFI boot program of the medium
DISK_BOOT = "boot.img"  # first sector of an installed disk
DISK_CORE = "core.img"  # content of its BIOS boot partition
DISK_ESP = "esp.img"  # beginning of its EFI system partition; the rest of that partition holds nothing
FOR_INSTALLS = (DISK_BOOT, DISK_CORE, DISK_ESP)

ESP_SIZE = 64 << 20  # bytes; FAT32 needs at least 65525 clusters
SECTOR = 512

_COMMON = ["normal", "configfile", "linux", "echo", "test", "sleep", "ls", "cat", "search", "search_fs_file"]
_COMMON += ["serial", "terminal", "halt", "reboot", "true"]
_MEDIUM = [*_COMMON, "iso9660", "part_msdos", "part_gpt"]
_DISK = [*_COMMON, "fat", "part_gpt", "btrfs", "regexp", "probe", "loadenv"]
_BIOS = ["biosdisk"]
_EFI = ["efi_gop", "efi_uga", "all_video", "fat", "part_msdos", "part_gpt"]


def build(tools: ToolBox, folder: Path, version: str, epoch: int) -> None:
    """Write the six boot files into `folder`. The medium's ones look for the medium of release `version`."""
    record = f"/samepage/releases/{version}/release.json"
    early = f"search --no-floppy --file --set=root {record}\nset prefix=($root)/boot/grub\n"
    with tempfile.TemporaryDirectory(prefix="samepage-grub-") as name:
        work = Path(name)
        (work / "early.cfg").write_text(early)
        modules = tools.root / "usr/lib/grub/i386-pc"
        for file, target in (("boot_hybrid.img", HYBRID_MBR), ("boot.img", DISK_BOOT)):
            (folder / target).write_bytes(_read(modules / file))
        _core(tools, "i386-pc-eltorito", folder / ELTORITO, "/boot/grub", [*_BIOS, *_MEDIUM], work / "early.cfg")
        _core(tools, "i386-pc", folder / DISK_CORE, "(,gpt2)/grub", [*_BIOS, *_DISK])
        _core(tools, "x86_64-efi", work / "medium.efi", "/boot/grub", [*_EFI, *_MEDIUM], work / "early.cfg")
        _core(tools, "x86_64-efi", work / "disk.efi", "/grub", [*_EFI, *_DISK])
        (work / "grubenv").write_bytes(environment_block())

        medium = {"EFI/BOOT/BOOTX64.EFI": work / "medium.efi"}
        size = (work / "medium.efi").stat().st_size + (256 << 10)
        make_fat(tools, folder / EFI_MEDIUM, size - size % -(64 << 10), medium, epoch)

        disk = {
            "EFI/BOOT/BOOTX64.EFI": work / "disk.efi",
            "grub/grub.cfg": TEMPLATES / "grub-disk.cfg",
            "grub/grubenv": work / "grubenv",
        }
        make_fat(tools, folder / DISK_ESP, ESP_SIZE, disk, epoch)
        _cut_zeros(folder / DISK_ESP)


def _core(tools: ToolBox, target: str, out: Path, prefix: str, modules: list[str], early: Path | None = None) -> None:
    folder = tools.root / "usr/lib/grub" / target.removesuffix("-eltorito")
    config = ("-c", early) if early else ()
    tools.run("grub-mkimage", "-O", target, "-d", folder, "-o", out, "-p", prefix, *config, *dict.fromkeys(modules))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ApplianceError(
            f"the tools root lacks {path.name}",
            hint="the lock's set 'tools' must name grub-pc-bin and grub-efi-amd64-bin",
        ) from error


def environment_block() -> bytes:
    """An empty GRUB environment block: 1024 bytes that GRUB overwrites in place."""
    return b"# GRUB Environment Block\n".ljust(1024, b"#")


def make_fat(tools: ToolBox, image: Path, size: int, files: dict[str, Path], epoch: int) -> None:
    """Write a FAT file system of `size` bytes that holds `files` (path inside: file), all dated `epoch`."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "TZ": "UTC", "LC_ALL": "C", "SOURCE_DATE_EPOCH": str(epoch),
        "MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1",
    }  # fmt: skip
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(size)
    kind = ("-F", "-c", "1") if size >= ESP_SIZE else ()
    tools.run("mformat", "-i", image, *kind, "-N", "53414d45", "-T", str(size // SECTOR), "-h", "255", "-s", "63", "-H",
              "0", "-v", "SAMEPAGEEFI", "::", env=environment)  # fmt: skip
    folders = sorted({str(parent) for path in files for parent in Path(path).parents} - {"."})
    tools.run("mmd", "-i", image, *(f"::/{folder}" for folder in folders), env=environment)
    for path, source in sorted(files.items()):
        with tempfile.NamedTemporaryFile(dir=image.parent, prefix=".fat-") as dated:
            dated.write(source.read_bytes())
            dated.flush()
            os.utime(dated.name, (epoch, epoch))
            tools.run("mcopy", "-m", "-i", image, dated.name, f"::/{path}", env=environment)


def _cut_zeros(image: Path) -> None:
    """Shorten a file to its last block of 4 KiB that is not all zeros."""
    content = image.read_bytes().rstrip(b"\0")
    image.write_bytes(content + bytes(-len(content) % 4096))


def medium_config(version: str, kernel: Kernel) -> bytes:
    """The menu of the medium: live, install, install unattended."""
    text = (TEMPLATES / "grub-medium.cfg").read_text()
    for name, value in (("@VERSION@", version), ("@KERNEL@", kernel.id), ("@OPTIONS@", kernel.cmdline)):
        text = text.replace(name, value)
    return text.encode()
