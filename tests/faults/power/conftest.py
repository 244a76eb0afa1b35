"""One node is recorded; every test of this folder replays its log.

With SAMEPAGE_POWER_CUTS=full the node goes through every kind of upgrade; otherwise through the usual ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.power import exported, logwrites, scenario
from tests.faults.power.boots import copy_disk
from tests.faults.power.checks import Look, Viewer
from tests.faults.power.cuts import Cut
from tests.faults.power.logwrites import Entry
from tests.faults.power.made import Releases
from tests.faults.power.recording import Recording, record
from tests.faults.power.replay import Disk
from tests.faults.power.scenario import Step
from tests.faults.power.timeline import Findings, Operation

SEED = int(os.environ.get("SAMEPAGE_POWER_SEED", "20261125"))


@dataclass(frozen=True, slots=True)
class Mode:
    """How much is looked at: other cuts than those after flushes, and boots, of each step.

    `again`: nodes that boot from an early cut are upgraded once more, to the end.
    """

    steps: tuple[Step, ...]
    others: int
    boots: Mapping[str, int]
    again: bool = False


SHORT = Mode(scenario.SHORT, 60, {"live-with-data": 1, "soft-reboot": 1})
FULL = Mode(scenario.FULL, 120, {step.name: 3 for step in scenario.FULL}, again=True)
MODE = FULL if os.environ.get("SAMEPAGE_POWER_CUTS") == "full" else SHORT
SECONDS = 3600  # for one test; the first one records


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fault)
            item.add_marker(pytest.mark.timeout(SECONDS * (4 if MODE is FULL else 1)))


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    if reason := exported.missing():
        pytest.skip(reason)
    return Releases(tmp_path_factory.mktemp("power"))


@dataclass
class Recorded:
    """What was recorded, and what its cuts showed so far."""

    recording: Recording
    entries: list[Entry]
    folder: Path
    seen: dict[str, list[tuple[Cut, Look]]] = field(default_factory=dict)
    findings: dict[str, Findings] = field(default_factory=dict)
    boots: int = 0

    def operation(self, name: str) -> Operation:
        return next(one for one in self.recording.done if one.name == name).operation(self.entries)

    def disk(self, first: Path, name: str) -> Disk:
        return Disk(copy_disk(first, self.folder / name), self.folder / "writes.log")


@pytest.fixture(scope="session")
def recorded(releases: Releases) -> Iterator[Recorded]:
    """The log of a node that went through all steps."""
    folder = Path(tempfile.mkdtemp(prefix="samepage-power-"))
    try:
        with record("power", releases.disk) as recording:
            scenario.play(MODE.steps, releases, recording)
            missing = (
                recording.rows_at(recording.offset(), MODE.steps[-1].name, ended=True) - recording.machine.titles()
            )
            assert not missing, f"without any power cut, rows are gone: {sorted(missing)}"
            log = Path(shutil.move(recording.log, folder / "writes.log"))
        yield Recorded(recording, logwrites.entries(log), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def viewer(recorded: Recorded, releases: Releases) -> Iterator[Viewer]:
    """Looks into a disk that goes through the log once, in the steps' order."""
    with recorded.disk(releases.disk, "looks.raw") as disk, Viewer(disk, releases.files()) as looks:
        yield looks


@pytest.fixture(scope="session")
def second(recorded: Recorded, releases: Releases) -> Iterator[Disk]:
    """One more such disk, to boot copies of."""
    with recorded.disk(releases.disk, "boots.raw") as disk:
        yield disk
