"""One build and a few boots for all tests of running machines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, Machines

from appliance.console import Console
from appliance.pipeline import Options, build_iso

PROJECT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.boot)


@pytest.fixture(scope="session")
def iso() -> Path:
    """The ISO of this checkout, from the usual cache where that has it."""
    return build_iso(Options(PROJECT), Console("none")).artifact.path


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Starts machines; all are gone at the end."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    found = Machines(tmp_path_factory.mktemp("machines"))
    yield found
    found.end()


@pytest.fixture(scope="session")
def node(machines: Machines, iso: Path) -> Machine:
    """A healthy machine, booted live. Shared: a test that breaks something wakes a copy of `frozen` instead."""
    return machines.start(iso, name="node")


@pytest.fixture(scope="session")
def frozen(machines: Machines, iso: Path) -> Path:
    """The saved state of a healthy machine, for `machines.wake`."""
    return machines.freeze(machines.start(iso, name="to-freeze"))
