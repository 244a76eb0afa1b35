"""The stages run in order, each once; what was built stays; --explain names what changed; the lock is settled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance import bootloader, dist, iso, layers, pipeline, rootfs, tools
from appliance import lock as locking
from appliance.archive import VanishedError
from appliance.console import Console
from appliance.errors import HostError, LockError
from appliance.model import Artifact, Kernel, Layer, LayerKind, Lock, Package, frozen_map
from appliance.pipeline import Options, ReportingStore

DIGEST = "ab" * 32
PACKAGE = Package("systemd", "257", "amd64", "debian", "pool/s/systemd.deb", 1000, DIGEST)


@pytest.fixture
def stages(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Options, list[str]]:
    """A project whose costly stages write small files, and the list of the stages that ran."""
    ran: list[str] = []
    options = Options(project=project, layout="one", cache=tmp_path / "cache")
    model, _ = pipeline.check_project(project, "one", options.version)
    lock = Lock(
        "trixie", 1_700_000_000, locking.wanted(model), frozen_map(dict.fromkeys(("core", "full", "tools"), (PACKAGE,)))
    )
    locking.write_lock(lock, options.lock_file)

    def noted(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def stage(*arguments: Any, **settings: Any) -> Any:
            ran.append(name)
            return result(*arguments, **settings)

        return stage

    def layer(kind: LayerKind, node: str = "", salt: str = "") -> Layer:
        image = tmp_path / f"{kind}{node}"
        image.write_text(kind)
        digest = hashlib.sha256(f"{kind}{node}{salt}".encode()).hexdigest()
        return Layer(kind, node, digest, 4, image, image, digest)

    def kernel(*_: object) -> Kernel:
        for name in ("vmlinuz", "initrd"):
            (tmp_path / name).write_text(name)
        return Kernel("6.12", tmp_path / "vmlinuz", tmp_path / "initrd", DIGEST, DIGEST, "quiet")

    def write(_release: object, _boot: Path, out: Path, **_settings: object) -> Artifact:
        out.parent.mkdir(exist_ok=True)
        out.write_bytes(b"image")
        return Artifact(out, hashlib.sha256(b"image").hexdigest(), 5)

    check = pipeline.check_project
    monkeypatch.setattr(pipeline, "check_project", noted("recipes layout render", check))
    monkeypatch.setattr(tools, "prepare", noted("packages", lambda *_: tools.Tools(tmp_path, "v")))
    monkeypatch.setattr(
        rootfs, "build", noted("packages", lambda *_: rootfs.Rootfs(tmp_path / "t", tmp_path / "boot", "k"))
    )
    monkeypatch.setattr(layers, "build_base", noted("layers", lambda *_, **__: layer("base")))
    monkeypatch.setattr(layers, "build_app", noted("layers", lambda *_, **__: layer("app")))
    config = noted("layers", lambda _lock, tree, *_, **__: layer("config", tree.node, repr(tree.config)))
    monkeypatch.setattr(layers, "build_config", config)
    monkeypatch.setattr("appliance.boot_files.make_kernel", noted("release", kernel))
    monkeypatch.setattr(bootloader, "build", lambda _tools, folder, *_: (folder / "boot.img").write_bytes(b"x"))
    monkeypatch.setattr(iso, "write", noted("iso", write))
    return options, ran


def test_the_stages_run_in_order(stages: tuple[Options, list[str]]) -> None:
    options, ran = stages
    output = pipeline.build_iso(options, Console(style="none"))
    order = [word for stage in ran for word in stage.split()]
    assert list(dict.fromkeys(order)) == list(pipeline.STAGES)
    assert order == sorted(order, key=pipeline.STAGES.index)
    assert output.rewritten


def test_the_image_has_its_companions(stages: tuple[Options, list[str]]) -> None:
    options, _ = stages
    target = pipeline.build_iso(options, Console(style="none")).artifact.path
    assert target.name == f"samepage-appliance-{options.version}-amd64.iso"
    names = {file.name.removeprefix(target.stem) for file in target.parent.iterdir() if not file.name.startswith(".")}
    assert names == {".iso", ".iso.sha256", ".manifest.json", ".packages.txt", ".sbom.json"}
    assert (
        target.with_name(target.name + ".sha256").read_text()
        == f"{hashlib.sha256(b'image').hexdigest()}  {target.name}\n"
    )
    assert target.with_suffix(".packages.txt").read_text() == "systemd\t257\tamd64\n"
    assert json.loads(target.with_suffix(".manifest.json").read_text())["version"] == options.version


def test_nothing_changed_writes_nothing(stages: tuple[Options, list[str]]) -> None:
    options, ran = stages
    target = pipeline.build_iso(options, Console(style="none")).artifact.path
    before = {file: file.stat().st_mtime_ns for file in target.parent.iterdir()}
    ran.clear()
    assert not pipeline.build_iso(options, Console(style="none")).rewritten
    assert "iso" not in ran
    assert {file: file.stat().st_mtime_ns for file in target.parent.iterdir()} == before


def test_a_changed_template_writes_the_image_anew(
    stages: tuple[Options, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options, _ = stages
    pipeline.build_iso(options, Console(style="none"))
    template = options.project / "recipes/base/templates/etc/hostname.j2"
    template.write_text(template.read_text() + "more\n")
    assert pipeline.build_iso(options, Console(style="plain", explain=True)).rewritten
    assert "iso ...  (its content changed)" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["touched", "cut", "gone", "no record"])
def test_an_image_that_was_touched_is_written_anew(harm: str, stages: tuple[Options, list[str]]) -> None:
    options, _ = stages
    target = pipeline.build_iso(options, Console(style="none")).artifact.path
    match harm:
        case "touched":
            target.write_bytes(b"imagE")
        case "cut":
            target.write_bytes(b"im")
        case "gone":
            target.unlink()
        case _:
            dist.record_file(target).unlink()
    assert pipeline.build_iso(options, Console(style="none")).rewritten
    assert target.read_bytes() == b"image"


def test_a_failed_image_leaves_no_old_one_under_the_new_names(
    stages: tuple[Options, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, _ = stages
    target = pipeline.build_iso(options, Console(style="none")).artifact.path
    target.write_bytes(b"imagE")

    def fail(*_: object, **__: object) -> Artifact:
        raise KeyboardInterrupt

    monkeypatch.setattr(iso, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.build_iso(options, Console(style="none"))
    assert not target.exists()


def test_what_was_rendered_is_kept_for_comparing(
    stages: tuple[Options, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    from appliance import cli

    options, _ = stages
    pipeline.build_iso(options, Console(style="none"))
    start = ["-C", str(options.project), "--layout", "one", "render", "--diff"]
    assert cli.main(start) == 0
    assert "nothing changed" in capsys.readouterr().out
    template = options.project / "recipes/base/templates/etc/hostname.j2"
    template.write_text(template.read_text() + "more\n")
    assert cli.main(start) == 0
    assert "+more" in capsys.readouterr().out


# --- the lock --------------------------------------------------------------------------------------------------------


def test_a_lock_that_fits_is_taken(stages: tuple[Options, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = stages
    monkeypatch.setattr(pipeline, "relock", lambda *_: pytest.fail("resolved"))
    model, _ = pipeline.check_project(options.project, "one", options.version)
    assert pipeline.settle_lock(options, model, Console()).epoch == 1_700_000_000


def test_a_lock_that_does_not_fit_is_resolved_with_a_warning(
    stages: tuple[Options, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, _ = stages
    recipe = options.project / "recipes/base/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("[systemd,", "[systemd, added,"))
    model, _ = pipeline.check_project(options.project, "one", options.version)
    new = Lock(
        "trixie", 1_800_000_000, locking.wanted(model), frozen_map(dict.fromkeys(("core", "full", "tools"), (PACKAGE,)))
    )
    monkeypatch.setattr(locking, "resolve", lambda *_, **__: new)
    monkeypatch.setattr("appliance.apt.find_mirrors", lambda *_, **__: {})
    assert pipeline.settle_lock(options, model, Console()).epoch == 1_800_000_000
    assert "added is not in the lock's set core" in capsys.readouterr().err
    assert locking.read_lock(options.lock_file).epoch == 1_800_000_000


def test_locked_stops_instead(stages: tuple[Options, list[str]]) -> None:
    options, _ = stages
    recipe = options.project / "recipes/base/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("[systemd,", "[systemd, added,"))
    model, _ = pipeline.check_project(options.project, "one", options.version)
    locked = Options(project=options.project, layout="one", locked=True)
    with pytest.raises(LockError, match="added is not in the lock"):
        pipeline.settle_lock(locked, model, Console())


def test_vanished_versions_are_resolved_anew_once(
    stages: tuple[Options, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, _ = stages
    old = tools.prepare
    failed: list[int] = []

    def vanish_once(*arguments: Any) -> Any:
        if not failed:
            failed.append(1)
            raise VanishedError([PACKAGE])
        return old(*arguments)

    monkeypatch.setattr(tools, "prepare", vanish_once)
    resolved: list[int] = []
    monkeypatch.setattr(pipeline, "relock", lambda *_: resolved.append(1) or locking.read_lock(options.lock_file))
    pipeline.build_release(options, Console(style="none"))
    assert resolved == [1]
    failed.clear()
    with pytest.raises(VanishedError):
        pipeline.build_release(
            Options(project=options.project, layout="one", cache=options.cache, locked=True), Console(style="none")
        )


# --- room and reasons ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_foreseen_with_figures(
    stages: tuple[Options, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, ran = stages
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(HostError, match="MB") as caught:
        pipeline.build_iso(options, Console(style="none"))
    assert caught.value.status == 3
    assert "iso" not in ran
    assert "packages" not in ran


def test_explain_names_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ReportingStore(tmp_path, tmp_path, console=Console(style="plain", explain=True))
    store.step("core", {"clock": "1", "package a": "1"}, lambda _: None)
    store.step("core", {"clock": "1", "package a": "1"}, lambda _: None)
    store.step("core", {"clock": "1", "package a": "2"}, lambda _: store.report(3, 4, "packages"))
    err = capsys.readouterr().err
    assert "core ...  (never built in this checkout)" in err
    assert "core: unchanged, reused" in err
    assert "core ...  (changed: package a)" in err


def test_a_step_s_progress_reaches_its_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ReportingStore(tmp_path, tmp_path, console=Console(style="rich"))
    store.report(1, 2, "packages")  # outside of a step: nobody to tell
    store.step("core", {}, lambda _: store.report(3, 4, "packages"))
    assert "core: 3 of 4 packages, 0 s" in capsys.readouterr().err
