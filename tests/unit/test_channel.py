"""Channels: which bundles lead to the newest release, and which indexes are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.node import refusals
from appliance.node.channel import (
    BundleEntry,
    Index,
    ReleaseEntry,
    check_index,
    dump_index,
    parse_index,
    plan,
    read_seen,
    write_seen,
)  # fmt: skip
from appliance.node.keys import Signer
from tests.unit.releases import OTHER, SIGNER, TRUST

A, B, C, D = (letter * 64 for letter in "abcd")
NOW = 1_800_000_000


def entry(start: str, to: str, size: int) -> BundleEntry:
    return BundleEntry(f"samepage-{start[:1] or 'any'}-to-{to[:1]}.bundle", start, to, size, "0" * 64)


INDEX = Index(
    counter=7, created=NOW - 100, expires=NOW + 1000, layout="test", architecture="amd64",
    releases=(ReleaseEntry("1.0", A), ReleaseEntry("1.1", B), ReleaseEntry("1.2", C)),
    bundles=(entry(A, B, 10), entry(B, C, 10), entry(A, C, 25), entry("", C, 1000)),
    revoked=frozenset({OTHER.id}),
)  # fmt: skip


def test_an_index_is_read_as_it_was_written() -> None:
    assert parse_index(dump_index(INDEX, SIGNER), TRUST) == INDEX
    assert INDEX.newest == ReleaseEntry("1.2", C)


def files(chain: tuple[BundleEntry, ...]) -> list[str]:
    return [one.file.removeprefix("samepage-").removesuffix(".bundle") for one in chain]


def test_the_fewest_bytes_win() -> None:
    assert files(plan(INDEX, "1.0", [A])) == ["a-to-b", "b-to-c"]
    cheaper = INDEX._replace(bundles=(*INDEX.bundles, entry(A, C, 15)))
    assert files(plan(cheaper, "1.0", [A])) == ["a-to-c"]
    assert files(plan(INDEX, "1.1", [B, A])) == ["b-to-c"]
    assert files(plan(INDEX, "0.9", [D])) == ["any-to-c"]
    assert files(plan(INDEX._replace(bundles=(entry(A, C, 5), entry(B, C, 9))), "1.1", [B, A])) == ["a-to-c"]
    assert plan(INDEX, "1.2", [C, B]) == ()


def test_no_way_and_downgrade_are_refused() -> None:
    with pytest.raises(refusals.NoWay, match=r"from release 0\.9 to 1\.2"):
        plan(INDEX._replace(bundles=INDEX.bundles[:3]), "0.9", [D])
    with pytest.raises(refusals.Downgrade, match=r"1\.2, older than 1\.3"):
        plan(INDEX, "1.3", [D])
    assert files(plan(INDEX, "1.3", [D], allow_downgrade=True)) == ["any-to-c"]


@given(
    st.lists(st.tuples(st.sampled_from(["", A, B, C, D]), st.sampled_from([A, B, C]), st.integers(1, 50)), max_size=14)
)
@settings(max_examples=300)
def test_the_plan_is_the_cheapest_chain(edges: list[tuple[str, str, int]]) -> None:
    index = INDEX._replace(bundles=tuple(entry(*edge) for edge in edges))
    cost = {A: 0.0, "": 0.0}
    for _ in range(5):
        for start, to, size in edges:
            cost[to] = min(cost.get(to, float("inf")), cost.get(start, float("inf")) + size)
    if C not in cost or cost[C] == float("inf"):
        with pytest.raises(refusals.NoWay):
            plan(index, "1.0", [A])
        return
    chain = plan(index, "1.0", [A])
    assert sum(one.size for one in chain) == cost[C]
    assert chain[0].start in (A, "")
    assert all(one.to == after.start for one, after in pairwise(chain))


@pytest.mark.parametrize(
    ("index", "now", "seen", "refusal"),
    [
        (INDEX, NOW + 1001, 0, refusals.Expired),
        (INDEX, NOW - 90_000, 0, refusals.ClockOff),
        (INDEX, NOW, 8, refusals.Replayed),
        (INDEX._replace(layout="production"), NOW, 0, refusals.WrongLayout),
        (INDEX._replace(architecture="arm64"), NOW, 0, refusals.WrongArchitecture),
    ],
)
def test_an_index_for_another_hour_or_node_is_refused(
    index: Index, now: int, seen: int, refusal: type[Exception]
) -> None:
    check_index(INDEX, NOW, 7, "test", "amd64")
    with pytest.raises(refusal):
        check_index(index, now, seen, "test", "amd64")


@pytest.mark.parametrize(
    ("signer", "refusal"), [(OTHER, refusals.UnknownKey), (Signer(bytes(32)), refusals.UnknownKey)]
)
def test_a_foreign_signature_is_refused(signer: Signer, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        parse_index(dump_index(INDEX, signer), TRUST)
    with pytest.raises(refusals.RevokedKey):
        parse_index(dump_index(INDEX, SIGNER), TRUST.revoking([SIGNER.id]))


def test_every_flipped_byte_and_truncation_is_refused() -> None:
    content = dump_index(INDEX, SIGNER)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        with pytest.raises(refusals.Refusal):
            parse_index(bytes(damaged), TRUST)
        with pytest.raises(refusals.Refusal):
            parse_index(content[:at], TRUST)
    with pytest.raises(refusals.TrailingBytes):
        parse_index(content + b"\0", TRUST)


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a/b", "", ".hidden", "x" * 300, "a\nb"])
def test_a_name_that_leaves_the_folder_is_refused(file: str) -> None:
    index = INDEX._replace(bundles=(INDEX.bundles[0]._replace(file=file),))
    with pytest.raises(refusals.Damaged, match="file"):
        parse_index(dump_index(index, SIGNER), TRUST)


def test_the_greatest_counter_is_remembered(tmp_path: Path) -> None:
    place = str(tmp_path / "seen")
    assert read_seen(place) == 0
    write_seen(place, 12)
    assert read_seen(place) == 12
    (tmp_path / "seen").write_text("twelve")
    with pytest.raises(refusals.Damaged):
        read_seen(place)
