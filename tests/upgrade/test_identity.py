"""Whatever way a node took to a release, it ends with the very bytes of a fresh install of that release."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest

from appliance import channel
from tests.evolving import Evolving
from tests.upgrade.endings import FULL, runs
from tests.upgrade.machines import Machine
from tests.variants import SIGNER, Edit, Variants

LENGTH = 50
VERSIONS = tuple(f"7.{number}" for number in range(1, LENGTH + 1))


def evolved(steps: int) -> Edit:
    def edit(project: Path) -> None:
        evolving = Evolving(project)
        for _ in range(steps):
            evolving.step()

    return edit


@pytest.fixture(scope="module")
def bundles(variants: Variants) -> list[Path]:
    """One from each generated release to the next. Each release is built from its recipes alone, as for an ISO."""
    for steps, version in enumerate(VERSIONS, start=1):
        variants.release(version, evolved(steps))
    assert len({variants.made[version].digest for version in VERSIONS}) == LENGTH
    return [variants.bundle(start, goal) for start, goal in pairwise(("1.0", *VERSIONS))]


def test_a_chain_of_50_releases(node: Machine, variants: Variants, bundles: list[Path], tmp_path: Path) -> None:
    """The node makes each release's files from those of the one before, and upgrades to the last."""
    channel.add(tmp_path / "channel", bundles, SIGNER, int(node.ssh("date +%s")))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tmp_path / "channel", "channel")
    node.ssh("tar -x -C /state", input=packed.getvalue())
    status, found = node.tool()
    assert (status, found["outcome"], found["from"], found["to"]) == (0, "committed", "1.0", VERSIONS[-1]), found
    runs(node, variants, VERSIONS[-1])
    assert set(node.status()["releases"]) < {"1.0", *VERSIONS[-3:]}


@FULL
def test_each_of_50_releases_in_turn(node: Machine, variants: Variants, bundles: list[Path]) -> None:
    for version, path in zip(VERSIONS, bundles, strict=True):
        status, found = node.upgrade(path)
        assert (status, found["outcome"], found["to"]) == (0, "committed", version), found
        runs(node, variants, version, whole=version == VERSIONS[-1])
