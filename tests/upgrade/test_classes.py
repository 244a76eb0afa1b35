"""Each class of upgrade does what its name says and no more, and clients do not notice but for a wait."""

from __future__ import annotations

import pytest

from tests.upgrade.endings import FULL, PLACES, USERSPACE, mounted_layers, runs
from tests.upgrade.machines import Load, Machine, changed
from tests.variants import Variants, replace, todays_lock, with_lock, without_kernel

NGINX = replace("recipes/nginx/recipe.yaml", "worker_connections: 1024", "worker_connections: 1000")
APP = replace(
    "recipes/samepage/files/opt/samepage/share/samepage/web/index.html", "<title>", "<title>New: "
)  # fmt: skip
UNITS = "recipes/samepage/templates/etc/systemd/system"
WORKER = replace(f"{UNITS}/samepage-worker.service.j2", "Description=Samepage's", "Description=A")
OLD_ROOT = "/usr/lib/samepage/old-root"


def test_changed_template_reloads_one_unit_and_nothing_else(node: Machine, variants: Variants) -> None:
    variants.release("1.1", NGINX)
    before, main = node.invocations(), node.ssh("systemctl show -p MainPID --value nginx")
    status, found = node.upgrade(variants.bundle("1.0", "1.1"))
    assert (status, found["outcome"], found["class"]) == (0, "committed", "live"), found
    assert found["units"] == {"nginx.service": "reload"}
    assert changed(before, node.invocations()) == set()
    assert node.ssh("systemctl show -p MainPID --value nginx") == main
    assert "worker_connections 1000;" in node.ssh("cat /etc/nginx/nginx.conf")
    assert "worker_connections 1000;" in node.ssh(f"nsenter -t {main.strip()} -m cat /etc/nginx/nginx.conf")
    runs(node, variants, "1.1", whole=False)
    assert node.tool("install", "/state/samepage-1.0-to-1.1.bundle")[0] == 2
    assert node.tool("rollback", "--yes")[1]["units"] == {"nginx.service": "reload"}
    runs(node, variants, "1.0", whole=False)


def test_changed_unit_file_restarts_that_unit_only(node: Machine, variants: Variants) -> None:
    variants.release("1.2", WORKER)
    before = node.invocations()
    status, found = node.upgrade(variants.bundle("1.0", "1.2"))
    assert (status, found["class"], found["units"]) == (0, "live", {"samepage-worker.service": "restart"}), found
    assert changed(before, node.invocations()) == {"samepage-worker.service"}
    assert node.ssh("systemctl show -p Description --value samepage-worker").strip() == "A worker"


def test_live_upgrade_of_the_product_fails_no_request(
    node: Machine, variants: Variants, record_property: pytest.RecordProperty
) -> None:
    variants.release("1.3", APP)
    before = node.invocations()
    with Load(node) as load:
        status, found = node.upgrade(variants.bundle("1.0", "1.3"))
        assert (status, found["outcome"], found["class"]) == (0, "committed", "live"), found
        assert found["units"] == {"samepage.service": "restart", "samepage-worker.service": "restart"}
        back, rolled = node.tool("rollback", "--data=keep", "--yes")
    record_property("load", load.figures())
    assert load.failures == []
    assert (back, rolled["class"], rolled["data"]) == (0, "live", "kept")
    assert changed(before, node.invocations()) == {"samepage.service", "samepage-worker.service"}
    assert {"before", *load.written} <= node.titles()
    runs(node, variants, "1.0", whole=False)


def test_new_userspace_under_the_same_kernel_is_a_soft_reboot(
    node: Machine, variants: Variants, record_property: pytest.RecordProperty
) -> None:
    """Today's packages but the kernel: under load, there and back, with the rows of before."""
    from appliance.lock import read_lock

    today, release = todays_lock(), read_lock(variants.folder / "1.0/recipes/packages.lock")
    variants.release("1.4", with_lock(without_kernel(today, release)))
    boot, data = node.boot(), node.status()["data"]
    with Load(node) as load:
        _, found = node.upgrade(variants.bundle("1.0", "1.4"))
        assert (found["outcome"], found["class"]) == ("committed", "soft-reboot"), found
    record_property("load", load.figures())
    assert load.failures == []
    assert node.boot() == boot
    assert {"before", *load.written} <= node.titles()
    runs(node, variants, "1.4", whole=False)
    base = next(layer for layer in variants.made["1.0"].manifest.layers if layer.kind == "base")
    assert mounted_layers(node)[OLD_ROOT] == f"base-{base.digest}.erofs"
    assert node.status()["data"] == data
    with Load(node) as second:
        status, rolled = node.tool("rollback", "--yes")
        assert (status, rolled["outcome"], rolled["class"]) == (4, "restarting", "soft-reboot"), rolled
        assert node.over()["outcome"] == "committed"
    record_property("load of the rollback", second.figures())
    assert second.failures == []
    assert node.boot() == boot
    assert "before" in node.titles()
    assert not set(load.written[-1:]) & node.titles()  # the data of before the upgrade
    runs(node, variants, "1.0", whole=False)
    assert OLD_ROOT in mounted_layers(node)
    node.put(b"rest", "/state/layers/base-0000.erofs.partial")
    assert node.tool("cleanup")[1]["files"] == 1
    assert set(mounted_layers(node)) == set(PLACES.values())  # what is mounted would keep the room of a removed layer


@FULL
def test_next_base_layer_takes_the_place_of_the_old_root(node: Machine, variants: Variants) -> None:
    variants.release("1.5", USERSPACE)
    variants.release("1.6", replace("recipes/base/recipe.yaml", "exclude:\n", "exclude:\n  - /usr/share/bug\n"))
    assert node.upgrade(variants.bundle("1.0", "1.5"))[1]["class"] == "soft-reboot"
    assert OLD_ROOT in mounted_layers(node)
    place = node.put(variants.bundle("1.5", "1.6"), "/state/next.bundle")
    assert node.tool("install", place, "--download-only")[1]["outcome"] == "downloaded"
    assert set(mounted_layers(node)) == set(PLACES.values())  # the next soft reboot begins without it


def test_new_kernel_is_a_reboot(node: Machine, variants: Variants) -> None:
    made = variants.release("2.0", with_lock(todays_lock()))
    old = node.ssh("uname -r").strip()
    if made.manifest.kernel.version == old:
        pytest.skip(f"Debian has no newer kernel than the release's own {old} today")
    boot = node.boot()
    status, found = node.upgrade(variants.bundle("1.0", "2.0"))
    assert (status, found["outcome"], found["class"]) == (4, "committed", "reboot"), found
    assert node.boot() != boot
    assert node.ssh("uname -r").strip() == made.manifest.kernel.version
    assert "before" in node.titles()
    node.wait_healthy()
    runs(node, variants, "2.0")
    assert "next_entry=try" not in node.ssh("mount -o ro /dev/vda2 /tmp && cat /tmp/grub/grubenv; umount /tmp")
