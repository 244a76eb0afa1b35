"""The power-cut harness finds what it must find: writers that do it wrong, on a small disk of this host."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.model import ToolBox
from appliance.node import paths
from appliance.node.release import File, boot_record, dump_layers
from appliance.node.upgrade import records
from appliance.pipeline import Options, build_release
from appliance.run import run
from tests.faults.power import cuts, exported, logwrites
from tests.faults.power.checks import Viewer, Violation, files_of
from tests.faults.power.replay import Disk
from tests.faults.power.timeline import LIVE, SNAPSHOT, Findings, Mark, Operation, State, prove
from tests.unit.releases import Maker

PROJECT = Path(__file__).parents[3]
SIZE = 768 << 20  # bytes; the file is sparse
OLD, NEW = State("1.0", LIVE), State("1.1", LIVE)
KEPT = State("1.0", SNAPSHOT)
SEED = 20261125

pytestmark = [pytest.mark.fault, pytest.mark.skipif(bool(exported.missing_export()), reason=exported.missing_export())]


@pytest.fixture(scope="session")
def tools() -> ToolBox:
    return build_release(Options(PROJECT), Console("none")).tools


@dataclass
class Stage:
    """A state partition with release 1.0 and data/1, mounted; 1.1 waits in `files`."""

    root: Path
    log: Path
    old: ReleaseFiles
    new: ReleaseFiles
    tools: ToolBox

    def offset(self) -> int:
        return self.log.stat().st_size

    def put_release(self, release: ReleaseFiles) -> None:
        """Everything but the release's own folder, without any care for what reaches the disk when."""
        for record in release.manifest.layers:
            target = self.root / paths.LAYERS / paths.image_name(record.kind, record.digest)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(release.files[record.digest], target)
        kernel = release.manifest.kernel
        folder = self.root / paths.KERNELS / kernel.id
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(release.files[kernel.vmlinuz.digest], folder / "vmlinuz")
        shutil.copyfile(release.files[kernel.initrd.digest], folder / "initrd")

    def put_record(self, release: ReleaseFiles) -> None:
        folder = self.root / paths.RELEASES / release.manifest.version
        folder.mkdir(parents=True)
        (folder / "release.json").write_bytes(release.content)
        (folder / "layers").write_bytes(dump_layers(release.manifest.layers))

    def snapshot(self, source: int, target: int) -> None:
        words = ("subvolume", "snapshot", self.root / f"data/{source}", self.root / f"data/{target}")
        self.tools.run("btrfs", *words)

    def migrate(self) -> None:
        (self.root / "data/1/rows").write_bytes(b"as the new release wants them" * 5000)

    def select(self, release: ReleaseFiles, data: int) -> None:
        records.put(str(self.root), {records.SELECTED: boot_record(release.manifest, data)})

    def commit(self) -> None:
        records.commit(str(self.root))


@dataclass
class Range:
    """Runs writers on a logged disk and proves them."""

    folder: Path
    tools: ToolBox
    log: Path
    honest: bool = True  # otherwise the disk ignores flushes
    files: Mapping[str, File] = field(default_factory=dict)

    def run(self, writer: Callable[[Stage], list[Mark]], states: tuple[State, ...], count: int = 60) -> Findings:
        releases = Maker(self.folder / "files")
        releases.folder.mkdir()
        old, new = releases.release("1.0"), releases.release("1.1", library=b"a newer library" * 40_000)
        self.files = files_of(old.manifest) | files_of(new.manifest)
        image, first = self._disk(old)
        with exported.logged_device(image, self.log, self.folder) as device:
            root = self.folder / "root"
            root.mkdir()
            run(["mount", "-t", "btrfs", "-o", "noatime,subvolid=5,commit=300", device, root])
            try:
                begin = self.log.stat().st_size
                marks = writer(Stage(root, self.log, old, new, self.tools))
            finally:
                run(["umount", root])
        return self.prove(first, states, begin, marks, count)

    def _disk(self, old: ReleaseFiles) -> tuple[Path, Path]:
        """Twice the same state partition with release 1.0: one to work on, one to replay."""
        image, tree = self.folder / "state", self.folder / "tree"
        for folder in (paths.BOOT, "data/1", paths.RELEASES):
            (tree / folder).mkdir(parents=True)
        stage = Stage(tree, self.log, old, old, self.tools)
        stage.put_release(old)
        stage.put_record(old)
        (tree / "data/1/rows").write_bytes(b"as the old release wants them" * 3000)
        (tree / paths.SELECTED).write_bytes(boot_record(old.manifest, 1))
        with image.open("xb") as file:
            file.truncate(SIZE)
        self.tools.run("mkfs.btrfs", "--quiet", "--rootdir", tree, "--subvol", "rw:data/1", image)
        return image, Path(shutil.copy(image, self.folder / "first"))

    def prove(self, image: Path, states: tuple[State, ...], begin: int, marks: list[Mark], count: int) -> Findings:
        log = logwrites.entries(self.log)
        if not self.honest:
            log = [replace(entry, flags=entry.flags & ~logwrites.FLUSH) for entry in log]
        first = next((entry.index for entry in log if entry.end > begin), len(log))
        operation = Operation("test", first, len(log), states, tuple(marks))
        near = [entry.index for entry in log if entry.flush]
        others = cuts.reordered(log, count, SEED, first=first, near=near)
        with Disk(image, self.log) as disk, Viewer(disk, self.files, 0, SIZE) as viewer:
            return prove(disk, viewer, log, operation, others)


@pytest.fixture
def logged(tmp_path: Path, tools: ToolBox) -> Range:
    return Range(tmp_path, tools, tmp_path / "log")


def stage_well(stage: Stage) -> None:
    stage.put_release(stage.new)
    stage.commit()
    records.record_release(str(stage.root), "1.1", stage.new.content, "")


def snapshot_and_select(stage: Stage) -> None:
    stage.snapshot(1, 2)
    stage.commit()
    stage.select(stage.old, 2)


def test_a_writer_that_does_it_right_passes(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        snapshot_and_select(stage)
        marks = [Mark(stage.offset(), KEPT)]
        stage.migrate()
        stage.select(stage.new, 1)
        return [*marks, Mark(stage.offset(), NEW)]

    found = logged.run(upgrade, (OLD, KEPT, NEW))
    assert [state for _flushed, state in found.changes] == [OLD, KEPT, NEW]
    assert found.flushes >= 10
    assert found.others == 60
    assert found.newer > 0


def wrong(logged: Range, writer: Callable[[Stage], list[Mark]], reason: str, states: tuple[State, ...]) -> None:
    with pytest.raises(Violation, match=reason):
        logged.run(writer, states)


def test_a_record_that_is_written_in_place_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        with (stage.root / paths.SELECTED).open("r+b") as file:
            file.truncate(0)
            stage.snapshot(1, 2)  # commits whatever the tree holds
            file.write(boot_record(stage.new.manifest, 1))
        stage.commit()
        return []

    wrong(logged, upgrade, "there is nothing that GRUB could boot", (OLD, NEW))


def test_a_broken_record_is_caught_where_there_is_a_previous_one(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        records.put(str(stage.root), {records.PREVIOUS: boot_record(stage.old.manifest, 1)})
        (stage.root / paths.SELECTED).write_bytes(b"set rel")
        stage.commit()
        stage.select(stage.new, 1)
        return []

    wrong(logged, upgrade, "the selected record is broken", (OLD, NEW))


def test_a_rename_before_the_data_is_on_the_disk_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage.put_release(stage.new)  # and no commit
        stage.put_record(stage.new)
        temporary = stage.root / "boot/selected.new"
        temporary.write_bytes(boot_record(stage.new.manifest, 1))
        temporary.rename(stage.root / paths.SELECTED)
        stage.snapshot(1, 2)
        stage.commit()
        return []

    wrong(logged, upgrade, "has not the content|nothing that GRUB could boot|broken", (OLD, NEW))


def test_a_name_before_the_content_is_caught(logged: Range) -> None:
    """The next upgrade would take the file for finished."""

    def upgrade(stage: Stage) -> list[Mark]:
        record = stage.new.manifest.layers[0]
        path = stage.root / paths.LAYERS / paths.image_name(record.kind, record.digest)
        with path.open("wb") as file:
            file.truncate(record.size)
            stage.snapshot(1, 2)
            file.write(stage.new.files[record.digest].read_bytes())
        stage.commit()
        return []

    wrong(logged, upgrade, "has its name and its size, but not its content", (OLD,))


def test_a_migration_before_the_snapshot_is_selected_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        stage.snapshot(1, 2)
        marks = [Mark(stage.offset(), KEPT)]  # the moment from which the new release writes to data/1
        stage.migrate()
        stage.commit()
        stage.select(stage.old, 2)
        stage.select(stage.new, 1)
        return marks

    wrong(logged, upgrade, "although it had come to", (OLD, KEPT, NEW))


def test_a_snapshot_that_is_written_to_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        snapshot_and_select(stage)
        (stage.root / "data/2/rows").write_bytes(b"as nobody wants them")
        stage.commit()
        return []

    wrong(logged, upgrade, "the snapshot of the data is not what it was", (OLD, KEPT))


def test_data_that_is_removed_too_early_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        snapshot_and_select(stage)
        stage.tools.run("btrfs", "subvolume", "delete", "--commit-after", stage.root / "data/2")
        return []

    wrong(logged, upgrade, "data/2, which is to be booted, is no subvolume", (OLD, KEPT))


def test_going_back_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        stage.select(stage.new, 1)
        stage.select(stage.old, 1)
        stage.select(stage.new, 1)
        return []

    wrong(logged, upgrade, "boots again", (OLD, NEW))


def test_an_upgrade_that_ends_early_is_caught(logged: Range) -> None:
    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        return []

    wrong(logged, upgrade, "does not boot", (OLD, NEW))


def test_relying_on_order_alone_is_caught(logged: Range) -> None:
    """The writes of the right writer, but none of its flushes: what is found is found by the other cuts."""

    def upgrade(stage: Stage) -> list[Mark]:
        stage_well(stage)
        snapshot_and_select(stage)
        stage.select(stage.new, 1)
        return []

    logged.honest = False
    wrong(logged, upgrade, "(shuffled|torn|one kept|one lost)", (OLD, KEPT, NEW))
