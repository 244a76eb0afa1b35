"""The base layer as it was written."""

from __future__ import annotations

import hashlib
import json
import stat
import struct
import tarfile
from functools import cache

import pytest

from appliance.lock import OMITTED, OMITTED_VERSION
from appliance.pipeline import Built

NEEDED_DRIVERS = (
    "e1000", "e1000e", "virtio_net", "pcnet32", "vmxnet3", "hv_netvsc", "r8169", "igb", "ahci", "ata_piix",
    "virtio_blk", "virtio_scsi", "vmw_pvscsi", "hv_storvsc", "mptspi", "mptsas", "megaraid_sas", "nvme",
    "usb-storage", "uas", "xhci-pci", "ehci-pci", "sr_mod", "loop", "isofs", "squashfs", "erofs", "btrfs",
    "overlay", "vfat", "nls_utf8", "nf_tables", "nf_conntrack", "qemu_fw_cfg",
)  # fmt: skip


@pytest.fixture(scope="module")
def members(tree: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    return {member.name.removeprefix("."): member for member in tree}


def read(tree: tarfile.TarFile, path: str) -> bytes:
    stream = tree.extractfile("." + path)
    assert stream is not None
    return stream.read()


@cache
def modules(names: frozenset[str]) -> set[str]:
    return {name.rpartition("/")[2].removesuffix(".ko") for name in names if name.endswith(".ko")}


@pytest.mark.parametrize("driver", NEEDED_DRIVERS)
def test_the_driver_is_there(
    tree: tarfile.TarFile, members: dict[str, tarfile.TarInfo], built: Built, driver: str
) -> None:
    folder = f"/usr/lib/modules/{built.tree.kernel}"
    builtin = read(tree, f"{folder}/modules.builtin").decode()
    there = modules(frozenset(members)) | {line.rpartition("/")[2].removesuffix(".ko") for line in builtin.splitlines()}
    assert driver in there


def test_modules_are_plain_and_indexed(
    tree: tarfile.TarFile, members: dict[str, tarfile.TarInfo], built: Built
) -> None:
    assert not [name for name in members if name.endswith((".ko.xz", ".ko.zst", ".ko.gz"))]
    index = read(tree, f"/usr/lib/modules/{built.tree.kernel}/modules.dep").decode()
    indexed = {line.partition(":")[0] for line in index.splitlines()}
    assert indexed == {name.partition(f"{built.tree.kernel}/")[2] for name in members if name.endswith(".ko")}


def test_documentation_and_what_is_never_loaded_stay_out(members: dict[str, tarfile.TarInfo]) -> None:
    unwanted = (
        "/usr/share/man/",
        "/usr/share/locale/",
        "/usr/share/info/",
        "/usr/share/i18n/",
        "/lib/bitcode/",
        "libLLVM",
    )
    assert not [name for name in members if any(part in name for part in unwanted)]
    left = {name.rpartition("/")[2] for name, member in members.items() if "/usr/share/doc/" in name and member.isreg()}
    assert left == {"copyright"}


def test_nothing_secret_or_of_one_machine(tree: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> None:
    assert read(tree, "/etc/machine-id") == b""
    unwanted = ("ssh_host_", "ssl-cert-snakeoil", "/etc/hostname")
    assert not [name for name in members if any(part in name for part in unwanted)]
    passwords = {line.split(":")[1] for line in read(tree, "/etc/shadow").decode().splitlines()}
    assert all(password.startswith(("*", "!")) for password in passwords)


def test_var_is_empty_and_comes_back(tree: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> None:
    assert not [name for name in members if name.startswith("/var/")]
    lines = read(tree, "/usr/lib/tmpfiles.d/samepage-var.conf").decode().splitlines()
    factory = {line.split()[1] for line in lines if line.startswith("C ")}
    assert factory <= {name.removeprefix("/usr/share/factory") for name in members}
    assert all(line.split()[1].startswith("/var/") for line in lines)


def test_numbers_of_users_are_the_recipes(tree: tarfile.TarFile, built: Built) -> None:
    declared = {user.name: user.uid for recipe in built.model.recipes for user in recipe.users}
    for line in read(tree, "/etc/group").decode().splitlines():
        name, _, number, _ = line.split(":")
        if 100 < int(number) < 1000:
            assert declared[name] == int(number)


def test_debians_compiled_python_is_valid(tree: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> None:
    """A compiled module counts when it names its source's time and size: so the layer must keep both."""
    stale, sources = [], 0
    for name, member in members.items():
        if not name.endswith(".pyc") or "/__pycache__/" not in name:
            continue
        folder, _, file = name.partition("/__pycache__/")
        source = members.get(f"{folder}/{file.split('.cpython-')[0]}.py")
        if source is None:
            continue
        sources += 1
        stream = tree.extractfile(member)
        assert stream is not None
        flags, when, size = struct.unpack("<III", stream.read(16)[4:])
        if flags == 0 and (when, size) != (int(source.mtime), source.size):
            stale.append(name)
    assert sources > 400
    assert stale == []


def test_what_raises_privileges_is_known(members: dict[str, tarfile.TarInfo]) -> None:
    raising = {
        name for name, member in members.items() if member.isreg() and member.mode & (stat.S_ISUID | stat.S_ISGID)
    }
    assert raising <= {
        "/usr/bin/su", "/usr/bin/mount", "/usr/bin/umount", "/usr/bin/passwd", "/usr/bin/chsh", "/usr/bin/chfn",
        "/usr/bin/newgrp", "/usr/bin/gpasswd", "/usr/bin/chage", "/usr/bin/expiry", "/usr/bin/ssh-agent",
        "/usr/sbin/unix_chkpwd", "/usr/lib/openssh/ssh-keysign", "/usr/lib/dbus-1.0/dbus-daemon-launch-helper",
        "/usr/sbin/postdrop", "/usr/sbin/postqueue",
    }  # fmt: skip


def test_the_package_database_lists_the_lock(tree: tarfile.TarFile, built: Built) -> None:
    status = read(tree, "/usr/lib/sysimage/dpkg/status").decode()
    found = {
        (fields["Package"], fields["Version"])
        for fields in (
            dict(line.split(": ", 1) for line in text.splitlines() if ": " in line) for text in status.split("\n\n")
        )
        if fields
    }
    omitted = {(name, OMITTED_VERSION) for name in built.lock.wanted[OMITTED]}
    assert found == {(package.name, package.version) for package in built.lock.sets["full"]} | omitted


# --- images ----------------------------------------------------------------------------------------------------------


def test_every_image_is_sound_and_its_squashfs_holds_it(built: Built) -> None:
    for layer in built.layers:
        assert built.tools.run("fsck.erofs", layer.image).returncode == 0
        inside = built.tools.run("unsquashfs", "-cat", layer.packed, layer.image.name).stdout
        assert hashlib.sha256(inside).hexdigest() == layer.digest == layer.image.stem.rpartition("-")[2]


def test_the_bill_of_materials_names_every_package(built: Built) -> None:
    from appliance.sbom import make_sbom

    content = make_sbom(built.release, built.model)
    assert make_sbom(built.release, built.model) == content
    document = json.loads(content)
    assert document["spdxVersion"] == "SPDX-2.3"
    named = {(part["name"], part["versionInfo"]) for part in document["packages"][1:]}
    assert {(package.name, package.version) for package in built.lock.sets["full"]} <= named
    identifiers = [part["SPDXID"] for part in document["packages"]]
    assert len(set(identifiers)) == len(identifiers)
    assert {one["relatedSpdxElement"] for one in document["relationships"]} == set(identifiers)
