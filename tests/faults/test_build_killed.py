"""Builds that are killed, cancelled, run twice at once or run out of disk: the next one must not notice."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.pipeline import Options
from appliance.workfolder import _work_base as work_base

PROJECT = Path(__file__).parents[2]
# Where to kill, in the order of the work, so that each round goes on from what the killed ones left.
STAGES = ("tools", "core", "tree", "base", "base-packed", "initrd", "iso")

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, which nobody edits while the builds run."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("appliance", "recipes"):
        shutil.copytree(PROJECT / name, place / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return place


@pytest.fixture(scope="module")
def sound(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the ISO that an undisturbed build gives."""
    place = tmp_path_factory.mktemp("sound")
    Build(checkout, Options(PROJECT).cache, place / "dist", place / "log").finish()
    [image] = (place / "dist").glob("*.iso")
    return digest(image)


@pytest.fixture(scope="module")
def cache(sound: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the packages and nothing else. Depends on the sound build, which has fetched them."""
    del sound
    place = tmp_path_factory.mktemp("cache")
    shutil.copytree(Options(PROJECT).cache / "packages", place / "packages", copy_function=link_or_copy)
    return place


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Build:
    """One build as a process of its own, whose stages can be waited for."""

    def __init__(self, checkout: Path, cache: Path, dist: Path, log: Path) -> None:
        self.log = log
        command = [
            sys.executable,
            "-m",
            "appliance",
            "--progress",
            "plain",
            "iso",
            "--explain",
            "--locked",
            "--output-dir",
            dist,
        ]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=checkout, env=os.environ | {"SAMEPAGE_CACHE": str(cache)}, stdout=stream, stderr=stream
            )

    def wait_for(self, stage: str, seconds: float = 300) -> bool:
        """Whether the stage began before the build ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(line.startswith(f"{stage} ...") for line in self.log.read_text().splitlines()):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        raise AssertionError(f"stage {stage} did not begin:\n{self.log.read_text()}")

    def finish(self, status: int = 0) -> str:
        self.process.wait(600)
        text = self.log.read_text()
        assert self.process.returncode == status, text
        assert "Traceback" not in text
        return text


def assert_whole(dist: Path) -> None:
    """Every image in dist is as long and as good as its checksum says; nothing unfinished has a final name."""
    if not dist.exists():
        return
    for image in dist.glob("*.iso"):
        expected = image.with_name(image.name + ".sha256").read_text().split()[0]
        assert digest(image) == expected
    for file in dist.iterdir():
        assert file.stat().st_size > 0 or file.name.startswith("."), file


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def test_killed_at_every_stage(checkout: Path, sound: str, cache: Path, tmp_path: Path) -> None:
    """SIGKILL to the builder alone: its programs go on for a while beside the next build, as they would."""
    dice = random.Random(20261123)
    dist = tmp_path / "dist"
    killed, in_tmp = [], scratch_of_dpkg()
    for stage in STAGES:
        build = Build(checkout, cache, dist, tmp_path / f"{stage}.log")
        if build.wait_for(stage):
            time.sleep(dice.uniform(0, 0.4))
            build.process.kill()
            killed.append(stage)
        build.process.wait(60)
        assert_whole(dist)
    assert len(killed) >= len(STAGES) - 1  # the last stages may be over before the signal arrives
    Build(checkout, cache, dist, tmp_path / "last.log").finish()
    assert_whole(dist)
    [image] = dist.glob("*.iso")
    assert digest(image) == sound
    assert not list((cache / "steps").glob("*/*.partial"))
    assert scratch_of_dpkg() <= in_tmp


def scratch_of_dpkg() -> set[Path]:
    """Folders in which dpkg-deb unpacks; one that is killed leaves its own behind."""
    return set(Path(tempfile.gettempdir()).glob("dpkg-deb.*"))


def test_cancelled_leaves_nothing_behind(checkout: Path, sound: str, cache: Path, tmp_path: Path) -> None:
    del sound
    for name in ("core", "tree"):
        shutil.rmtree(cache / "steps" / name, ignore_errors=True)
    build = Build(checkout, cache, tmp_path / "dist", tmp_path / "log")
    assert build.wait_for("core")
    time.sleep(1)
    build.process.send_signal(signal.SIGINT)
    assert "error: cancelled" in build.finish(130)
    assert children_of(build.process.pid) == []
    assert not list((cache / "steps").glob("*/*.partial"))
    assert not [place for place in work_base().glob("samepage-build-*") if not in_use(place)]


def children_of(pid: int) -> list[str]:
    """Processes that the build started and that live on, by the cache folder on their command line or their parent."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(status.parent.name)
    return found


def in_use(place: Path) -> bool:
    """Whether a build holds the lock of its work folder."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_two_builds_at_once_share_the_work(checkout: Path, sound: str, cache: Path, tmp_path: Path) -> None:
    for name in ("base", "base-packed", "config", "initrd"):
        shutil.rmtree(cache / "steps" / name, ignore_errors=True)
    builds = [Build(checkout, cache, tmp_path / f"dist{number}", tmp_path / f"log{number}") for number in (1, 2)]
    logs = [build.finish() for build in builds]
    for number in (1, 2):
        [image] = (tmp_path / f"dist{number}").glob("*.iso")
        assert digest(image) == sound
    assert any("waiting for it" in log for log in logs)


def test_two_builds_into_one_folder(checkout: Path, sound: str, cache: Path, tmp_path: Path) -> None:
    builds = [Build(checkout, cache, tmp_path / "dist", tmp_path / f"log{number}") for number in (1, 2)]
    for build in builds:
        build.finish()
    assert_whole(tmp_path / "dist")
    [image] = (tmp_path / "dist").glob("*.iso")
    assert digest(image) == sound


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of that size."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_cache_disk_is_foreseen(checkout: Path, sound: str, tmp_path: Path) -> None:
    del sound
    with small_disk(tmp_path / "small", "100m") as disk:
        started = time.monotonic()
        text = Build(checkout, disk / "cache", tmp_path / "dist", tmp_path / "log").finish(3)
        assert time.monotonic() - started < 30
        assert "the build needs about" in text
        assert "MB are free" in text
        assert "SAMEPAGE_CACHE" in text
        assert "core ..." not in text
        assert not list(disk.glob("cache/steps/*"))


def test_a_full_output_disk_is_foreseen(checkout: Path, sound: str, tmp_path: Path) -> None:
    """With everything in the cache, so that only the image is to be written."""
    del sound
    with small_disk(tmp_path / "small", "20m") as disk:
        text = Build(checkout, Options(PROJECT).cache, disk / "dist", tmp_path / "log").finish(3)
        assert "MB are free" in text
        assert "iso ..." not in text
        assert not list(disk.glob("dist/*.iso"))
