"""The script that runs beside the chroot, on small trees and without root."""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.programs import load_program

SCRIPT = Path(__file__).parents[2] / "appliance/chroot/stage.py"


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    return load_program(SCRIPT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root as Debian's base-passwd leaves it, in miniature, owned by whoever runs the test."""
    me, group = os.getuid(), os.getgid()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(
        f"root:x:{me}:{group}:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/bin/sh\n"
    )
    (tmp_path / "etc/group").write_text(f"root:x:{group}:\nwww-data:x:33:\nusers:x:100:\n")
    (tmp_path / "etc/shadow").write_text("root:*:19000:0:99999:7:::\nwww-data:*:19000:0:99999:7:::\n")
    (tmp_path / "etc/gshadow").write_text("root:*::\nwww-data:*::\n")
    for name in ("usr/lib/tmpfiles.d", "var/lib/dpkg/info", "root", "usr/share/doc", "usr/local/bin", "opt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text("Package: zlib\n\nPackage: abc\n")
    return tmp_path


def user(name: str, uid: int, *groups: str, group_only: bool = False) -> dict[str, Any]:
    return {"name": name, "uid": uid, "home": "/nonexistent", "groups": list(groups), "group_only": group_only}


def rows(file: Path) -> dict[str, str]:
    return {line.split(":")[0]: line for line in file.read_text().splitlines()}


def test_users_get_their_numbers_and_groups(stage: ModuleType, root: Path) -> None:
    stage.add_users(root, [user("store", 811, "cert", "www-data"), user("cert", 814, group_only=True)])
    assert rows(root / "etc/passwd")["store"] == "store:x:811:811::/nonexistent:/usr/sbin/nologin"
    assert rows(root / "etc/shadow")["store"] == "store:!*:::::::"
    assert rows(root / "etc/group")["store"] == "store:x:811:"
    assert rows(root / "etc/group")["cert"] == "cert:x:814:store"
    assert rows(root / "etc/group")["www-data"] == "www-data:x:33:store"
    assert "cert" not in rows(root / "etc/passwd")


def test_adding_users_again_changes_nothing(stage: ModuleType, root: Path) -> None:
    users = [user("store", 811, "www-data", "later")]
    stage.add_users(root, users)
    before = (root / "etc/group").read_text()
    stage.add_users(root, users)
    assert (root / "etc/group").read_text() == before
    with (root / "etc/group").open("a") as file:
        file.write("later:x:815:\n")
    stage.add_users(root, users)
    assert rows(root / "etc/group")["later"] == "later:x:815:store"


def test_undeclared_and_moved_numbers_are_faults(stage: ModuleType, root: Path) -> None:
    stage.add_users(
        root, [user("declared", 811), user("dynamic", 998), user("moved", 997), user("only", 996, group_only=True)]
    )
    found = stage.undeclared(root, [user("declared", 811), user("moved", 812)])
    assert found == [
        "no recipe declares the user dynamic, which a package made as number 998",
        "the user moved has number 997 in Debian, not 812 as its recipe says",
        "no recipe declares the group dynamic, which a package made as number 998",
        "the group moved has number 997 in Debian, not 812 as its recipe says",
        "no recipe declares the group only, which a package made as number 996",
    ]


def test_no_day_of_the_build_in_shadow(stage: ModuleType, root: Path) -> None:
    stage.tidy_accounts(root)
    assert rows(root / "etc/shadow")["root"] == "root:*::0:99999:7:::"


def test_var_comes_back_on_an_empty_one(stage: ModuleType, root: Path) -> None:
    (root / "usr/lib/tmpfiles.d/var.conf").write_text(
        "d /var/log 0755 - - -\nq /var/tmp 1777 root root 30d\n# d /var/x\n"
    )
    for name in ("var/log", "var/tmp", "var/lib/store/deep", "var/spool"):
        (root / name).mkdir(parents=True)
    (root / "var/lib/store").chmod(0o750)
    (root / "var/lib/store/empty").touch(0o640)
    (root / "var/lib/store/deep/full").write_text("content")
    (root / "var/mail").symlink_to("spool/mail")
    stage.move_dpkg(root)
    stage.links(root)
    stage.skeleton(root)
    lines = (root / "usr/lib/tmpfiles.d/samepage-var.conf").read_text().splitlines()
    assert lines == [
        "d /var/lib 0755 root root -",
        "L /var/mail - - - - spool/mail",
        "d /var/spool 0755 root root -",
        "d /var/lib/store 0750 root root -",
        "d /var/lib/store/deep 0755 root root -",
        "f /var/lib/store/empty 0640 root root -",
        "C /var/lib/store/deep/full 0644 root root -",
        "d /var/roothome 0700 root root -",
        "L /var/lib/dpkg - - - - ../../usr/lib/sysimage/dpkg",
    ]
    assert (root / "usr/share/factory/var/lib/store/deep/full").read_text() == "content"
    assert list((root / "var").iterdir()) == []


def test_the_package_database_moves_into_the_layer_in_a_fixed_order(stage: ModuleType, root: Path) -> None:
    (root / "var/lib/dpkg/lock").touch()
    (root / "var/lib/dpkg/status-old").touch()
    stage.move_dpkg(root)
    state = root / "usr/lib/sysimage/dpkg"
    assert sorted(path.name for path in state.iterdir()) == ["info", "status"]
    assert (state / "status").read_text() == "Package: abc\n\nPackage: zlib\n"


def test_names_lead_where_a_read_only_root_needs_them(stage: ModuleType, root: Path) -> None:
    (root / "root/.profile").write_text("x")
    stage.links(root)
    assert str((root / "root").readlink()) == "var/roothome"
    assert (root / "usr/share/factory/var/roothome/.profile").read_text() == "x"
    assert str((root / "usr/local/bin").readlink()) == str((root / "usr/local/sbin").readlink()) == "/opt/samepage/bin"
    assert str((root / "etc/resolv.conf").readlink()) == "../run/systemd/resolve/stub-resolv.conf"
    assert (root / "etc/machine-id").read_text() == ""
    assert all((root / name).is_dir() for name in ("state", "opt/samepage", "proc", "sys", "dev", "run", "tmp"))


def test_programs_that_raise_privileges_are_named(stage: ModuleType, root: Path) -> None:
    (root / "usr/bin").mkdir()
    for name in ("su", "surprise", "plain"):
        (root / "usr/bin" / name).touch(0o755)
    (root / "usr/bin/su").chmod(0o4755)
    (root / "usr/bin/surprise").chmod(0o4755)
    assert stage.surprises(root) == ["/usr/bin/surprise raises privileges (mode 4755) and is not known to"]


def test_only_licences_stay_of_the_documentation(stage: ModuleType, root: Path) -> None:
    for name in ("a/copyright", "a/changelog.gz", "a/examples/x", "b/README"):
        (root / "usr/share/doc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "usr/share/doc" / name).touch()
    (root / "usr/share/doc/c").symlink_to("a")
    stage.documents(root)
    left = sorted(str(path.relative_to(root / "usr/share/doc")) for path in (root / "usr/share/doc").rglob("*"))
    assert left == ["a", "a/copyright"]


def test_modules_become_plain_and_keep_their_time(stage: ModuleType, root: Path) -> None:
    packed = root / "x.ko.xz"
    packed.write_bytes(lzma.compress(b"module"))
    os.utime(packed, (1000, 1000))
    stage.unpack_module(packed)
    assert not packed.exists()
    assert (root / "x.ko").read_bytes() == b"module"
    assert (root / "x.ko").stat().st_mtime == 1000


@pytest.mark.parametrize(
    "name", ["kernel/drivers/net/can", "/kernel/drivers/net/can.ko", "kernel/drivers/net/can.ko.xz"]
)
def test_a_recipe_names_a_module_or_a_folder_of_them(stage: ModuleType, name: str) -> None:
    assert stage._module_patterns(name) == ["kernel/drivers/net/can/*", "kernel/drivers/net/can.ko*"]


def test_the_rules_keep_every_supported_machines_drivers() -> None:
    """NICs and disks of QEMU, VirtualBox, VMware and Hyper-V, USB sticks, and what the boot chain mounts."""
    import fnmatch

    needed = (
        "drivers/net/ethernet/intel/e1000/e1000", "drivers/net/ethernet/intel/e1000e/e1000e",
        "drivers/net/virtio_net", "drivers/net/ethernet/amd/pcnet32", "drivers/net/vmxnet3/vmxnet3",
        "drivers/net/hyperv/hv_netvsc", "drivers/net/ethernet/realtek/r8169", "drivers/net/ethernet/broadcom/tg3",
        "drivers/net/ethernet/intel/igb/igb", "drivers/ata/ahci", "drivers/ata/ata_piix", "drivers/block/virtio_blk",
        "drivers/scsi/virtio_scsi", "drivers/scsi/vmw_pvscsi", "drivers/scsi/hv_storvsc",
        "drivers/message/fusion/mptspi", "drivers/message/fusion/mptsas", "drivers/scsi/sym53c8xx_2/sym53c8xx",
        "drivers/scsi/megaraid/megaraid_sas", "drivers/nvme/host/nvme", "drivers/hv/hv_vmbus",
        "drivers/usb/storage/usb-storage", "drivers/usb/storage/uas", "drivers/usb/host/xhci-pci",
        "drivers/usb/host/ehci-pci", "drivers/scsi/sr_mod", "drivers/cdrom/cdrom", "drivers/block/loop",
        "fs/isofs/isofs", "fs/squashfs/squashfs", "fs/erofs/erofs", "fs/btrfs/btrfs", "fs/overlayfs/overlay",
        "fs/fat/vfat", "fs/nls/nls_utf8", "net/netfilter/nf_tables", "drivers/hid/usbhid/usbhid",
        "drivers/hid/hid-hyperv", "drivers/firmware/qemu_fw_cfg",
    )  # fmt: skip
    lines = (SCRIPT.parent / "dpkg.cfg").read_text().splitlines()
    rules = [line.split("=", 1)[1] for line in lines if line.startswith("path-exclude=")]
    for name in needed:
        path = f"/usr/lib/modules/6.12.0-amd64/kernel/{name}.ko.xz"
        assert not [rule for rule in rules if fnmatch.fnmatchcase(path, rule)], path


def test_an_omitted_package_counts_as_installed(stage: ModuleType, root: Path) -> None:
    stanza = "Package: compiler\nArchitecture: amd64\nVersion: 999:0\n"
    stage.register(root, [stanza])
    stanzas = (root / "var/lib/dpkg/status").read_text().split("\n\n")
    assert stanza in stanzas
    assert (root / "var/lib/dpkg/info/compiler:amd64.list").read_text() == "/.\n"
