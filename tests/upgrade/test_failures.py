"""A release that fails in whatever way gives way to the old one with the old data, by itself; `status` says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import boot_files, channel, release
from tests.upgrade.endings import (
    DOOR,
    FULL,
    NGINX,
    PRODUCT,
    USERSPACE,
    broken_product,
    came_back,
    impatient,
    put_bundle,
    sql,
    told_why,
)
from tests.upgrade.machines import Load, Machine
from tests.variants import SIGNER, Edit, Variants, replace, write

MIGRATIONS = "recipes/samepage/files/opt/samepage/share/samepage/migrations"
BAD_NGINX = replace("recipes/nginx/templates/etc/nginx/nginx.conf.j2", "sendfile on;", "sendfile perhaps;")
BAD_DOOR = replace(
    "recipes/nginx/templates/etc/systemd/system/nginx.service.j2", "User=www-data", "User=nobody-of-this-node"
)
BAD_PROBE = replace(
    "recipes/nginx/recipe.yaml",
    "health:\n",
    'health:\n  - {name: never, command: "/bin/sh -c \\"exit 3\\"", timeout: 5}\n',
)
HANG = """[Unit]
Description=Sleep for ever
DefaultDependencies=no
Before=sysinit.target basic.target

[Service]
Type=oneshot
ExecStart=/bin/sleep infinity
TimeoutStartSec=infinity

[Install]
WantedBy=sysinit.target
"""


def schema(level: int) -> Edit:
    return replace("recipes/samepage/recipe.yaml", "schema_level: 3", f"schema_level: {level}")


def migration(name: str, content: str) -> Edit:
    return write(f"{MIGRATIONS}/{name}.sql", content)


HALF_A_MIGRATION = (
    schema(4),
    migration(
        "0004_shades", "ALTER TABLE items ADD COLUMN shade text;\nALTER TABLE paintings ADD COLUMN shade text;\n"
    ),
)
ONE_OF_TWO_MIGRATIONS = (
    schema(5),
    migration("0004_colours", "ALTER TABLE items ADD COLUMN colour text;\nUPDATE items SET title = 'lost';\n"),
    migration(
        "0005_shades", "ALTER TABLE items ADD COLUMN shade text;\nALTER TABLE paintings ADD COLUMN shade text;\n"
    ),
)


# --- without a restart -----------------------------------------------------------------------------------------------


def test_refused_configuration_is_swapped_back_and_not_tried_again(
    node: Machine, variants: Variants, tmp_path: Path
) -> None:
    """Without data nothing restarts. The release comes by the channel, which offers it until there is another."""
    variants.release("4.0", BAD_NGINX)
    bundle = variants.bundle("1.0", "4.0")
    channel.add(tmp_path / "channel", [bundle], SIGNER, int(node.ssh("date +%s")))
    for file in (tmp_path / "channel").iterdir():
        node.put(file, f"/state/channel/{file.name}")
    before, main = node.invocations(), node.ssh(f"systemctl show -p MainPID --value {DOOR}")

    def fails(*words: str) -> None:
        status, found = node.tool(*words)
        assert (status, found["outcome"], found["class"]) == (5, "rolled-back", "live"), found
        assert 'invalid value "perhaps" in "sendfile" directive' in found["message"]
        came_back(node)
        assert "sendfile on;" in node.ssh("cat /etc/nginx/nginx.conf")
        assert node.ssh(f"systemctl show -p MainPID --value {DOOR}") == main
        assert {name: one for name, one in node.invocations().items() if name in before} == before

    fails()
    told_why(node, "rolled-back at migrate", 'invalid value "perhaps" in "sendfile" directive')
    status, found = node.tool()
    assert (status, found["outcome"]) == (2, "nothing"), found
    assert "was tried and did not stay" in found["message"]
    assert "perhaps" in found["message"]
    assert "--retry" in found["hint"]
    assert node.tool("check")[1]["failed_before"]["outcome"] == "rolled-back"
    fails("--retry")
    fails("install", put_bundle(node, bundle))  # who names a bundle wants it


def test_failing_probe(node: Machine, variants: Variants) -> None:
    variants.release("4.1", BAD_PROBE)
    impatient(node, 20)
    status, found = node.upgrade(variants.bundle("1.0", "4.1"))
    assert (status, found["outcome"], found["class"]) == (5, "rolled-back", "live"), found
    last = came_back(node)
    assert (last["state"], last["outcome"]) == ("health", "rolled-back")
    told_why(node, "rolled-back at health", "never: ")


# --- back by a restart of userspace ----------------------------------------------------------------------------------


def test_service_that_does_not_start(
    node: Machine, variants: Variants, record_property: Callable[[str, object], None]
) -> None:
    """Clients only wait, and what they were told is stored is there, written before, meanwhile or after."""
    variants.release("4.2", broken_product('raise RuntimeError("this release cannot serve")'))
    boot = node.boot()
    with Load(node) as load:
        status, found = node.upgrade(variants.bundle("1.0", "4.2"))
        assert (status, found["outcome"], found["class"]) == (5, "rolled-back", "live"), found
        assert "this release cannot serve" in found["message"]
        last = node.over()
    record_property("load", load.figures())
    assert load.failures == []
    assert "this release cannot serve" in last["reason"]
    came_back(node, *load.written)
    told_why(node, "rolled-back at migrate", "this release cannot serve")
    assert node.boot() == boot


@pytest.mark.parametrize(
    ("version", "edits"),
    [
        pytest.param("4.3", ONE_OF_TWO_MIGRATIONS, id="after-one-that-succeeded"),
        pytest.param("4.4", HALF_A_MIGRATION, id="half-way", marks=FULL),
    ],
)
def test_migration_that_fails(node: Machine, variants: Variants, version: str, edits: tuple[Edit, ...]) -> None:
    variants.release(version, *edits)
    applied = sql(node, "select level, checksum, applied_at::text from schema_migrations order by level")
    node.client().call("Items.create", title="just before", body="written just before the upgrade")
    status, found = node.upgrade(variants.bundle("1.0", version))
    assert (status, found["outcome"], found["class"]) == (5, "rolled-back", "live"), found
    node.over()
    came_back(node, "just before")
    told_why(node, "rolled-back at migrate", 'relation "paintings" does not exist')
    assert sql(node, "select level, checksum, applied_at::text from schema_migrations order by level") == applied
    assert "lost" not in node.titles()
    columns = sql(node, "select column_name from information_schema.columns where table_name = $$items$$")
    assert "title" in columns
    assert not {"colour", "shade"} & set(columns)


@FULL
def test_front_door_that_does_not_open(
    node: Machine, variants: Variants, record_property: Callable[[str, object], None]
) -> None:
    """It opens after the commit; where it does not, nobody was served and the data of before counts."""
    variants.release("4.5", PRODUCT, BAD_DOOR)
    with Load(node) as load:
        status, found = node.upgrade(variants.bundle("1.0", "4.5"))
        assert (status, found["outcome"], found["class"]) == (5, "rolled-back", "live"), found
        assert found["units"][DOOR] == "restart"
        last = node.over()
    record_property("load", load.figures())
    assert load.failures == []
    assert last["state"] == "open"
    came_back(node, *load.written)
    told_why(node, "rolled-back at open", DOOR)


@FULL
def test_service_that_does_not_start_after_a_soft_reboot(
    node: Machine, variants: Variants, record_property: Callable[[str, object], None]
) -> None:
    variants.release("4.6", USERSPACE, broken_product('raise ConfigError("this release cannot serve")'))
    boot = node.boot()
    with Load(node) as load:
        status, last = node.upgrade(variants.bundle("1.0", "4.6"))
        assert (status, last["outcome"], last["class"]) == (4, "rolled-back", "soft-reboot"), last
    record_property("load", load.figures())
    assert load.failures == []
    came_back(node, *load.written)
    told_why(node, "rolled-back at health", "this release cannot serve")
    assert node.boot() == boot


@FULL
def test_judge_that_fails(node: Machine, variants: Variants) -> None:
    """Nothing of a release that is tried is trusted, not even its own upgrade tool."""
    broken = replace(
        "appliance/node/upgrade/resume.py", "def after_boot(", 'raise SystemError("no judge")\n\n\ndef after_boot('
    )
    variants.release("4.7", USERSPACE, broken)
    status, last = node.upgrade(variants.bundle("1.0", "4.7"))
    assert (status, last["outcome"], last["class"]) == (4, "rolled-back", "soft-reboot"), last
    came_back(node)


# --- back by a restart of the machine --------------------------------------------------------------------------------


def test_kernel_that_panics(node: Machine, variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_files, "CMDLINE", f"{release.CMDLINE} panic=3 rdinit=/nonexistent")
    variants.release("4.8")
    boot = node.boot()
    node.client().call("Items.create", title="just before", body="written just before the upgrade")
    status, last = node.upgrade(variants.bundle("1.0", "4.8"))
    assert (status, last["outcome"], last["class"]) == (4, "rolled-back", "reboot"), last
    assert "Kernel panic" in node.log()
    came_back(node, "just before")
    told_why(node, "rolled-back at switch", "its kernel stopped: the machine restarted by itself")
    assert node.boot() != boot
    assert "rdinit" not in node.ssh("cat /proc/cmdline")


def test_boot_that_hangs(node: Machine, variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog that the initramfs starts needs nobody's help."""
    monkeypatch.setattr(boot_files, "CMDLINE", f"{release.CMDLINE} hangs=yes")
    unit = write("recipes/base/files/etc/systemd/system/hang.service", HANG)
    known = replace("recipes/base/recipe.yaml", "units:\n", "units:\n  hang.service: {on_change: none}\n")
    variants.release("4.9", unit, known)
    impatient(node, 60)
    node.client().call("Items.create", title="just before", body="written just before the upgrade")
    status, last = node.upgrade(variants.bundle("1.0", "4.9"))
    assert (status, last["outcome"], last["class"]) == (4, "rolled-back", "reboot"), last
    came_back(node, "just before")
    told_why(node, "rolled-back at switch", "did not become healthy in its time")


@FULL
def test_release_that_cannot_be_read(node: Machine, variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release that runs comes back, not the one before it."""
    variants.release("4.10", NGINX)
    assert node.upgrade(variants.bundle("1.0", "4.10"))[1]["outcome"] == "committed"
    node.client().call("Items.create", title="just before", body="written just before the upgrade")
    monkeypatch.setattr(boot_files, "CMDLINE", f"{release.CMDLINE} unreadable=yes")
    made = variants.release("4.11", NGINX, PRODUCT)
    app = next(layer.digest for layer in made.manifest.layers if layer.kind == "app")
    node.tool("install", put_bundle(node, variants.bundle("4.10", "4.11")), "--stop-before", "switch")
    node.ssh(f"dd if=/dev/zero of=/state/layers/app-{app}.erofs bs=4096 count=1 conv=notrunc 2>&1")
    status, found = node.tool("commit")
    assert (status, found["outcome"], found["class"]) == (4, "restarting", "reboot"), found
    assert node.over()["outcome"] == "rolled-back"
    assert "restarting with the one that is chosen" in node.log()
    came_back(node, "just before", version="4.10")
