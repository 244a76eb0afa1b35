"""One node is installed, booted, signed in to and frozen; every test wakes a copy of it, which takes seconds.

Its release `1.0` is Debian 13 without its security updates, so that the upgrades to today's packages are real ones.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.pipeline import Options
from appliance.targets import base, machinestate, qemu
from tests.boot.samepage_site import Site
from tests.upgrade.machines import DEADLINE, TARGET, Machine
from tests.variants import PROJECT, Variants, release_lock, replace, with_lock

Wake = Callable[..., Machine]
SETTINGS = replace(
    "recipes/node-tools/recipe.yaml", 'channel: ""  #', 'channel: "file:///state/channel"  #'
)
TRIAL_SECONDS = 240
TRIAL = replace("recipes/node-tools/recipe.yaml", "trial_seconds: 600", f"trial_seconds: {TRIAL_SECONDS}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.boot)
            item.add_marker(pytest.mark.timeout(4 * DEADLINE))


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """Builds releases; all of them start from Debian 13 without its updates unless an edit says otherwise."""
    old = release_lock(Options(PROJECT).cache)
    return Variants(tmp_path_factory.mktemp("variants"), (with_lock(old), SETTINGS, TRIAL))


@pytest.fixture(scope="session")
def frozen(variants: Variants) -> Iterator[Path]:
    """The frozen node, with a signed-in administrator's cookies beside it."""
    folder = Path(tempfile.mkdtemp(prefix="samepage-upgrade-"))
    image = variants.disk("1.0")
    node = folder / "node"
    node.mkdir()
    request = base.Request("node", image, kind="disk")
    key = TARGET._make_key(node)
    qemu.prepare_disks(request, node)
    base.save_request(request, node)
    machine = Machine(qemu.start(request, node, {"ssh.authorized_keys.root": key}))
    try:
        machine.wait_healthy()
        administrator = Site(machine.url, machine.ssh).administrator()
        administrator.call("Items.create", title="before", body="written before any upgrade")
        machine.ssh("sync")
        machinestate.freeze(machine.instance, folder / "frozen")
        (folder / "cookies.json").write_text(json.dumps(administrator.cookies))
    except BaseException:
        TARGET.down(machine.instance)
        raise
    yield folder / "frozen"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def wake(frozen: Path, tmp_path: Path) -> Iterator[Wake]:
    """Wakes copies of the frozen node; they end with the test."""
    woken: list[Machine] = []
    cookies = json.loads((frozen.parent / "cookies.json").read_text())

    def one(name: str = "copy") -> Machine:
        machine = Machine(machinestate.wake(frozen, tmp_path, name), cookies)
        woken.append(machine)
        while not TARGET.reachable(machine.instance):
            pass
        return machine

    yield one
    for machine in woken:
        machine.stop()


@pytest.fixture
def node(wake: Wake) -> Machine:
    return wake()
