"""What an upgrade will do: how deep it goes, which units and which data it touches, and which bundles lead there."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance import bundle as making
from appliance import channel as channels
from appliance.bundle import ReleaseFiles
from appliance.node import refusals
from appliance.node.keys import PUBLIC, Trust, dump_key
from appliance.node.upgrade import engine, journal, looking, mounts, obtain, planning, records, staging
from appliance.node.upgrade.node import Node, NotUpgradable, Settings
from appliance.node.upgrade.planning import Plan
from tests.unit.releases import OTHER, SIGNER, TRUST, Maker

MB = 1_000_000


@dataclass
class World:
    """A node's state partition, and folders that stand for its mounted layers."""

    folder: Path
    maker: Maker
    made: dict[str, ReleaseFiles] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    running: str = "1.0"
    free: int = 100_000 * MB

    @property
    def root(self) -> Path:
        return self.folder / "state"

    def add(self, version: str, data: int | None = None, **changes: Any) -> ReleaseFiles:
        """A release whose files are all on the node."""
        made = self.release(version, **changes)
        for digest, file in staging.wanted_files(str(self.root), made.manifest, "one").items():
            Path(file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made.files[digest], file.path)
        records.record_release(str(self.root), version, made.content, "one")
        if data is not None:
            (self.root / "releases" / version / "data").write_text(str(data))
        return made

    def release(self, version: str, **changes: Any) -> ReleaseFiles:
        self.made[version] = self.maker.release(version, **changes)
        return self.made[version]

    def bundle(self, start: str, goal: str) -> Path:
        old = self.made[start] if start else None
        name = self.folder / making.file_name(old, self.made[goal])
        return making.make(old, self.made[goal], SIGNER, name).path

    def node(self) -> Node:
        held = records.held_releases(str(self.root))
        description = {"name": "one", "units": self.units(), "data": ["app"]}
        return Node(
            "one", "/dev/vda3", held[self.running], 1, held, self.settings, description, root=str(self.root)
        )  # fmt: skip

    def units(self) -> dict[str, Any]:
        app = str(self.folder / "app")
        return {
            "nginx.service": {"recipe": "nginx", "on_change": "reload", "files": ["/etc/nginx/nginx.conf"]},
            "app.service": {"recipe": "app", "on_change": "restart", "files": [f"{app}/lib/"]},
        }

    def write(self, layer: str, path: str, text: str) -> None:
        file = self.folder / layer / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def plan(self, version: str, **options: str) -> Plan:
        node = self.node()
        return planning.plan(node, node.held[version], **options)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A node that runs 1.0, with data 1."""
    (tmp_path / "files").mkdir()
    made = World(tmp_path, Maker(tmp_path / "files"))
    for name in ("app", "config", "next/app", "next/config", "state/data/1"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(mounts, "CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(mounts, "APP", str(tmp_path / "app"))
    monkeypatch.setattr(mounts, "keep_config", lambda _trees: None)
    monkeypatch.setattr(mounts, "show", lambda _trees, kinds: {kind: str(tmp_path / "next" / kind) for kind in kinds})
    monkeypatch.setattr(mounts, "hide", lambda: None)
    monkeypatch.setattr(obtain, "INCOMING", str(tmp_path / "state/upgrade/incoming"))
    monkeypatch.setattr(obtain, "COUNTER", str(tmp_path / "state/upgrade/counter"))
    for module in (obtain, staging):
        monkeypatch.setattr(module, "free", lambda _root: made.free)
    made.add("1.0")
    for layer in ("config", "next/config"):
        made.write(layer, "etc/nginx/nginx.conf", "one")
        made.write(layer, "etc/samepage/node.json", json.dumps({"units": made.units()}))
    for layer in ("app", "next/app"):
        made.write(layer, "lib/main.py", "one")
    return made


# --- depth, units, data ----------------------------------------------------------------------------------------------


def test_a_changed_template_touches_its_unit_and_no_data(world: World) -> None:
    world.add("1.1", nginx=b"two")
    world.write("next/config", "etc/nginx/nginx.conf", "two")
    found = world.plan("1.1")
    begun = found.journal
    assert (begun.depth, begun.units, begun.with_data) == ("live", {"nginx.service": "reload"}, False)
    assert (begun.old, begun.new, begun.running_data, begun.old_data, begun.new_data) == ("1.0", "1.1", 1, 1, 1)
    assert "/etc/nginx/nginx.conf" in found.changed
    assert found.needs == "live"


def test_a_unit_that_keeps_data_is_protected_by_a_snapshot(world: World) -> None:
    world.add("1.1", app=b"print(2)")
    world.write("next/app", "lib/main.py", "two")
    found = world.plan("1.1", stop_before="health")
    begun = found.journal
    assert (begun.depth, begun.units, begun.with_data) == ("live", {"app.service": "restart"}, True)
    assert (begun.running_data, begun.old_data, begun.new_data, begun.spare_data) == (1, 2, 1, 0)
    assert begun.stop_before == "health"
    assert found.changed == {f"{world.folder}/app/lib/main.py"}


def test_another_schema_is_protected_whatever_is_touched(world: World) -> None:
    world.add("1.1", nginx=b"two", schema_level=2)
    assert world.plan("1.1").journal.with_data


@pytest.mark.parametrize(
    ("changes", "depth"),
    [({"library": b"patched" * 1000}, "soft-reboot"), ({"kernel": b"linux 2"}, "reboot"), ({}, "live")],
)
def test_the_depth_is_what_the_difference_asks_for(world: World, changes: dict[str, Any], depth: str) -> None:
    world.add("1.1", **changes)
    found = world.plan("1.1")
    assert (found.journal.depth, found.needs) == (depth, depth)
    assert found.journal.units == {}
    assert found.journal.with_data == (depth != "live")


@pytest.mark.parametrize("apply", ["soft-reboot", "reboot"])
def test_a_deeper_class_may_be_asked_for(world: World, apply: str) -> None:
    world.add("1.1", nginx=b"two")
    world.write("next/config", "etc/nginx/nginx.conf", "two")
    found = world.plan("1.1", apply=apply)
    assert (found.journal.depth, found.needs, found.journal.units) == (apply, "live", {})
    assert found.journal.with_data


def test_a_rollback_with_its_data_starts_userspace_anew(world: World) -> None:
    world.add("0.9", data=7, nginx=b"zero")
    for number in (7, 8):
        (world.root / "data" / str(number)).mkdir()
    begun = world.plan("0.9", action="rollback", data="restore").journal
    assert (begun.action, begun.depth, begun.with_data) == ("rollback", "soft-reboot", True)
    assert (begun.running_data, begun.old_data, begun.new_data, begun.spare_data) == (1, 1, 9, 7)
    kept = world.plan("0.9", action="rollback", data="keep").journal
    assert (kept.depth, kept.old_data, kept.new_data, kept.spare_data) == ("live", 1, 1, 7)


# --- bundles and channels --------------------------------------------------------------------------------------------


def silent(_state: str, _done: int, _total: int) -> None:
    pass


def test_a_plan_of_a_bundle_writes_nothing(world: World) -> None:
    world.release("1.1", nginx=b"two", packages={"nginx": "1.27"})
    path = world.bundle("1.0", "1.1")
    before = sorted(world.root.rglob("*"))
    wanted = obtain.chain(world.node(), str(path), TRUST, silent, allow_downgrade=False)
    found = obtain.describe(world.node(), wanted, silent, allow_downgrade=False)
    assert (found["from"], found["to"], found["class"], found["outcome"]) == ("1.0", "1.1", "live", "planned")
    assert found["units"] == {"nginx.service": "reload"}
    assert found["packages"] == {"nginx": ["1.26", "1.27"]}
    assert [part["kind"] for part in found["parts"]] == ["manifest", "config"]
    assert sorted(world.root.rglob("*")) == before


@pytest.fixture
def served(world: World) -> Path:
    """A channel with 1.0 -> 1.1 -> 1.2, and the node's settings that name it."""
    world.release("1.1", nginx=b"two")
    world.release("1.2", nginx=b"three", app=b"print(3)")
    folder = world.folder / "channel"
    for start, goal in (("1.0", "1.1"), ("1.1", "1.2")):
        channels.add(folder, [world.bundle(start, goal)], SIGNER, int(time.time()))
    world.settings = world.settings._replace(channel=f"file://{folder}")
    return folder


def test_a_channel_leads_there_in_steps(world: World, served: Path) -> None:
    wanted = obtain.chain(world.node(), "", TRUST, silent, allow_downgrade=False)
    assert [Path(file).name for file in wanted.files] == ["samepage-1.0-to-1.1.bundle", "samepage-1.1-to-1.2.bundle"]
    assert wanted.goal == world.made["1.2"].digest
    found = obtain.describe(world.node(), wanted, silent, allow_downgrade=False)
    assert (found["from"], found["to"], found["class"]) == ("1.0", "1.2", "live")
    made = obtain.stage_all(world.node(), wanted, silent, allow_downgrade=False)
    assert made is not None
    assert (made.id, made.digest) == ("1.2", wanted.goal)
    assert set(records.held_releases(str(world.root))) == {"1.0", "1.1", "1.2"}
    wanted = obtain.chain(world.node(), "", TRUST, silent, allow_downgrade=False)
    assert (wanted.files, wanted.goal) == ((), made.digest)  # the node has it
    assert obtain.describe(world.node(), wanted, silent, allow_downgrade=False)["to"] == "1.2"
    again = obtain.stage_all(world.node(), wanted, silent, allow_downgrade=False)
    assert again is not None
    assert again.id == "1.2"
    layer = next(layer for layer in made.manifest.layers if layer.kind == "app")
    Path(records.layer_path(str(world.root), "app", layer.digest)).unlink()
    with pytest.raises(refusals.Damaged, match=r"1\.2 is on this node, but not its"):
        obtain.stage_all(world.node(), wanted, silent, allow_downgrade=False)
    assert (world.root / "upgrade/counter").read_text() == "2\n"
    assert served.is_dir()


def test_what_the_running_release_is_in_the_channel(
    world: World, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "trust", lambda: TRUST)
    monkeypatch.setattr(looking, "WORKING", str(world.folder / "run/lock"))
    options = argparse.Namespace(source="", allow_downgrade=False, json=True)
    found = looking.check(world.node(), options)
    assert (found["status"], found["newest"], found["failed_before"]) == (0, "1.2", None)
    assert looking.plan(world.node(), options)["to"] == "1.2"
    world.add("1.2", nginx=b"three", app=b"print(3)")
    world.running = "1.2"
    assert looking.check(world.node(), options)["status"] == 2
    assert looking.plan(world.node(), options)["outcome"] == "nothing"
    world.add("1.3", nginx=b"four")
    world.running = "1.3"
    found = looking.check(world.node(), options)
    assert (found["status"], found["text"]) == (2, "release 1.3 is newer than the channel's newest, 1.2")
    with pytest.raises(refusals.Downgrade):
        looking.plan(world.node(), options)
    assert served.is_dir()


def test_room_is_looked_for_before_anything_is_fetched(world: World, served: Path) -> None:
    world.free = 200 * MB
    with pytest.raises(refusals.NoRoom, match="are free"):
        obtain.chain(world.node(), "", TRUST, silent, allow_downgrade=False)
    source = f"file://{served}/samepage-1.0-to-1.1.bundle"
    with pytest.raises(refusals.NoRoom, match="more is not free"):
        obtain.chain(world.node(), source, TRUST, silent, allow_downgrade=False)
    assert not any(path.stat().st_size for path in (world.root / "upgrade/incoming").glob("*.partial"))
    world.free = 300 * MB
    assert obtain.chain(world.node(), source, TRUST, silent, allow_downgrade=False).goal == world.made["1.1"].digest


def test_without_a_channel_a_bundle_must_be_named(world: World) -> None:
    with pytest.raises(refusals.NoWay, match="no channel is set"):
        obtain.chain(world.node(), "", TRUST, silent, allow_downgrade=False)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """The release's keys, the site's keys, and the credential."""
    places = tmp_path / "release", tmp_path / "site", tmp_path / "credential"
    monkeypatch.setattr(obtain, "KEY_FOLDERS", tuple(map(str, places[:2])))
    monkeypatch.setattr(obtain, "KEY_CREDENTIAL", str(places[2]))
    return places


def test_keys_come_from_the_release_the_site_and_a_credential(folders: tuple[Path, Path, Path]) -> None:
    release, site, credential = folders
    assert obtain.trust() == Trust({})
    release.mkdir()
    (release / "team.pub").write_bytes(dump_key(SIGNER.public, PUBLIC, "the team"))
    credential.write_bytes(dump_key(OTHER.public, PUBLIC, "mine") + b"\n")
    assert set(obtain.trust().keys) == {SIGNER.id, OTHER.id}
    site.mkdir()
    (site / "revoked").write_text(f"{SIGNER.id}\n")
    with pytest.raises(refusals.RevokedKey):
        obtain.trust().verify(SIGNER.id, SIGNER.sign(b"x"), b"x")
    obtain.trust().verify(OTHER.id, OTHER.sign(b"x"), b"x")


@pytest.mark.parametrize("spoil", ["pub", "revoked", "credential"])
def test_a_key_that_cannot_be_read_stops_everything(folders: tuple[Path, Path, Path], spoil: str) -> None:
    """Half a list of revoked keys would trust too much."""
    _, site, credential = folders
    site.mkdir()
    place: dict[str, Callable[[], Path]] = {
        "pub": lambda: site / "x.pub", "revoked": lambda: site / "revoked", "credential": lambda: credential
    }  # fmt: skip
    place[spoil]().write_bytes(b"no key\n")
    with pytest.raises(NotUpgradable, match="a trusted key cannot be read"):
        obtain.trust()


# --- what is held against a release ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message", "blameless"),
    [
        ("hold", "nginx.service still serves after 25 s", True), ("snapshot", "no space left on device", True),
        ("health", "not healthy", False), ("switch", "this kernel has no software watchdog", False),
        ("health", engine.BROKEN_OFF, True), ("migrate", engine.RESTARTED, True), ("commit", engine.CALLED_OFF, True),
    ],
)  # fmt: skip
def test_a_release_is_tried_again_where_it_is_not_to_blame(
    world: World, state: str, message: str, blameless: bool
) -> None:
    world.add("1.1", nginx=b"two")
    planned = world.plan("1.1")
    begun = planned.journal._replace(reason=state, message=message)
    engine.remember(engine.Job(world.node(), planned.old, planned.new, begun, silent), "failed")
    found = journal.failed_before(str(world.root), world.made["1.1"].digest)
    assert found is not None
    assert (found["state"], found["reason"], found["blameless"]) == (state, message, blameless)
