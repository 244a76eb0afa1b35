"""The verbs bundle and key on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance import bundle as making
from appliance import cli, signing
from appliance.node.channel import INDEX_NAME, parse_index
from appliance.node.keys import PUBLIC, SECRET, Trust, dump_key
from appliance.verbs import upgrades
from tests.unit.releases import OTHER, SIGNER, Maker


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    (tmp_path / "files").mkdir()
    return Maker(tmp_path / "files")


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration, with a signing key in it."""
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    place = signing.default_place()
    place.parent.mkdir(parents=True)
    place.write_bytes(dump_key(SIGNER.secret, SECRET, ""))
    place.chmod(0o600)
    return place


def bundle_of(maker: Maker, folder: Path) -> Path:
    old, new = maker.release(), maker.release("1.1", nginx=b"two", packages={"nginx": "1.27"})
    return making.make(old, new, SIGNER, folder / making.file_name(old, new)).path


def run(project: Path, *words: str) -> int:
    return cli.main(["-C", str(project), *words])


def test_a_bundle_is_shown_in_both_spellings(maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_of(maker, tmp_path)
    assert path.name == "samepage-1.0-to-1.1.bundle"
    texts = []
    for words in (["show", str(path)], ["--show", str(path)]):
        assert run(tmp_path, "bundle", *words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "release 1.0 -> release 1.1" in texts[0]
    assert "nginx 1.26 -> 1.27" in texts[0]
    assert run(tmp_path, "bundle", "show", str(path), "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["summary"]["units"] == {"one": {"nginx.service": "reload"}}
    assert value["size"] == path.stat().st_size
    assert value["unchanged"] == ["base", "app", "vmlinuz", "initrd"]
    assert {part["kind"] for part in value["parts"]} == {"manifest", "config"}


def test_a_bundle_of_the_personal_key_is_shown_too(
    maker: Maker, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_of(maker, tmp_path)
    key.rename(signing.personal_place())
    assert run(tmp_path, "bundle", "show", str(path)) == 0
    signing.personal_place().write_bytes(dump_key(OTHER.secret, SECRET, ""))
    assert run(tmp_path, "bundle", "show", str(path)) == 1
    assert f"signed by the key {SIGNER.id}, which is not trusted here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--from, or say --full"),
        (["show"], "bundle show FILE"),
        (["shwo", "x"], "bundle show FILE"),
        (["show", "x", "y"], "bundle show FILE"),
        (["show", "nowhere.bundle"], "no file nowhere.bundle"),
    ],
)
def test_wrong_words_say_what_to_say(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "bundle", *words) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def releases(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> dict[str, making.ReleaseFiles]:
    """Releases that --from and --to find by name."""
    known = {
        "1.0": maker.release(), "1.1": maker.release("1.1", app=b"1.1"), "1.2": maker.release("1.2", app=b"1.2"),
        "other 1.2": maker.release("1.2", app=b"other"),
    }  # fmt: skip
    monkeypatch.setattr(
        upgrades, "_releases", lambda _session, _options, goal, starts: (known[goal], [known[one] for one in starts])
    )
    return known


@pytest.mark.usefixtures("releases")
def test_several_starts_make_several_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bundle", "--from", "1.0", "--from", "1.1", "--to", "1.2", "--full", "--json"]
    assert run(tmp_path, *words) == 0
    made = json.loads(capsys.readouterr().out)
    names = ["samepage-1.0-to-1.2.bundle", "samepage-1.1-to-1.2.bundle", "samepage-any-to-1.2.bundle"]
    assert [one["path"] for one in made] == [str(tmp_path / "dist" / name) for name in names]
    assert [one["size"] for one in made] == [(tmp_path / "dist" / name).stat().st_size for name in names]


@pytest.mark.usefixtures("releases")
def test_a_release_leads_not_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "bundle", "--from", "1.2", "--to", "1.2") == 1
    assert "nothing to upgrade" in capsys.readouterr().err
    assert run(tmp_path, "bundle", "--from", "1.2", "--to", "other 1.2") == 0
    assert "warning: two different releases are called 1.2" in capsys.readouterr().err


def test_a_folder_without_another_release_makes_a_full_bundle_or_none(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(upgrades, "_releases", lambda *_: (maker.release(), []))
    assert run(tmp_path, "bundle", "--from", "dist") == 2
    assert "no other release than 1.0 is in dist" in capsys.readouterr().err
    assert run(tmp_path, "bundle", "--from", "dist", "--full") == 0
    assert "samepage-any-to-1.0.bundle" in capsys.readouterr().out


def test_a_channel_goes_on_with_another_key(
    maker: Maker, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "channel", tmp_path / "other.key"
    other.write_bytes(dump_key(OTHER.secret, SECRET, ""))
    other.chmod(0o600)
    assert run(tmp_path, "channel", "add", str(folder), str(bundle_of(maker, tmp_path))) == 0
    key.unlink()
    words = ["channel", "keep", str(folder), "--revoke", SIGNER.id, "--key", str(other)]
    assert run(tmp_path, *words) == 1
    assert "not trusted here" in capsys.readouterr().err
    trusted = tmp_path / signing.TRUSTED
    trusted.mkdir(parents=True)
    (trusted / "team.pub").write_bytes(dump_key(SIGNER.public, PUBLIC, ""))
    assert run(tmp_path, *words) == 0
    assert f"from now on it is signed by {OTHER.id}" in capsys.readouterr().err
    index = parse_index((folder / INDEX_NAME).read_bytes(), Trust({OTHER.id: OTHER.public}))
    assert (index.counter, index.revoked, index.newest.version) == (2, frozenset({SIGNER.id}), "1.1")
    assert run(tmp_path, *words) == 0
    assert "another key" not in capsys.readouterr().err
    (folder / INDEX_NAME).write_bytes(b"")
    assert run(tmp_path, *words) == 1


def test_the_key_in_use_is_shown(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "key", "show") == 0
    assert capsys.readouterr().out.strip() == SIGNER.id
    key.rename(signing.personal_place())
    assert run(tmp_path, "key", "show") == 0
    assert capsys.readouterr().out.strip() == SIGNER.id
    signing.personal_place().unlink()
    assert run(tmp_path, "key", "show") == 1
    assert "./build.py key new NAME" in capsys.readouterr().err
