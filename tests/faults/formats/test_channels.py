"""Channel indexes with any content, also behind a good signature."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import channel, refusals, signed
from appliance.node.channel import BundleEntry, Index, ReleaseEntry
from appliance.node.refusals import Refusal
from appliance.node.upgrade.web import inside
from appliance.node.versions import order
from tests.faults.formats.spoiling import FEW, bent, spoiled, stays
from tests.unit.releases import SIGNER, TRUST

INDEX = Index(
    counter=7, created=1_800_000_000, expires=1_800_001_000, layout="test", architecture="amd64",
    releases=(ReleaseEntry("1.0", "a" * 64), ReleaseEntry("1.1", "b" * 64)),
    bundles=(
        BundleEntry("one.bundle", "a" * 64, "b" * 64, 10, "0" * 64), BundleEntry("two", "", "b" * 64, 9, "1" * 64)
    ),
    revoked=frozenset({"0" * 16}),
)  # fmt: skip
PACKED = channel.dump_index(INDEX, SIGNER)
HEADER = signed.unseal(PACKED[: signed.FRONT_SIZE], PACKED[signed.FRONT_SIZE :], TRUST, "index")


@given(spoiled(PACKED))
@FEW
def test_a_spoiled_index_is_refused(content: bytes) -> None:
    if content != PACKED:
        with pytest.raises(Refusal):
            channel.parse_index(content, TRUST)


@given(bent(HEADER))
@FEW
def test_a_bent_index_is_refused_or_names_nothing_outside(value: Any) -> None:
    try:
        index = channel.parse_index(signed.seal(channel.MAGIC, value, SIGNER), TRUST)
        channel.check_index(index, 1_800_000_500, 7, "test", "amd64")
        channel.plan(index, "1.0", ["a" * 64])
    except Refusal:
        return
    for entry in index.bundles:
        assert stays("/state/upgrade/incoming", entry.file)
        assert "/" not in inside("https://example.org/c?k=v", entry.file).removeprefix("https://example.org/c/")
    assert all(order(one.version) for one in index.releases)


@given(st.binary(max_size=80))
@FEW
def test_a_counter_is_a_number_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "counter"
    path.write_bytes(content)
    try:
        assert channel.read_seen(str(path)) >= 0
    except refusals.Damaged:
        assert not content.strip().isdigit()
