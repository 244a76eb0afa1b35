"""What the tests of every folder share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path, PurePath

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import NodeManager

from appliance.targets.qemu import hardware_acceleration
from tests.trees import VALID, write_tree

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str, str], None]

# No deadline, for slow machines. The same examples in every run, so that a test fails because of a change and not of a
# draw; `--hypothesis-profile=random` looks for others.
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")

# Whoever starts the tests in the background may have Ctrl-C ignored, and every program they start would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, without comparing")


# Folders whose tests share machines, or one build, the longest first. With `-n` each runs in one process; all others
# fill the time, file by file. An emulated machine uses what two cores have, so without hardware virtualisation there is
# only one at a time.
TOGETHER = ("upgrade", "faults/power", "boot", "artifact")
EMULATED = () if hardware_acceleration() else ("upgrade", "faults/power", "boot")
MINUTES = float(os.environ.get("SAMEPAGE_TEST_MINUTES", "inf"))
BEGAN = time.monotonic()


def folder_of(test: str) -> str:
    """The folder of TOGETHER that a test is in, or its file; `test` is relative to the project."""
    path = PurePath(test.partition("::")[0]).relative_to("tests")
    return next((folder for folder in TOGETHER if path.is_relative_to(folder)), str(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [*TOGETHER, folder_of(item.nodeid)].index(folder_of(item.nodeid)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A server that ends what takes too long would say nothing of all that ran."""
    if folder_of(item.nodeid) in EMULATED and time.monotonic() - BEGAN > 60 * MINUTES:
        pytest.skip(f"NOT RUN: this machine is slow, and the {MINUTES:g} minutes of SAMEPAGE_TEST_MINUTES are over")


class Together(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        folder = folder_of(nodeid)
        return "emulated" if folder in EMULATED else folder


NodeManager.EXIT_TIMEOUT = 120  # seconds that the processes of a cancelled run have to end their machines


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    return Together(config, log)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with a file under tests/golden/, or writes that file."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.is_file(), f"no golden file {name}; look at the text and run pytest --update-golden:\n{text}"
        assert text == file.read_text()

    return compare


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small valid project: the recipes base, store and web, on one node and on two."""
    return write_tree(tmp_path / "project", VALID)
