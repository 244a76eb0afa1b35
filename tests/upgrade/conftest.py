"""One node is installed, booted, signed in to and frozen; every test wakes a copy of it, which takes seconds.

Its release `1.0` is Debian 13 without its security updates, so that the upgrades to today's packages are real ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.pipeline import Options
from tests.upgrade.machines import DEADLINE, Machine, freeze_node, wake_node
from tests.variants import PROJECT, Variants, release_lock, replace, with_lock

Wake = Callable[..., Machine]
SETTINGS = replace("recipes/node-tools/recipe.yaml", 'channel: ""  #', 'channel: "file:///state/channel"  #')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.boot)
            item.add_marker(pytest.mark.timeout(4 * DEADLINE))


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """Builds releases; all of them start from Debian 13 without its updates unless an edit says otherwise."""
    old = release_lock(Options(PROJECT).cache)
    return Variants(tmp_path_factory.mktemp("variants"), (with_lock(old), SETTINGS))


@pytest.fixture(scope="session")
def frozen(variants: Variants) -> Iterator[Path]:
    """The frozen node: see machines.freeze_node."""
    folder = Path(tempfile.mkdtemp(prefix="samepage-upgrade-"))
    yield freeze_node(variants.disk("1.0"), folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def wake(frozen: Path, tmp_path: Path) -> Iterator[Wake]:
    """Wakes copies of the frozen node; they end with the test."""
    woken: list[Machine] = []

    def one(name: str = "copy") -> Machine:
        woken.append(wake_node(frozen, tmp_path, name))
        return woken[-1]

    yield one
    for machine in woken:
        machine.stop()


@pytest.fixture
def node(wake: Wake) -> Machine:
    return wake()
