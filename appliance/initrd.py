"""The initial RAM disk: one shell script, busybox and the kernel modules that reach a disk.

It is an uncompressed cpio archive in the "newc" format, written here so that the same tree gives the same bytes on
every host. Nothing in it depends on a release or on the day of a lock: which release boots is said on the kernel's
command line, and a RAM disk that differs in dates alone would make every upgrade a restart of the machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ApplianceError

SCRIPT = Path(__file__).with_name("boot") / "init.sh"

BUSYBOX = "usr/bin/busybox"
FILE_MOUNT = "usr/lib/klibc/bin/mount"  # mounts an image file as it is; busybox would put a loop device beneath
KLIBC = "usr/lib/klibc-*.so"
MODULES = "usr/lib/modules"

# What init.sh uses of busybox; the kernel itself calls modprobe.
APPLETS = (
    "cat", "chmod", "chroot", "cp", "cttyhack", "findfs", "grep", "head", "hexdump", "mkdir", "modprobe", "mount", "mv",
    "poweroff", "reboot", "rmdir", "setsid", "sh", "sleep", "switch_root", "sync", "umount",
)  # fmt: skip

# What reaches the medium or the disk, and a keyboard for the installer, on QEMU, VirtualBox, VMware, Hyper-V and
# common PC hardware. Dependencies follow from modules.dep and modules.softdep.
WANTED_MODULES = (
    "isofs", "squashfs", "erofs", "overlay", "btrfs", "vfat", "nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8",
    "loop", "crc32c_intel", "sd_mod", "sr_mod", "ata_piix", "ata_generic", "ahci", "nvme", "virtio_pci", "virtio_blk",
    "virtio_scsi", "vmw_pvscsi", "mptspi", "mptsas", "buslogic", "sym53c8xx", "megaraid_sas", "hv_vmbus", "hv_storvsc",
    "xhci_pci", "ehci_pci", "ohci_pci", "uhci_hcd", "usb_storage", "uas",
    "usbhid", "hid_generic", "hid_hyperv", "hyperv_keyboard", "softdog",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of the archive; `path` is relative, `mode` holds the file type, `device` is (major, minor)."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def program(path: str, content: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o755, content)


def plain(path: str, content: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o644, content)


def pack(entries: Iterable[Entry]) -> bytes:
    """A newc archive of the entries, sorted by path, owned by root, dated 1970; parents are added."""
    members = {entry.path: entry for entry in entries}
    for path in list(members):
        for parent in Path(path).parents:
            if str(parent) != "." and str(parent) not in members:
                members[str(parent)] = folder(str(parent))
    chunks: list[bytes] = []
    for inode, path in enumerate(sorted(members), start=1):
        chunks += _member(members[path], inode)
    chunks += _member(Entry("TRAILER!!!", 0), 0)
    size = sum(map(len, chunks))
    chunks.append(bytes(-size % 512))
    return b"".join(chunks)


def _member(entry: Entry, inode: int) -> Iterator[bytes]:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    yield header + bytes(-len(header) % 4)
    yield entry.content + bytes(-len(entry.content) % 4)


# --- kernel modules ------------------------------------------------------------------------------------------------


def module_name(path: str) -> str:
    """The kernel's name of a module file: crc32c-intel.ko -> crc32c_intel."""
    return path.rsplit("/", 1)[-1].split(".")[0].replace("-", "_")


@dataclass(frozen=True, slots=True)
class ModuleIndex:
    """What depmod wrote: file per module name (lower case), files each file needs first, aliases, soft dependencies."""

    files: Mapping[str, str]
    needs: Mapping[str, tuple[str, ...]]
    aliases: tuple[tuple[str, str], ...]  # pattern, module name
    soft: Mapping[str, tuple[str, ...]]  # module name -> names or aliases it wants before
    builtin: frozenset[str]


def read_index(folder: Path) -> ModuleIndex:
    """Read depmod's files of one kernel. Raises ApplianceError where they are missing."""
    try:
        dependencies = (folder / "modules.dep").read_text()
        aliases = (folder / "modules.alias").read_text()
        builtin = (folder / "modules.builtin").read_text()
        soft_text = (folder / "modules.softdep").read_text()
    except OSError as error:
        raise ApplianceError(
            f"the base layer has no module index: {error.filename}",
            hint="the kernel package is missing or half unpacked",
        ) from error
    needs = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = tuple(rest.split())
    soft: dict[str, tuple[str, ...]] = {}
    for line in soft_text.splitlines():
        words = line.split()
        if len(words) > 3 and words[0] == "softdep" and words[2] == "pre:":
            names = words[3 : words.index("post:")] if "post:" in words else words[3:]
            soft[words[1].replace("-", "_")] = (*soft.get(words[1].replace("-", "_"), ()), *names)
    pairs = [line.split() for line in aliases.splitlines() if line.startswith("alias ")]
    return ModuleIndex(
        files={module_name(path).lower(): path for path in needs},
        needs=needs,
        aliases=tuple((words[1], words[2]) for words in pairs if len(words) == 3),
        soft=soft,
        builtin=frozenset(module_name(line).lower() for line in builtin.splitlines()),
    )


def closure(index: ModuleIndex, wanted: Iterable[str]) -> tuple[str, ...]:
    """Files of the wanted modules and of all they depend on, sorted.

    Raises ApplianceError that names every wanted module that is neither in the index nor built into the kernel.
    """
    names = [name.replace("-", "_").lower() for name in wanted]
    missing = [name for name in names if name not in index.files and name not in index.builtin]
    if missing:
        raise ApplianceError(
            f"the base layer lacks kernel modules that the boot needs: {', '.join(missing)}",
            hint="keep them in the module selection of the base layer",
        )
    by_alias: dict[str, list[str]] = {}
    for pattern, module in index.aliases:
        by_alias.setdefault(pattern.replace("-", "_"), []).append(module.lower())
    found: set[str] = set()
    waiting = [index.files[name] for name in names if name in index.files]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += index.needs.get(path, ())
        for word in index.soft.get(module_name(path), ()):
            plain_word = word.replace("-", "_")
            for name in (plain_word, *by_alias.get(plain_word, ())):
                if name in index.files:
                    waiting.append(index.files[name])
    return tuple(sorted(found))


# --- the archive ---------------------------------------------------------------------------------------------------


def kernel_version(tree: Path) -> str:
    """Version of the one kernel whose modules the tree holds. Raises ApplianceError where there is none or several."""
    versions = sorted(path.name for path in (tree / MODULES).glob("*") if (path / "modules.dep").is_file())
    if len(versions) != 1:
        raise ApplianceError(
            f"expected the modules of one kernel in the base layer, found {', '.join(versions) or 'none'}",
            hint="the base recipe must name exactly one linux-image package",
        )
    return versions[0]


def entries(tree: Path) -> Iterator[Entry]:
    """Members of the RAM disk, taken from a base tree (a part of it with busybox, klibc and the modules is enough)."""
    version = kernel_version(tree)
    yield program("init", SCRIPT.read_bytes())
    yield program("bin/busybox", _read(tree, BUSYBOX))
    for applet in APPLETS:
        yield link(f"bin/{applet}", "busybox")
    yield link("sbin", "bin")  # the kernel asks for modules through /sbin/modprobe
    yield program("bin/file_mount", _read(tree, FILE_MOUNT))
    for library in sorted(tree.glob(KLIBC)):
        yield program(f"usr/lib/{library.name}", library.read_bytes())
    for name in ("dev", "proc", "sys", "run", "mnt", "sysroot"):
        yield folder(name)
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    yield from _modules(tree, version)


def _modules(tree: Path, version: str) -> Iterator[Entry]:
    source, target = tree / MODULES / version, f"lib/modules/{version}"
    index = read_index(source)
    chosen = closure(index, WANTED_MODULES)
    names = {module_name(path) for path in chosen}
    for path in chosen:
        if not path.endswith(".ko"):
            raise ApplianceError(f"{path} is compressed", hint="the base layer's modules must be plain .ko files")
        yield plain(f"{target}/{path}", _read(source, path))
    order = "".join(f"{path}: {' '.join(index.needs[path])}".rstrip() + "\n" for path in chosen)
    yield plain(f"{target}/modules.dep", order.encode())
    aliases = "".join(f"alias {pattern} {module}\n" for pattern, module in index.aliases if module in names)
    yield plain(f"{target}/modules.alias", aliases.encode())
    yield plain(f"{target}/modules.builtin", _read(source, "modules.builtin"))


def _read(tree: Path, path: str) -> bytes:
    try:
        return (tree / path).read_bytes()
    except OSError as error:
        raise ApplianceError(
            f"the base layer lacks /{path}, which the RAM disk needs", hint="keep its package in the base recipe"
        ) from error


def build(tree: Path, out: Path) -> Path:
    """Write the RAM disk for the kernel in `tree` to `out` and return it."""
    temporary = out.with_name(out.name + ".new")
    with temporary.open("wb") as file:
        file.write(pack(entries(tree)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out)
    return out
