"""What the builder keeps for upgrades: channels, the signing key, and earlier releases that are found again."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from appliance import bundle as making
from appliance import channel, releases, signing
from appliance.errors import ApplianceError, HostError, UnknownName
from appliance.node import bundle as format_
from appliance.node.channel import INDEX_NAME, check_index, parse_index, plan
from appliance.node.keys import PUBLIC, load_trust, parse_key
from appliance.store import Store
from tests.unit.releases import OTHER, SIGNER, TRUST, Maker

NOW = 1_800_000_000


class NoTools:
    """Tools that must not be needed."""

    root = Path("/nonexistent")

    def run(self, program: str, *args: str | Path, **options: Any) -> Any:
        raise AssertionError(f"{program} was called with {args} {options}")


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    (tmp_path / "files").mkdir()
    return Maker(tmp_path / "files")


def bundle(old: making.ReleaseFiles | None, new: making.ReleaseFiles, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return making.make(old, new, SIGNER, folder / making.file_name(old, new)).path


def test_a_channel_grows_and_drops_old_releases(maker: Maker, tmp_path: Path) -> None:
    one, two, three = (maker.release(f"1.{number}", nginx=b"%d" % number) for number in range(3))
    made, folder = tmp_path / "made", tmp_path / "channel"
    channel.add(folder, [bundle(None, one, made)], SIGNER, NOW)
    channel.add(folder, [bundle(one, two, made)], SIGNER, NOW + 10)
    index = channel.add(folder, [bundle(two, three, made)], SIGNER, NOW + 20)
    assert index == parse_index((folder / INDEX_NAME).read_bytes(), TRUST)
    check_index(index, NOW + 30, 2, "test", "amd64")
    assert [bundle.file for bundle in plan(index, "1.0", [one.digest])] == [
        "samepage-1.0-to-1.1.bundle",
        "samepage-1.1-to-1.2.bundle",
    ]
    assert plan(index, "0.9", ["f" * 64])[0].file == "samepage-any-to-1.0.bundle"
    for entry in index.bundles:
        assert (folder / entry.file).stat().st_size == entry.size
    kept = channel.add(folder, [], SIGNER, NOW + 30, keep=1, revoked=[OTHER.id])
    assert (kept.counter, kept.newest.version, kept.revoked) == (4, "1.2", frozenset({OTHER.id}))
    assert sorted(path.name for path in folder.iterdir()) == [INDEX_NAME, "samepage-1.1-to-1.2.bundle"]


def test_a_channel_takes_no_foreign_bundle_and_no_foreign_index(maker: Maker, tmp_path: Path) -> None:
    path = bundle(None, maker.release(), tmp_path / "made")
    with pytest.raises(ApplianceError, match="no channel yet"):
        channel.add(tmp_path / "channel", [], SIGNER, NOW)
    with pytest.raises(ApplianceError, match="not trusted"):
        channel.add(tmp_path / "channel", [path], OTHER, NOW)
    channel.add(tmp_path / "channel", [path], SIGNER, NOW)
    with pytest.raises(ApplianceError, match="not trusted"):
        channel.add(tmp_path / "channel", [], OTHER, NOW)
    other = bundle(None, maker.release("1.1", layout="production"), tmp_path / "made")
    with pytest.raises(ApplianceError, match="production"):
        channel.add(tmp_path / "channel", [other], SIGNER, NOW)


def test_a_signing_key_is_made_once_and_kept_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "config" / "signing.key"
    monkeypatch.setenv(signing.VARIABLE, str(place))
    with pytest.raises(ApplianceError, match="no signing key"):
        signing.load()
    signer, public = signing.create("team", tmp_path)
    assert signing.load() == signer
    assert place.stat().st_mode & 0o777 == 0o600
    assert load_trust(str(public.parent)).keys == {signer.id: signer.public}
    with pytest.raises(ApplianceError, match="there already"):
        signing.create("team", tmp_path)
    place.chmod(0o644)
    with pytest.raises(ApplianceError, match="others may read"):
        signing.load()


def test_a_personal_key_is_made_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    said: list[str] = []
    assert signing.find() is None
    signer = signing.ensure(said.append)
    place = signing.personal_place()
    assert place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert len(said) == 1
    assert str(place) in said[0]
    assert signing.ensure(said.append) == signing.find() == signer
    assert len(said) == 1
    assert parse_key(signing.public_line(signer), PUBLIC) == signer.public
    assert signing.public_line(signer).count(b"\n") == 1
    with pytest.raises(ApplianceError, match="no signing key"):
        signing.load()  # what others install is never signed with it
    team, _ = signing.create("team", tmp_path)
    assert signing.ensure(said.append) == team != signer
    place.chmod(0o640)
    signing.default_place().unlink()
    with pytest.raises(ApplianceError, match="others may read"):
        signing.ensure(said.append)


def test_a_key_that_is_named_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "nowhere.key"))
    with pytest.raises(ApplianceError, match=r"nowhere\.key"):
        signing.ensure(lambda _text: None)
    monkeypatch.delenv(signing.VARIABLE)
    (tmp_path / "config").write_text("in the way")
    with pytest.raises(HostError, match="cannot write the signing key"):
        signing.ensure(lambda _text: None)


def test_users_without_a_name_have_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, comment in (("j. d\xf6e", b"j._d_e"), (None, b"builder")):

        def user(name: str | None = name) -> str:
            if name is None:
                raise KeyError("no entry")
            return name

        monkeypatch.setattr(signing.getpass, "getuser", user)
        assert signing.public_line(SIGNER).split() == [PUBLIC.encode(), b64encode(SIGNER.public), comment]


def keep(release: making.ReleaseFiles, dist: Path, store: Store) -> None:
    """What a build leaves: the manifest in dist, the files in the store."""
    dist.mkdir(exist_ok=True)
    (dist / f"samepage-appliance-{release.manifest.version}-amd64.manifest.json").write_bytes(release.content)
    for layer in release.manifest.layers:
        folder = store.root / "steps" / layer.kind / "key"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{layer.kind}-{layer.digest}.erofs").write_bytes(release.files[layer.digest].read_bytes())
    folder = store.root / "steps" / "initrd" / release.manifest.version
    folder.mkdir(parents=True)
    kernel = release.manifest.kernel
    digests = {"vmlinuz": kernel.vmlinuz.digest, "initrd": kernel.initrd.digest}
    for name, digest in digests.items():
        (folder / name).write_bytes(release.files[digest].read_bytes())
    (folder / "digests.json").write_text(str(digests).replace("'", '"'))


def test_a_release_is_found_by_version_manifest_and_folder(maker: Maker, tmp_path: Path) -> None:
    store, dist = Store(tmp_path / "cache", tmp_path), tmp_path / "dist"
    release = maker.release("1.0")
    keep(release, dist, store)
    manifest = next(dist.iterdir())
    for wanted in ("1.0", str(manifest), str(dist)):
        found = releases.find(wanted, dist, NoTools(), store)
        assert found.content == release.content
        assert {digest: path.read_bytes() for digest, path in found.files.items()} == {
            digest: release.files[digest].read_bytes() for digest in found.files
        }
    with pytest.raises(UnknownName, match=r"no release 1\.1"):
        releases.find("1.1", dist, NoTools(), store)
    keep(maker.release("1.1"), dist, store)
    with pytest.raises(UnknownName, match="one release"):
        releases.find(str(dist), dist, NoTools(), store)


def test_a_folder_names_every_release_but_the_goal(maker: Maker, tmp_path: Path) -> None:
    store, dist = Store(tmp_path / "cache", tmp_path), tmp_path / "dist"
    one, two, goal = (maker.release(f"1.{number}", nginx=b"%d" % number) for number in range(3))
    for release in (one, two, goal):
        keep(release, dist, store)
    found = releases.find_all(str(dist), goal, dist, NoTools(), store)
    assert [release.manifest.version for release in found] == ["1.0", "1.1"]
    assert [release.content for release in releases.find_all("1.0", goal, dist, NoTools(), store)] == [one.content]
    (tmp_path / "empty").mkdir()
    assert releases.find_all(str(tmp_path / "empty"), goal, dist, NoTools(), store) == []


def test_a_release_whose_files_are_gone_says_what_helps(maker: Maker, tmp_path: Path) -> None:
    store, dist = Store(tmp_path / "cache", tmp_path), tmp_path / "dist"
    keep(maker.release("1.0"), dist, store)
    for image in (store.root / "steps" / "base").glob("*/*"):
        image.unlink()
    with pytest.raises(ApplianceError, match="give the release's ISO"):
        releases.find("1.0", dist, NoTools(), store)


class Unpacker:
    """Tools that give the content of a layer's squashfs: the file that is packed."""

    root = Path("/nonexistent")

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content

    def run(self, program: str, *args: str | Path, **_options: Any) -> Any:
        assert program == "unsquashfs"
        folder = Path(args[args.index("-dest") + 1])
        folder.mkdir()
        (folder / self.name).write_bytes(self.content)


def test_a_running_release_is_found_by_its_manifest(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, dist = Store(tmp_path / "cache", tmp_path), tmp_path / "dist"
    running, tree = maker.release("1.0"), maker.release("1.1", nginx=b"two")
    keep(running, tmp_path / "elsewhere", store)
    known = {layer.digest: tree.files[layer.digest] for layer in tree.manifest.layers}
    found = releases.held(running.content, known, dist, NoTools(), store)
    assert (found.content, found.manifest) == (running.content, running.manifest)
    assert {name: path.read_bytes() for name, path in found.files.items()} == {
        name: running.files[name].read_bytes() for name in format_.files_of(running.manifest)
    }
    config = running.manifest.layers[-1].digest
    assert found.files[config].is_relative_to(store.root)
    # once the cache has lost it, only an ISO has it
    found.files[config].unlink()
    assert config not in releases.held(running.content, known, dist, NoTools(), store).files
    name = "samepage-appliance-1.0-amd64"
    dist.mkdir()
    (dist / f"{name}.manifest.json").write_bytes(running.content)
    assert config not in releases.held(running.content, known, dist, NoTools(), store).files
    (dist / f"{name}.iso").write_bytes(b"")
    monkeypatch.setattr(releases, "_take", lambda _iso, _place, target: target.write_bytes(b"packed"))
    damaged = Unpacker(f"config-{config}.erofs", b"other content")
    assert config not in releases.held(running.content, known, dist, damaged, store).files
    good = Unpacker(f"config-{config}.erofs", running.files[config].read_bytes())
    for tools in (good, NoTools()):  # the second time it is in the cache
        found = releases.held(running.content, known, dist, tools, store)
        assert found.files[config].read_bytes() == running.files[config].read_bytes()


def test_a_record_that_cannot_be_read_says_what_helps(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", tmp_path)
    with pytest.raises(ApplianceError, match="a node's release: the manifest is not JSON"):
        releases.held(b"", {}, tmp_path, NoTools(), store)
