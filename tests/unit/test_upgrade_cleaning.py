"""Cleanup on a state partition: what goes, what stays whatever is broken, and what a power cut in it leaves."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from appliance.node import refusals
from appliance.node.release import boot_record
from appliance.node.upgrade import cleaning, journal, records, staging
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.node import Node, Settings
from appliance.node.upgrade.services import ServiceError
from tests.unit.releases import Maker

MB = 1_000_000
BEGUN = Journal(
    state="health", action="upgrade", depth="live", old="1.3", new="1.4", running_data=1, old_data=9, new_data=1,
    started=1,
)  # fmt: skip


class State:
    """A state partition in a folder, with releases that differ in all but their base layer."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "state"
        (folder / "files").mkdir()
        self.maker = Maker(folder / "files")
        self.snapshots: dict[int, int] = {}  # bytes that only this one has
        self.free = 1000 * MB
        for name in (records.LAYERS, records.KERNELS, records.RELEASES, "boot", "data/1", journal.FOLDER):
            (self.root / name).mkdir(parents=True)

    def add(self, version: str, at: int, data: int | None = None) -> None:
        made = self.maker.release(version, nginx=version.encode(), app=version.encode(), kernel=version.encode())
        for digest, file in staging.wanted_files(str(self.root), made.manifest, "one").items():
            Path(file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made.files[digest], file.path)
        records.record_release(str(self.root), version, made.content, "one")
        folder = self.root / records.RELEASES / version
        if data is not None:
            (folder / "data").write_text(f"{data}\n")
            (self.root / "data" / str(data)).mkdir()
            self.snapshots[data] = 10 * MB
        os.utime(folder / "release.json", (at, at))

    def select(self, name: str, version: str, data: int) -> None:
        held = records.held_releases(str(self.root))[version]
        (self.root / name).write_bytes(boot_record(held.manifest, data, held.id))

    def node(self, running: str, **settings: Any) -> Node:
        held = records.held_releases(str(self.root))
        return Node(
            "one", "/dev/vda3", held[running], 1, held, Settings()._replace(**settings), {}, root=str(self.root)
        )  # fmt: skip

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}

    def releases(self) -> set[str]:
        return {path.name for path in (self.root / records.RELEASES).iterdir()}

    def data(self) -> list[int]:
        return records.data_numbers(str(self.root))

    def whole(self, *versions: str) -> None:
        """All files of these releases are there."""
        held = records.held_releases(str(self.root))
        for version in versions:
            for file in staging.wanted_files(str(self.root), held[version].manifest, "one").values():
                assert Path(file.path).stat().st_size == file.size


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """1.3 runs, 1.2 was before it; 1.0 and 1.1 are older."""
    made = State(tmp_path)
    for index in range(4):
        made.add(f"1.{index}", 100 * (index + 1), index + 4 if index < 3 else None)
    made.select(records.SELECTED, "1.3", 1)
    made.select(records.PREVIOUS, "1.2", 6)

    def run(*words: str) -> str:
        if words[:3] == ("btrfs", "filesystem", "du"):
            exclusive = made.snapshots[int(Path(words[-1]).name)]
            return f"     Total   Exclusive  Set shared  Filename\n{exclusive + 7} {exclusive} 0 {words[-1]}\n"
        assert words[:3] == ("btrfs", "subvolume", "delete")
        shutil.rmtree(words[-1])
        return ""

    monkeypatch.setattr(cleaning, "run", run)
    monkeypatch.setattr(staging, "free", lambda _root: made.free)
    return made


def clean(state: State, running: str = "1.3", **settings: Any) -> list[str]:
    said: list[tuple[str, int, int]] = []
    found = cleaning.clean(state.node(running, **settings), lambda *event: said.append(event))
    if not found.empty:
        assert said[-1][1] == said[-1][2]
    return [name for name, _ in found.remove]


def test_the_oldest_go_with_their_files_and_their_data(state: State) -> None:
    before = state.files()
    assert clean(state) == ["1.0"]
    assert state.releases() == {"1.1", "1.2", "1.3"}
    assert state.data() == [1, 5, 6]
    state.whole("1.1", "1.2", "1.3")
    gone = before - state.files()
    kinds = sorted(name.split("/")[0] + "/" + name.split("/")[-1].split("-")[0] for name in gone)
    assert kinds == [
        "kernels/initrd", "kernels/vmlinuz", "layers/app", "layers/base", "layers/config", "releases/data",
        "releases/layers", "releases/release.json",
    ]  # fmt: skip
    assert len(list((state.root / records.KERNELS).iterdir())) == 3
    assert clean(state) == []
    assert clean(state, keep=1) == ["1.1"]
    state.whole("1.2", "1.3")


def test_a_record_before_its_files(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut finds at any time: no release without its files."""

    commits: list[str] = []

    def look(root: str) -> None:
        commits.append(root)
        held = records.held_releases(root)
        assert not held.keys() & {"1.0"}
        for one in held.values():
            files = staging.wanted_files(root, one.manifest, "one")
            assert all(Path(file.path).exists() for file in files.values())

    monkeypatch.setattr(records, "commit", look)
    clean(state)
    assert commits == [str(state.root)] * 2


@pytest.mark.parametrize("step", range(1, 14))
def test_a_cleanup_that_was_broken_off_is_finished_by_the_next(
    state: State, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    class Cut(Exception):
        pass

    left = [step]

    def counted(work: object) -> object:
        def call(*words: object, **options: object) -> object:
            left[0] -= 1
            if not left[0]:
                raise Cut
            return work(*words, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (cleaning, "run")):
            patch.setattr(module, name, counted(getattr(module, name)))
        with suppress(Cut):
            clean(state, keep=2)
    state.whole("1.2", "1.3")
    clean(state, keep=2)
    assert state.releases() == {"1.2", "1.3"}
    assert state.data() == [1, 6]
    state.whole("1.2", "1.3")
    assert not any(records.PARTIAL in name for name in state.files())
    assert cleaning.decide(state.node("1.3", keep=2)).empty


def test_a_folder_left_by_a_broken_off_cleanup_is_no_obstacle(state: State) -> None:
    """The release was staged again since."""
    left = state.root / records.RELEASES / ("1.0" + records.PARTIAL)
    left.mkdir()
    (left / "release.json").write_text("{}")
    (left / "data").write_text("4")
    assert clean(state) == ["1.0"]
    assert state.releases() == {"1.1", "1.2", "1.3"}


def test_leftovers_of_downloads_and_upgrades_go(state: State) -> None:
    for name in (
        "layers/app-0000.erofs.partial", "layers/app-0000.erofs", "upgrade/incoming/x.bundle",
        "upgrade/incoming/y.bundle.partial", "boot/try.cfg.partial", "kernels/old/vmlinuz", "releases/9.partial/layers",
    ):  # fmt: skip
        (state.root / name).parent.mkdir(parents=True, exist_ok=True)
        (state.root / name).write_text("left")
    kept = {"upgrade/counter", "upgrade/history.jsonl", "upgrade/keys/site.pub", "boot/try.cfg"}
    for name in kept:
        (state.root / name).parent.mkdir(parents=True, exist_ok=True)
        (state.root / name).write_text("kept")
    before = state.files()
    clean(state, keep=4)
    assert {name for name in before - state.files() if "left" not in name} == {
        "layers/app-0000.erofs.partial", "layers/app-0000.erofs", "upgrade/incoming/x.bundle",
        "upgrade/incoming/y.bundle.partial", "boot/try.cfg.partial", "kernels/old/vmlinuz", "releases/9.partial/layers",
    }  # fmt: skip
    assert kept <= state.files()
    assert not (state.root / "kernels/old").exists()
    assert not (state.root / "releases/9.partial").exists()
    assert state.data() == [1, 4, 5, 6]


# --- what stays ------------------------------------------------------------------------------------------------------


def test_what_an_unfinished_upgrade_needs_stays(state: State) -> None:
    state.add("1.4", 50)
    (state.root / "data/9").mkdir()
    state.snapshots[9] = 0
    journal.write(str(state.root), BEGUN)
    assert clean(state, keep=1) == ["1.0", "1.1"]
    state.whole("1.2", "1.3", "1.4")
    assert state.data() == [1, 6, 9]
    journal.remove(str(state.root))
    assert clean(state, keep=2) == ["1.4"]
    assert state.data() == [1, 6]


@pytest.mark.parametrize("broken", ["", "{", "[]"])
def test_the_release_before_keeps_its_files_when_its_record_is_broken(state: State, broken: str) -> None:
    """GRUB and the initramfs need only its `layers`, so it still starts."""
    held = records.held_releases(str(state.root))["1.2"]
    (state.root / "releases/1.2/release.json").write_text(broken)
    clean(state, keep=1)
    assert state.releases() == {"1.2", "1.3"}
    assert state.data() == [1, 6]
    for file in staging.wanted_files(str(state.root), held.manifest, "one").values():
        assert Path(file.path).stat().st_size == file.size
    choice = records.choose(str(state.root))
    assert choice is not None
    (state.root / "boot/selected.cfg").unlink()
    assert records.choose(str(state.root)) == records.Choice("previous", "1.2", held.manifest.kernel.id, 6)


def test_without_the_record_of_what_runs_nothing_is_removed(state: State) -> None:
    node = state.node("1.3")
    poorer = {name: one for name, one in node.held.items() if name != "1.3"}
    before = state.files()
    with pytest.raises(refusals.Damaged, match=r"1\.3"):
        cleaning.clean(node._replace(held=poorer), lambda *_: None)
    assert state.files() == before


def test_a_journal_that_cannot_be_read_stops_it(state: State) -> None:
    (state.root / journal.JOURNAL).write_text("{")
    before = state.files()
    with pytest.raises(journal.JournalError):
        clean(state, keep=1)
    assert state.files() == before


# --- the budget ------------------------------------------------------------------------------------------------------


def test_the_running_data_is_not_held_against_releases(state: State) -> None:
    """However large the database is: what counts is the room beside it."""
    assert clean(state, keep=4, budget=80) == []
    used = sum((state.root / name).stat().st_size for name in state.files() if name.startswith(("layers", "kernels")))
    used += 30 * MB
    state.free = used // 4 + 1000  # releases use just less than 80 % of what is free and theirs
    assert clean(state, keep=4, budget=80) == []


def test_where_room_is_scarce_the_oldest_snapshots_go(state: State) -> None:
    state.free = 3 * MB
    found = cleaning.decide(state.node("1.3", keep=4, budget=80))
    assert [name for name, _ in found.remove] == ["1.0"]
    assert "over the space budget" in found.remove[0][1]
    state.free = 0
    assert clean(state, keep=4, budget=50) == ["1.0", "1.1"]
    state.whole("1.2", "1.3")


def test_data_whose_size_is_not_told_counts_nothing(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*words: str) -> str:
        raise ServiceError(f"{words[0]}: no")

    monkeypatch.setattr(cleaning, "run", fails)
    found = cleaning.decide(state.node("1.3"))
    assert [number for number, _ in found.data] == [4]
