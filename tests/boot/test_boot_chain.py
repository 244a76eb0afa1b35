"""The ISO boots everywhere, installs without touching what it must not touch, and what it installs boots and lasts."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from appliance.iso import read_back
from appliance.node.release import parse
from appliance.run import run
from tests.boot.conftest import CREDENTIAL, CREDENTIAL_VALUE, DEADLINE, GIB, NICS, TARGET, Node, Start, choose, direct

# Controllers that virtual machines come with: QEMU's words before the disk, and the disk's device
CONTROLLERS = {
    "virtio-blk": ([], "virtio-blk-pci"),
    "virtio-scsi": (["virtio-scsi-pci,id=vs"], "scsi-hd,bus=vs.0"),
    "VMware paravirtual SCSI": (["pvscsi,id=pv"], "scsi-hd,bus=pv.0"),
    "LSI 53C895A": (["lsi53c895a,id=lsi"], "scsi-hd,bus=lsi.0"),
    "MegaRAID SAS": (["megasas,id=mega"], "scsi-hd,bus=mega.0"),
    "NVMe": ([], "nvme,serial=samepage"),
    "AHCI": ([], "ide-hd,bus=ide.3"),
    "IDE": (["piix3-ide,id=old"], "ide-hd,bus=old.0"),
    "USB": (["qemu-xhci,id=usb"], "usb-storage,bus=usb.0"),
}  # fmt: skip


def disks_on_every_controller(folder: Path) -> list[str]:
    """QEMU's words for a small empty disk on each controller; the n-th has n GiB."""
    words = []
    for size, (before, device) in enumerate(CONTROLLERS.values(), start=1):
        image = folder / f"{size}.raw"
        with image.open("wb") as file:
            file.truncate(size * GIB)
        words += [word for extra in before for word in ("-device", extra)]
        words += ["-drive", f"if=none,id=extra{size},format=raw,file={image}", "-device", f"{device},drive=extra{size}"]
    return words


# --- the medium ----------------------------------------------------------------------------------------------------


def test_medium_written_raw_boots_under_bios_and_sees_disks_on_every_controller(
    iso: Path, machine: Start, tmp_path: Path
) -> None:
    stick = machine("stick-bios", iso, "usb", extra=disks_on_every_controller(tmp_path), disk="ahci")
    with choose(stick, "i") as serial:
        listing = serial.expect(r"(?s)installation\r?\n(.*)Number of the disk", DEADLINE).group(1)
        for size, name in enumerate(CONTROLLERS, start=1):
            assert f" {size * GIB / 1e9:.1f} GB" in listing, f"no disk on {name}:\n{listing}"
        assert re.search(r"-  /dev/sd\S+ .*in use: mounted on /run/samepage/medium", listing), listing
        serial.type("\n")
        serial.expect("Installation refused: called off", DEADLINE)
        serial.expect("Nothing was written", DEADLINE)


@pytest.mark.parametrize("kind", ["install", "usb"])
def test_medium_boots_under_uefi(iso: Path, machine: Start, kind: str) -> None:
    with choose(machine(f"uefi-{kind}", iso, kind, firmware="uefi"), "i") as serial:
        serial.expect(r"Number of the disk|Installation refused: none of these disks", DEADLINE)


def test_disk_with_data_is_refused_by_name(
    iso: Path, machine: Start, disk_with_data: Path, tmp_path: Path
) -> None:
    words = direct(iso, tmp_path, "samepage.install=auto samepage.onfail=poweroff")
    refused = machine("refused", iso, extra=words, backing=str(disk_with_data))
    with refused.serial() as serial:
        serial.expect("/dev/vda holds ext4", DEADLINE)
        serial.expect("Nothing was written", DEADLINE)
    wait_for_end(refused)
    overlay = refused.instance.folder / "disk.qcow2"
    compared = run(["qemu-img", "compare", overlay, disk_with_data], check=False)
    assert b"identical" in compared.stdout, compared.stdout


def wait_for_end(node: Node) -> None:
    end = time.monotonic() + DEADLINE
    while TARGET.state(node.instance) == "running":
        assert time.monotonic() < end, "the machine did not switch itself off"
        time.sleep(0.5)


# --- installed nodes -----------------------------------------------------------------------------------------------


def test_node_installed_from_the_menu_runs_the_release(node: Node, iso: Path) -> None:
    assert node.ssh("cat /run/samepage/mode").strip() == "installed"
    manifest = node.ssh("cat /run/samepage/release.json").encode()
    release = parse(manifest)
    assert hashlib.sha256(manifest).hexdigest() == read_back(iso)[f"samepage/releases/{release.version}/release.json"]
    kept = node.ssh("find /state -xdev -name '*.erofs' -exec sha256sum {} +")
    for layer in release.layers:
        assert f"{layer.digest}  /state/layers/{layer.kind}-{layer.digest}.erofs" in kept


def test_root_is_read_only_and_state_is_not(node: Node) -> None:
    mounts = {
        entry["target"]: entry
        for entry in json.loads(node.ssh("findmnt --json --list -o TARGET,FSTYPE,OPTIONS"))["filesystems"]
    }
    for place, kind in (("/", "erofs"), ("/opt/samepage", "erofs"), ("/etc", "overlay")):
        assert mounts[place]["fstype"] == kind
        assert mounts[place]["options"].startswith("ro"), mounts[place]
    for place in ("/state", "/var"):
        assert mounts[place]["fstype"] == "btrfs"
        assert mounts[place]["options"].startswith("rw"), mounts[place]
    for place in ("/", "/usr/bin", "/etc", "/opt/samepage"):
        assert node.ssh(f"touch {place}/x 2>/dev/null && echo written || echo refused").strip() == "refused"


def test_credentials_of_the_config_drive_reach_systemd_and_stay(node: Node) -> None:
    assert node.ssh(f"cat /run/credentials/@system/{CREDENTIAL}").encode() == CREDENTIAL_VALUE
    kept = f"/state/identity/credentials/{CREDENTIAL}.cred"
    assert node.ssh(f"cat {kept}; stat -c %a:%U {kept}").encode() == CREDENTIAL_VALUE + b"400:root\n"


def test_two_installs_share_no_identity(node: Node, second: Node) -> None:
    secrets = [
        "cat /etc/machine-id",
        "cat /state/identity/*/*.pub /state/identity/*/*/*.pub 2>/dev/null | cut -d' ' -f2",
        "find /state/identity -type f -size +0 | sort | xargs sha256sum | cut -d' ' -f1",
    ]
    for command in secrets:
        one, two = (set(place.ssh(command).split()) for place in (node, second))
        assert one, command
        assert two, command
        assert not one & two, f"{command}: {one & two}"


def test_disk_installed_over_data_boots_under_uefi(second: Node) -> None:
    assert second.ssh("test -d /sys/firmware/efi && cat /run/samepage/mode").strip() == "installed"
    assert second.ssh("systemctl --failed --no-legend --plain").strip() == ""


def test_network_cards_of_every_hypervisor_have_drivers(second: Node) -> None:
    drivers = set(second.ssh("for n in /sys/class/net/*/device/driver; do basename $(readlink $n); done").split())
    assert {card.replace("pcnet", "pcnet32") for card in NICS} | {"virtio_net"} <= drivers


def test_hardware_that_qemu_lacks_has_drivers(second: Node) -> None:
    hyper_v = ["hv_vmbus", "hv_storvsc", "hv_netvsc", "hv_utils", "hyperv_keyboard"]
    lsi_logic = ["mptspi", "mptsas", "BusLogic"]  # the defaults of VMware and VirtualBox for some guests
    for module in [*hyper_v, *lsi_logic]:
        assert second.ssh(f"modinfo -n {module}").strip().endswith((".ko", "(builtin)")), module


def test_data_and_identity_survive_a_restart(node: Node) -> None:
    identity = "find /state/identity -type f | sort | xargs sha256sum"
    before = node.ssh(f"echo kept >/var/lib/kept; {identity}")
    node.restart()
    assert node.ssh("cat /var/lib/kept").strip() == "kept"
    assert node.ssh(identity) == before
    assert TARGET.state(node.instance) == "running"


def test_release_that_cannot_be_read_gives_way_to_the_last_good_one(second: Node) -> None:
    version = json.loads(second.ssh("cat /run/samepage/release.json"))["version"]
    second.ssh(
        "cd /state && cp boot/selected.cfg boot/previous.cfg && mkdir releases/9.9 && "
        "cp releases/[0-9]*.*.*/release.json releases/9.9/ && "
        "sed 's/ .*/ 0000/' releases/[0-9]*.*.*/layers >releases/9.9/layers && "
        "sed \"s/release='.*'/release='9.9'/\" boot/previous.cfg >boot/selected.cfg && sync"
    )
    second.restart()
    log = second.instance.console_log.read_text(errors="replace")
    assert "release 9.9 cannot be read; restarting with the release before it" in log
    assert json.loads(second.ssh("cat /run/samepage/release.json"))["version"] == version
    assert second.ssh("cmp /state/boot/selected.cfg /state/boot/previous.cfg && echo same").strip() == "same"
