"""build.py before anything is installed: what it decides, and that it costs nothing when all is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import build
from appliance import cli, hostsetup

ROOT = Path(build.ROOT)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "python"),
        (["check"], "python"),
        (["iso"], "build"),
        (["-C", "up", "iso"], "build"),
        (["--layout", "test", "--debug", "up"], "boot"),
        (["iso", "--help"], "python"),
        (["test"], "test"),
        (["nonsense"], "python"),
    ],
)
def test_each_verb_needs_its_set(arguments: list[str], wanted: str) -> None:
    assert build.wanted_set(arguments) == wanted


def test_completion_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.COMPLETION_VARIABLE, "bash_complete")
    assert build.wanted_set(["iso"]) == "python"


def test_the_sets_and_verbs_exist() -> None:
    assert set(build.SET_OF_VERB) <= set(cli.Verbs.home)
    assert set(build.SET_OF_VERB.values()) <= set(hostsetup.SETS)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that build.py takes for its checkout, with everything but a virtual environment."""
    for name in build.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(build, "ROOT", str(tmp_path))
    monkeypatch.setattr(build, "VENV", str(tmp_path / ".venv"))
    monkeypatch.setattr(build, "PYTHON", str(tmp_path / ".venv" / "bin" / "python"))
    return tmp_path


def test_set_up_once_until_something_changes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def prepare(_hostsetup: object, with_dev: bool) -> None:
        made.append(with_dev)
        (checkout / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable) if not made[1:] else None

    monkeypatch.setattr(build, "prepare_venv", prepare)
    monkeypatch.setattr(hostsetup, "missing", lambda _set: [])
    assert not build.ready("build")
    build.set_up("build")
    assert build.ready("build")
    assert not build.ready("test")
    build.set_up("build")
    assert made == [False]
    (checkout / "requirements.txt").write_text("click==9\n")
    assert not build.ready("build")
    build.set_up("test")
    assert made == [False, True]


def test_missing_packages_are_installed_and_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed: list[list[str]] = []
    (checkout / ".venv").mkdir()
    monkeypatch.setattr(build, "prepare_venv", lambda *_, **__: None)
    monkeypatch.setattr(
        hostsetup, "missing", lambda _set: [hostsetup.HostPackage("mmdebstrap", (), "unpacks packages")]
    )
    monkeypatch.setattr(hostsetup, "install", lambda names: installed.append(list(names)) or "")
    build.set_up("build")
    assert installed == [["mmdebstrap"]]
    assert "  mmdebstrap: unpacks packages\n" in capsys.readouterr().err


def test_a_failed_installation_gives_the_command(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / ".venv").mkdir()
    monkeypatch.setattr(
        hostsetup, "missing", lambda _set: [hostsetup.HostPackage("mmdebstrap", (), "unpacks packages")]
    )
    monkeypatch.setattr(hostsetup, "install", lambda _names: "E: no network")
    with pytest.raises(SystemExit) as caught:
        build.set_up("build")
    assert caught.value.code == 3
    err = capsys.readouterr().err
    assert "E: no network" in err
    assert "apt-get install mmdebstrap" in err
    assert not build.ready("build")


def test_what_only_tests_need_may_be_missing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / ".venv").mkdir()
    monkeypatch.setattr(build, "prepare_venv", lambda *_, **__: None)
    monkeypatch.setattr(hostsetup, "missing", lambda _set: [hostsetup.SETS["test"][0]])
    monkeypatch.setattr(hostsetup, "install", lambda _names: "E: no such package")
    build.set_up("test")
    assert "tests that need them will be skipped" in capsys.readouterr().err


def test_installing_without_apt_or_sudo_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert "no apt-get" in hostsetup.install(["x"])
    monkeypatch.setattr("shutil.which", lambda name, **__: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "neither root nor sudo" in hostsetup.install(["x"])


def test_the_requirements_are_exact() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
        assert all(line.count("==") == 1 for line in lines)


def test_the_bootstrap_needs_only_the_standard_library() -> None:
    """Run by an isolated interpreter that has nothing installed."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import build; import appliance.hostsetup; build.state()"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, ROOT], check=True, capture_output=True, timeout=30)


def test_the_fast_path_is_fast(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / "ready-build").write_text(build.state(), encoding="utf-8")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert build.ready("build")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05
