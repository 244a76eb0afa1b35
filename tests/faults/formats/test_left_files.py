"""What the node itself left, perhaps half: journal, boot records, settings, requests."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.node import release
from appliance.node.release import ReleaseError
from appliance.node.upgrade import journal, records, trial
from appliance.node.upgrade.node import NotUpgradable, read_settings
from appliance.node.upgrade.request import STATES, parse_request
from tests.faults.formats.spoiling import FEW, as_json, bent, spoiled, stays

BEGUN = journal.Journal(
    state="health", action="upgrade", depth="live", old="1.0", new="1.1", running_data=1, old_data=2, new_data=1,
    started=1_800_000_000, units={"nginx.service": "reload"},
)  # fmt: skip


@given(st.one_of(spoiled(journal.dump(BEGUN)), bent(json.loads(journal.dump(BEGUN))).map(as_json)))
@FEW
def test_a_spoiled_journal_is_refused_or_names_nothing_outside(content: bytes) -> None:
    try:
        found = journal.parse(content)
    except journal.JournalError:
        return
    assert stays("/state/releases", found.old)
    assert stays("/state/releases", found.new)
    assert found.state in STATES
    assert journal.parse(journal.dump(found)) == found


RECORD = b"set release='1.0'\nset kernel='6.12-a'\nset data='1'\nset options='quiet'\n"


@given(st.one_of(st.binary(max_size=100), spoiled(RECORD)))
@example(RECORD.replace(b"1.0", b"../../x"))
@FEW
def test_a_spoiled_boot_record_is_none_or_names_nothing_outside(content: bytes) -> None:
    found = records.parse_record(content)
    if found is not None:
        assert stays("/state/releases", found.release)
        assert stays("/state/kernels", found.kernel)
        assert 0 <= found.data < 10**9


@given(st.binary(max_size=60))
@FEW
def test_layers_are_three_digests_or_refused(content: bytes) -> None:
    with suppress(ReleaseError):
        assert all(len(one) == 64 for one in release.parse_layers(content).values())


@pytest.mark.parametrize("entry", ["try", ""])
def test_grubs_environment_is_one_block(entry: str) -> None:
    """GRUB reads a block of exactly this size; what counts lies in its first sector."""
    block = trial.environment(entry)
    assert len(block) == 1024
    head, line, rest = block.split(b"\n", 2)
    assert (head, line) == (b"# GRUB Environment Block", f"next_entry={entry}".encode())
    assert set(rest) == {ord("#")}
    assert len(head + line) < 512


@given(st.one_of(st.binary(max_size=60), bent({"channel": "x", "keep": 3, "unattended": True}).map(as_json)))
@FEW
def test_spoiled_settings_are_refused_or_settings(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "upgrade.json"
    path.write_bytes(content)
    try:
        found = read_settings(str(path))
    except NotUpgradable:
        return
    assert type(found.keep) is int
    assert type(found.channel) is str


@given(st.one_of(st.binary(max_size=60), bent({"verb": "install", "source": "x"}).map(as_json)))
@FEW
def test_a_spoiled_request_is_refused_or_a_request(content: bytes) -> None:
    with suppress(ValueError):
        parse_request(content)
