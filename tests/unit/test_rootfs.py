"""What surrounds mmdebstrap; trees that it built: tests/artifact."""

from __future__ import annotations

import fcntl
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from appliance import apt, rootfs, workfolder
from appliance.errors import ApplianceError, CommandError, HostError
from appliance.lock import omitted_stanza
from appliance.model import Lock, Model, Package
from appliance.tools import Tools
from appliance.workfolder import work_folder


def package(name: str, version: str = "1") -> Package:
    return Package(name, version, "all", "debian", f"pool/{name}_{version}_all.deb", 1, "0" * 64)


def locked(*, core: tuple[str, ...] = ("kernel",), more: tuple[str, ...] = ("app",), epoch: int = 1) -> Lock:
    sets = {"core": tuple(map(package, core)), "full": tuple(map(package, (*core, *more))), "tools": ()}
    return Lock("trixie", epoch, {}, sets)


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_a_package_of_another_recipe_leaves_the_core_alone(model: Model) -> None:
    one, other = locked(), locked(more=("app", "added"))
    assert rootfs.inputs_of(one, model).core == rootfs.inputs_of(other, model).core
    assert rootfs.inputs_of(one, model).tree != rootfs.inputs_of(other, model).tree
    assert "package added" in rootfs.inputs_of(other, model).tree


def test_what_decides_the_core_decides_the_tree(model: Model) -> None:
    for change in (locked(core=("kernel", "shell")), locked(epoch=2)):
        assert rootfs.inputs_of(change, model).core != rootfs.inputs_of(locked(), model).core
        assert rootfs.inputs_of(change, model).tree != rootfs.inputs_of(locked(), model).tree


@pytest.mark.parametrize(
    "change", [{"modules": ("kernel/drivers/net/can",)}, {"exclude": ("/usr/share/x",)}, {"users": ()}]
)
def test_what_a_recipe_says_of_packages_is_an_input(model: Model, change: dict[str, tuple[str, ...]]) -> None:
    with_users = next(recipe for recipe in model.recipes if recipe.users)
    recipes = tuple(replace(recipe, **change) if recipe is with_users else recipe for recipe in model.recipes)  # type: ignore[arg-type]
    changed = replace(model, recipes=recipes)
    assert rootfs.inputs_of(locked(), changed).tree != rootfs.inputs_of(locked(), model).tree


def test_a_build_step_and_what_lies_beside_it_are_inputs(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    folder.mkdir()
    (folder / "make").write_text("#!/bin/sh\n")
    recipe = replace(model.recipes[0], folder=tmp_path, build="steps/make")
    with_step = replace(model, recipes=(recipe, *model.recipes[1:]))
    before = rootfs.inputs_of(locked(), with_step).tree
    (folder / "helper").write_text("x")
    assert rootfs.inputs_of(locked(), with_step).tree != before


# --- what goes into the namespace ------------------------------------------------------------------------------------


def test_the_repository_can_be_read_by_whoever_is_root_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = set()

    def control(argv: list[Path], *, env: dict[str, str]) -> CompletedProcess[bytes]:
        scratch.add(env["TMPDIR"])
        return CompletedProcess([], 0, f"Package: {argv[2].name}\n".encode())

    monkeypatch.setattr(apt, "run", control)
    deb, script = tmp_path / "deb", tmp_path / "script"
    deb.write_bytes(b"deb")
    deb.chmod(0o600)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    out = tmp_path / "packages.tar"
    one = package("one")
    rootfs._pack_repository([one], {one.sha256: deb}, {"users": []}, locked(), out, {"recipes/r/make": script})
    with tarfile.open(out) as tar:
        modes = {member.name: member.mode for member in tar}
        index = tar.extractfile("Packages")
        assert index is not None
        assert "Filename: ./one_1_all.deb\n" in index.read().decode()
    assert scratch == {str(tmp_path)}  # beside the tar, where a killed dpkg-deb's folder goes with the build's own
    assert modes["one_1_all.deb"] == 0o644
    assert modes["recipes/r/make"] == 0o755
    assert {"stage.py", "dpkg.cfg", "config.json", "Packages", "Release"} <= set(modes)


def test_an_omitted_package_is_newer_than_any_dependency_asks() -> None:
    import subprocess

    version = next(line for line in omitted_stanza("x").splitlines() if line.startswith("Version: ")).split()[1]
    assert subprocess.run(["dpkg", "--compare-versions", version, "gt", "9:20260101"], check=False).returncode == 0


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ("fault: no recipe declares the user x\nfault: second\n", ApplianceError, "declares the user x\n  second"),
        ("E: newuidmap 12 failed\n", HostError, "no user namespace"),
        ("I: installing essential packages...\ntar: No space left on device\n", HostError, "the disk is full"),
        ("I: installing essential packages...\ndpkg: error processing package x\n", CommandError, "ended with status"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(output: str, kind: type[ApplianceError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        rootfs._explain(output, 25, "trixie")
    assert type(caught.value) is kind
    assert caught.value.hint


# --- where the tree stands -------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_the_work_folder_is_gone_at_the_end_whatever_happens(base: Path) -> None:
    def fail() -> None:
        with work_folder() as folder:
            (folder / "half").touch()
            assert folder.parent == base
            assert folder.stat().st_mode & 0o777 == 0o755
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(base.iterdir()) == []


def test_what_killed_builds_left_goes_and_what_runs_stays(base: Path) -> None:
    left, running = (base / f"samepage-build-{os.geteuid()}-{name}" for name in ("left", "running"))
    for folder in (left, running):
        (folder / "tree").mkdir(parents=True)
    descriptor = os.open(running, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with work_folder():
            pass
    finally:
        os.close(descriptor)
    assert [path.name for path in base.iterdir()] == [running.name]


def test_memory_is_used_only_where_it_is_plentiful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(workfolder, "RAM", tmp_path)
    monkeypatch.setattr(workfolder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**12})())
    monkeypatch.setattr(workfolder, "_available_memory", lambda: 10**12)
    assert workfolder._work_base() == tmp_path
    monkeypatch.setattr(workfolder, "_available_memory", lambda: 10**9)
    assert workfolder._work_base() == Path("/tmp")


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tools_run_through_their_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "usr/sbin/mkfs.thing").touch()
    monkeypatch.setenv("PYTHONPATH", "/host")
    monkeypatch.setenv("LD_PRELOAD", "/host.so")
    tools = Tools(tmp_path, "1")
    words = tools.command("mkfs.thing", "-x", tmp_path)
    assert words[0] == f"{tmp_path}/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    assert words[-3:] == [f"{tmp_path}/usr/sbin/mkfs.thing", "-x", str(tmp_path)]
    assert "PYTHONPATH" not in tools.environment
    assert "LD_PRELOAD" not in tools.environment
    with pytest.raises(HostError, match="no program 'other'"):
        tools.command("other")
