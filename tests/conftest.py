"""What the tests of every folder share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

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


# Folders whose tests share machines, or one build, and so run in one process, with the guess of their share of the work
# that puts the longest first. All other tests run file by file, as a process comes free.
TOGETHER = {"upgrade": 5, "boot": 4, "faults/power": 3, "artifact": 2, "faults": 1}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs side by side where `-n` says so: see the marker xdist_group. The order is the same with one process."""
    tests = Path(__file__).parent
    shares: dict[str, int] = {}
    for item in items:
        file = item.path.relative_to(tests)
        group = next((folder for folder in TOGETHER if file.is_relative_to(folder)), str(file))
        shares[item.nodeid] = TOGETHER.get(group, 0)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: -shares[item.nodeid])


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
