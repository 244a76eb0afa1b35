"""One build for all tests that reopen what was written; it comes from the usual cache where that has it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.console import Console
from appliance.pipeline import Built, Options, Output, build_iso

PROJECT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.artifact)


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """The ISO of this checkout, in a folder of its own."""
    return build_iso(Options(PROJECT, output=tmp_path_factory.mktemp("dist")), Console("none"))


@pytest.fixture(scope="session")
def built(output: Output) -> Built:
    return output.built


@pytest.fixture(scope="session")
def tree(built: Built) -> Iterator[tarfile.TarFile]:
    """The base layer's content."""
    with tarfile.open(built.tree.tar) as tar:
        yield tar
