"""What the tests of every folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests.trees import VALID, write_tree

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str, str], None]

hypothesis.settings.register_profile("slow-machines", deadline=None)
hypothesis.settings.load_profile("slow-machines")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, without comparing")


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
