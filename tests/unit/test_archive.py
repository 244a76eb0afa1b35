from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from appliance import archive
from appliance import lock as locking
from appliance.archive import VanishedError, fetch, snapshot_mirrors, to_fetch
from appliance.errors import ApplianceError, CommandError
from appliance.model import Lock, Package
from tests.archives import EPOCH, make_deb, publish


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An archive with a package `one` that is essential and a package `two`."""
    folder = tmp_path / "archive"
    make_deb(folder, "one", fields=["Essential: yes"])
    make_deb(folder, "two", "1:2.0+b1")
    publish(folder)
    return folder


@pytest.fixture
def lock(place: Path) -> Lock:
    return locking.resolve({"core": (), "full": ("two",), "tools": ("two",)}, publish(place), keyring=None)


def packages(lock: Lock) -> tuple[Package, ...]:
    return lock.sets["full"]


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[float, float, str]] = []

    def update(self, done: float, total: float, unit: str) -> None:
        self.calls.append((done, total, unit))


def test_fetches_each_package_once_and_keeps_it_by_content(lock: Lock, place: Path, tmp_path: Path) -> None:
    cache, progress = tmp_path / "cache", Recorder()
    total = sum(package.size for package in packages(lock))
    assert to_fetch(packages(lock), cache) == total
    found = fetch(packages(lock), publish(place), cache, progress)
    assert {package.sha256 for package in packages(lock)} == set(found)
    assert all(found[package.sha256].stat().st_size == package.size for package in packages(lock))
    assert all(done <= total_ == total and unit == "bytes" for done, total_, unit in progress.calls)
    assert to_fetch(packages(lock), cache) == 0
    assert fetch(packages(lock), {}, cache) == found  # no mirror is needed any more
    assert not list(cache.glob("fetch-*"))


def test_another_content_is_refused(lock: Lock, place: Path, tmp_path: Path) -> None:
    deb = next(place.glob("debian/pool/**/two_*.deb"))
    deb.write_bytes(deb.read_bytes()[:-1] + b"!")
    with pytest.raises(ApplianceError, match=r"the mirror's file differs from the lock: two 1:2\.0\+b1") as caught:
        fetch(packages(lock), publish(place), tmp_path / "cache")
    assert not isinstance(caught.value, VanishedError)
    two = next(package for package in packages(lock) if package.name == "two")
    assert not list((tmp_path / "cache").rglob(f"{two.sha256}*"))


def test_a_truncated_file_is_refused(lock: Lock, place: Path, tmp_path: Path) -> None:
    deb = next(place.glob("debian/pool/**/two_*.deb"))
    deb.write_bytes(deb.read_bytes()[:-10])
    with pytest.raises(ApplianceError, match="differs from the lock: two"):
        fetch(packages(lock), publish(place), tmp_path / "cache")


def test_a_damaged_cache_is_mended(lock: Lock, place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = next(iter(fetch(packages(lock), publish(place), cache).values()))
    good = file.read_bytes()
    file.write_bytes(b"torn")
    assert fetch(packages(lock), publish(place), cache)[file.stem].read_bytes() == good


def test_a_vanished_version_is_named(lock: Lock, place: Path, tmp_path: Path) -> None:
    next(place.glob("debian/pool/**/two_*.deb")).unlink()
    with pytest.raises(VanishedError) as caught:
        fetch(packages(lock), publish(place), tmp_path / "cache")
    assert [package.name for package in caught.value.packages] == ["two"]
    assert "two 1:2.0+b1" in caught.value.message
    assert "SAMEPAGE_SNAPSHOT" in caught.value.hint
    assert caught.value.status == 2
    one = next(package for package in packages(lock) if package.name == "one")
    assert to_fetch([one], tmp_path / "cache") == 0  # what was there is kept for the next try


def test_a_vanished_version_comes_from_the_snapshot_service(lock: Lock, place: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "snapshots/debian/20260131T120000Z"
    gone = next(place.glob("debian/pool/**/two_*.deb"))
    kept = snapshots / gone.relative_to(place / "debian")
    kept.parent.mkdir(parents=True)
    gone.rename(kept)
    environ = {"SAMEPAGE_SNAPSHOT": f"file:{tmp_path}/snapshots/{{archive}}/{{timestamp}}/"}
    found = fetch(packages(lock), publish(place), tmp_path / "cache", snapshot=snapshot_mirrors(lock, environ))
    assert len(found) == 2


def test_relocking_takes_the_new_version_and_says_what_moved(lock: Lock, place: Path, tmp_path: Path) -> None:
    next(place.glob("debian/pool/**/two_*.deb")).unlink()
    make_deb(place, "two", "1:2.1")
    mirrors = publish(place)
    with pytest.raises(VanishedError):
        fetch(packages(lock), mirrors, tmp_path / "cache")
    new = locking.resolve(lock.wanted, mirrors, keyring=None)
    assert [str(move) for move in locking.moves(lock, new)] == ["two 1:2.0+b1 -> 1:2.1"]
    assert len(fetch(packages(new), mirrors, tmp_path / "cache")) == 2


def test_a_mirror_out_of_reach_is_not_taken_for_a_vanished_version(
    lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "RETRIES", 0)
    mirrors = {"debian": "http://127.0.0.1:9/debian", "debian-security": "http://127.0.0.1:9/security"}
    with pytest.raises(CommandError, match=r"cannot fetch 2 of 2 packages:\n.*Could not connect") as caught:
        fetch(packages(lock), mirrors, tmp_path / "cache")
    assert "--mirror" in caught.value.hint


def test_the_snapshot_pattern(lock: Lock) -> None:
    assert snapshot_mirrors(lock, {}) is None
    assert lock.epoch == EPOCH
    pattern = {"SAMEPAGE_SNAPSHOT": "https://h.invalid/archive/{archive}/{timestamp}"}
    assert snapshot_mirrors(lock, pattern) == {"debian": "https://h.invalid/archive/debian/20260131T120000Z"}
    with pytest.raises(ApplianceError, match="not a usable pattern"):
        snapshot_mirrors(lock, {"SAMEPAGE_SNAPSHOT": "https://h.invalid/{archiv}"})


def test_paths_are_quoted_for_the_mirror() -> None:
    package = Package("a", "1:2", "all", "debian", "pool/a b/a_1%3a2~x+y.deb", 1, "0" * 64)
    assert archive._uri(package, {"debian": "http://h.invalid/d"}) == "http://h.invalid/d/pool/a%20b/a_1%253a2~x+y.deb"
    assert archive._uri(replace(package, path="pool/a.deb"), {"debian": "file:/m"}) == "copy:/m/pool/a.deb"
