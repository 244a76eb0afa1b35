from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import lock as locking
from appliance.apt import find_mirrors
from appliance.errors import CommandError, HostError, LockError
from appliance.model import Lock, Model, Package
from tests.archives import EPOCH, make_deb, publish

WANTED = {"core": ("kernel",), "full": ("app", "kernel"), "tools": ("tool",)}


@pytest.fixture
def mirrors(tmp_path: Path) -> dict[str, str]:
    make_deb(tmp_path, "base", fields=["Essential: yes"])
    make_deb(tmp_path, "kernel", "6.12", fields=["Depends: helper | other-helper"])
    make_deb(tmp_path, "helper", "1:2.0~rc1+b1")
    make_deb(tmp_path, "other-helper")
    make_deb(tmp_path, "app", fields=["Depends: base", "Recommends: extra"])
    make_deb(tmp_path, "extra")
    make_deb(tmp_path, "tool")
    return publish(tmp_path)


def resolve(mirrors: dict[str, str], wanted: dict[str, tuple[str, ...]] | None = None) -> Lock:
    return locking.resolve(wanted or WANTED, mirrors, keyring=None)


def names(lock: Lock, name: str) -> list[str]:
    return [package.name for package in lock.sets[name]]


def test_resolves_closures_without_recommendations(mirrors: dict[str, str]) -> None:
    lock = resolve(mirrors)
    assert names(lock, "core") == ["base", "helper", "kernel"]
    assert names(lock, "full") == ["app", "base", "helper", "kernel"]
    assert names(lock, "tools") == ["tool"]
    assert (lock.suite, lock.epoch) == ("trixie", EPOCH)


def test_states_where_each_package_is_and_what_it_is(mirrors: dict[str, str]) -> None:
    helper = resolve(mirrors).sets["core"][1]
    assert (helper.name, helper.version, helper.architecture) == ("helper", "1:2.0~rc1+b1", "all")
    assert (helper.archive, helper.path) == (
        "debian",
        "pool/main/h/helper/helper_1:2.0~rc1+b1_all.deb".replace(":", "%3a"),
    )
    assert helper.size > 0
    assert len(helper.sha256) == 64


def test_what_the_core_chose_stays_chosen_in_the_full_set(mirrors: dict[str, str], tmp_path: Path) -> None:
    make_deb(tmp_path, "picky", fields=["Depends: other-helper"])
    publish(tmp_path)
    lock = resolve(mirrors, {**WANTED, "full": ("kernel", "picky")})
    assert set(lock.sets["core"]) <= set(lock.sets["full"])


def test_a_preferred_suite_comes_before_newer_versions(mirrors: dict[str, str], tmp_path: Path) -> None:
    make_deb(tmp_path, "helper", "1:2.1", archive="debian-security")
    make_deb(tmp_path, "fix", archive="debian-security")
    publish(tmp_path)
    wanted = {**WANTED, "core": ("kernel", "fix")}
    for prefer, version in (("", "1:2.1"), ("trixie", "1:2.0~rc1+b1")):
        lock = locking.resolve(wanted, mirrors, keyring=None, prefer=prefer)
        found = {package.name: package for package in lock.sets["core"]}
        assert found["helper"].version == version
        assert found["fix"].archive == "debian-security"  # what only the other suite has is taken from there


def test_unknown_packages_are_named_all_at_once(mirrors: dict[str, str]) -> None:
    with pytest.raises(LockError, match="no package named krenel, tol"):
        resolve(mirrors, {"core": ("krenel",), "full": ("krenel",), "tools": ("tol",)})


def test_a_mirror_without_signature_is_refused(mirrors: dict[str, str], tmp_path: Path) -> None:
    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(b"")
    with pytest.raises(CommandError, match="not signed"):
        locking.resolve(WANTED, mirrors, keyring=keyring)


def test_missing_archive_keys_are_named() -> None:
    with pytest.raises(HostError) as caught:
        locking.resolve(WANTED, {}, keyring=Path("/nonexistent.gpg"))
    assert caught.value.hint == "install the package debian-archive-keyring"


def test_a_mirror_out_of_reach_is_an_error_with_a_hint(tmp_path: Path) -> None:
    gone = {"debian": f"file:{tmp_path}/no", "debian-security": f"file:{tmp_path}/no-security"}
    with pytest.raises(CommandError) as caught:
        resolve(gone)
    assert "--mirror" in caught.value.hint


# --- the file --------------------------------------------------------------------------------------------------------

PACKAGES = st.builds(
    Package,
    name=st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,12}", fullmatch=True),
    version=st.from_regex(r"([0-9]:)?[0-9][A-Za-z0-9.+~]{0,8}(-[0-9]+)?", fullmatch=True),
    architecture=st.sampled_from(["amd64", "all"]),
    archive=st.sampled_from(["debian", "debian-security"]),
    path=st.from_regex(r"pool/[a-z]{1,8}/[a-z0-9_.%+~-]{1,12}deb", fullmatch=True).filter(
        lambda path: ".." not in path
    ),
    size=st.integers(0, 10**9),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)


@given(st.lists(PACKAGES, max_size=6, unique_by=lambda package: package.name), st.randoms(use_true_random=False))
def test_reading_gives_what_was_written(packages: list[Package], chance: Random) -> None:
    packages.sort(key=lambda package: package.name)
    chosen = [tuple(package for package in packages if chance.random() < 0.6) for _ in locking.SETS]
    lock = Lock(
        "trixie",
        1,
        dict.fromkeys((*locking.SETS, locking.OMITTED), ("a",)),
        dict(zip(locking.SETS, chosen, strict=True)),
    )
    text = locking.format_lock(lock)
    data = json.loads(text)
    assert [entry["name"] for entry in data["packages"]] == sorted({p.name for some in chosen for p in some})
    assert read(text) == lock


def read(text: str) -> Lock:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packages.lock"
        file.write_text(text)
        return locking.read_lock(file)


LOCK = Lock(
    "trixie",
    EPOCH,
    dict.fromkeys((*locking.SETS, locking.OMITTED), ("a",)),
    {name: (Package("a", "1", "all", "debian", "pool/a.deb", 3, "0" * 64),) for name in locking.SETS},
)


def test_one_line_per_package_makes_readable_diffs() -> None:
    lines = locking.format_lock(LOCK).splitlines()
    assert sum('"name": "a"' in line for line in lines) == 1
    assert '"sets": ["core", "full", "tools"]' in next(line for line in lines if '"name": "a"' in line)


def test_the_projects_lock_names_no_host() -> None:
    text = (Path(__file__).parents[2] / "recipes/packages.lock").read_text()
    assert "://" not in text
    assert ".org" not in text


def test_writing_leaves_no_torn_file(tmp_path: Path) -> None:
    file = tmp_path / "packages.lock"
    locking.write_lock(LOCK, file)
    assert [path.name for path in tmp_path.iterdir()] == ["packages.lock"]
    assert locking.read_lock(file) == LOCK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"packages\.lock:\d+: not JSON"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format 9 is unknown"),
        (lambda text: text.replace('"epoch"', '"epok"'), "the key 'epoch' is missing"),
        (lambda text: text.replace("0" * 64, "0" * 63), "the sha256 of a is not 64 hex digits"),
        (lambda text: text.replace("pool/a.deb", "/etc/a.deb"), "the path of a leaves the archive"),
        (lambda text: text.replace("pool/a.deb", "pool/../../a.deb"), "the path of a leaves the archive"),
        (lambda text: text.replace('"all"', '"arm64"'), "a is for arm64, not amd64"),
        (lambda text: text.replace('"size": 3', '"size": "x"'), "invalid literal"),
        (lambda text: text.replace('"packages": [', '"packages": [3, '), "packages.lock: "),
    ],
)  # fmt: skip
def test_damage_is_named(change: object, message: str) -> None:
    with pytest.raises(LockError, match=message) as caught:
        read(change(locking.format_lock(LOCK)))  # type: ignore[operator]
    assert caught.value.hint


def test_a_missing_lock_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="there is no lock file") as caught:
        locking.read_lock(tmp_path / "packages.lock")
    assert "./build.py lock" in caught.value.hint


# --- against the recipes ---------------------------------------------------------------------------------------------


def test_the_core_is_the_base_recipe(model: Model) -> None:
    wanted = locking.wanted(model)
    base = next(recipe for recipe in model.recipes if recipe.name == "base")
    assert set(wanted["core"]) == set(base.packages)
    assert set(wanted["core"]) <= set(wanted["full"])
    assert "erofs-utils" in wanted["tools"]


def test_a_lock_that_does_not_fit_names_every_package(model: Model) -> None:
    wanted = locking.wanted(model)
    fitting = replace(LOCK, wanted=wanted)
    locking.check(fitting, model)
    with pytest.raises(LockError) as caught:
        locking.check(replace(LOCK, wanted={**wanted, "full": (*wanted["core"], "left-over")}), model)
    missing = sorted(set(wanted["full"]) - set(wanted["core"]))
    for name in missing:
        assert f"{name} is not in the lock's set full" in caught.value.message
    assert "left-over is in the lock's set full, but no recipe asks for it" in caught.value.message


def test_what_moved() -> None:
    def locked(**versions: str) -> Lock:
        some = tuple(Package(name, version, "all", "debian", "p", 1, "0" * 64) for name, version in versions.items())
        return replace(LOCK, sets={"core": some, "full": some, "tools": ()})

    moved = locking.moves(locked(a="1", b="1", c="1"), locked(a="1", b="2", d="4"))
    assert [str(move) for move in moved] == ["b 1 -> 2", "c 1 (gone)", "d 4 (new)"]
    assert [str(move) for move in locking.moves(None, locked(a="1"))] == ["a 1 (new)"]
    assert locking.moves(locked(a="1"), locked(a="1")) == ()


# --- mirrors ---------------------------------------------------------------------------------------------------------


def test_a_named_mirror_wins() -> None:
    environ = {
        "SAMEPAGE_MIRROR": "http://one.invalid/debian/",
        "SAMEPAGE_SECURITY_MIRROR": "http://two.invalid/security",
    }
    assert find_mirrors("trixie", environ=environ) == {
        "debian": "http://one.invalid/debian",
        "debian-security": "http://two.invalid/security",
    }
    found = find_mirrors("trixie", mirror="http://three.invalid/d", environ=environ)
    assert found["debian"] == "http://three.invalid/d"


MIRROR = {"debian": "http://m.invalid/debian", "debian-security": "http://m.invalid/debian-security"}
FETCHED = "'http://m.invalid/debian-security/dists/x-security/Packages/Debian'\n'http://m.invalid/debian/dists/x/Packages/Debian'\n"
CONFIGURED = (
    "'http://m.invalid/debian/dists/x/InRelease' m.invalid_debian_dists_x_InRelease 0 \n"
    "'http://m.invalid/debian-security/dists/x-security/InRelease' y 0 \n"
)
OTHER = "'http://u.invalid/ubuntu/dists/noble/Packages/Ubuntu'\n'http://u.invalid/ubuntu/dists/noble/InRelease' z 0\n"
DEFAULT = {"debian": "http://default.invalid/debian", "debian-security": "http://default.invalid/security"}


@pytest.mark.parametrize(
    ("fetched", "configured", "found"),
    [(FETCHED, "", MIRROR), ("", CONFIGURED, MIRROR), (OTHER + FETCHED, OTHER, MIRROR), (OTHER, OTHER, DEFAULT)],
    ids=["lists fetched", "never fetched", "beside others", "not Debian"],
)
def test_the_hosts_apt_comes_before_mmdebstraps_default(
    monkeypatch: pytest.MonkeyPatch, fetched: str, configured: str, found: dict[str, str]
) -> None:
    default = (
        "deb http://default.invalid/debian s main\ndeb [signed-by=/k] http://default.invalid/security s-security main\n"
    )
    said = {"indextargets": (fetched, ""), "update": (configured, ""), "--quiet": ("", default)}

    def fake(argv: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        out, err = said[argv[1]]
        return subprocess.CompletedProcess(argv, 0, out.encode(), err.encode())

    monkeypatch.setattr("appliance.apt.run", fake)
    assert find_mirrors("trixie", environ={}) == found


def test_no_mirror_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.apt.run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, b"", b""))
    with pytest.raises(HostError, match="no mirror is known for debian and debian-security"):
        find_mirrors("trixie", environ={})


# --- packages that are left out --------------------------------------------------------------------------------------


def test_an_omitted_package_satisfies_its_dependants_and_brings_nothing(
    mirrors: dict[str, str], tmp_path: Path
) -> None:
    make_deb(tmp_path, "server", fields=["Depends: compiler (>= 1:19.1)"])
    make_deb(tmp_path, "compiler", "1:19.2", fields=["Depends: solver"])
    make_deb(tmp_path, "solver")
    publish(tmp_path)
    wanted = {**WANTED, "full": ("kernel", "server")}
    assert {"server", "compiler", "solver"} <= set(names(resolve(mirrors, wanted), "full"))
    lock = resolve(mirrors, {**wanted, "omitted": ("compiler",)})
    assert names(lock, "full") == ["base", "helper", "kernel", "server"]
    assert read(locking.format_lock(lock)) == lock


def test_a_lock_made_before_a_package_was_omitted_does_not_fit(model: Model) -> None:
    changed = replace(model, recipes=tuple(replace(recipe, omit=("compiler",)) for recipe in model.recipes))
    with pytest.raises(LockError, match="compiler is not in the lock's set omitted"):
        locking.check(replace(LOCK, wanted=locking.wanted(model)), changed)
