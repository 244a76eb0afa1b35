"""What cleanup removes, and why; and the room an upgrade needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.node import refusals
from appliance.node.upgrade.retention import MARGIN, Plan, Present, Release, figure, files_of, need, plan
from tests.unit.releases import Maker

MB = 1_000_000


def release(version: str, at: float, *files: str, data: int | None = None) -> Release:
    return Release(version, version, at, frozenset(files), data)


ONE = release("1.0", 100, "layers/base-a.erofs", "layers/app-a.erofs", "kernels/6.12/vmlinuz", data=4)
TWO = release("1.1", 200, "layers/base-a.erofs", "layers/app-b.erofs", "kernels/6.12/vmlinuz", data=5)
THREE = release("1.2", 300, "layers/base-b.erofs", "layers/app-b.erofs", "kernels/6.13/vmlinuz", data=6)
FOUR = release("1.3", 400, "layers/base-b.erofs", "layers/app-c.erofs", "kernels/6.13/vmlinuz")
ALL = (ONE, TWO, THREE, FOUR)
FILES = {path: 100 * MB for one in ALL for path in one.files}
PRESENT = Present(FILES, {1: 5000 * MB, 4: 10 * MB, 5: 20 * MB, 6: 30 * MB})


def decide(
    keep: int = 3, budget: int | None = None, used: int = 0, present: Present = PRESENT,
    releases: tuple[Release, ...] = ALL, running: str = "1.3", previous: str = "1.2", protected: tuple[str, ...] = (),
) -> Plan:  # fmt: skip
    return plan(
        releases, present, running=running, running_data=1, previous=previous, keep=keep, budget_bytes=budget,
        used_bytes=used, protected=protected,
    )  # fmt: skip


def test_the_oldest_go_and_what_only_they_needed() -> None:
    assert decide().lines() == [
        "keep    1.3                 it runs",
        "keep    1.2                 a rollback goes back to it",
        "keep    1.1                 one of the newest; 3 are kept",
        "remove  1.0                 only 3 releases are kept",
        "remove  layers/app-a.erofs  only 1.0 needed it",
        "remove  data 4              the data that 1.0 left behind",
        "frees 110.0 MB",
    ]


def test_nothing_to_remove_is_said() -> None:
    found = decide(keep=4)
    assert found.empty
    assert found.lines()[-1] == "nothing to remove"


@pytest.mark.parametrize("keep", [-1, 0, 1, 2])
def test_the_running_and_the_previous_one_always_stay(keep: int) -> None:
    found = decide(keep=keep, previous="1.0", budget=0, used=10**12)
    assert found.keep == (("1.3", "it runs"), ("1.0", "a rollback goes back to it"))
    assert [name for name, _ in found.remove] == ["1.1", "1.2"]
    assert found.remove[0][1] == "only 2 releases are kept"


def test_over_the_budget_the_oldest_go_until_it_fits() -> None:
    found = decide(keep=4, budget=400 * MB, used=520 * MB)
    assert found.remove == (("1.0", "120.0 MB over the space budget"), ("1.1", "10.0 MB over the space budget"))
    assert found.files == (
        ("kernels/6.12/vmlinuz", "only 1.0 and 1.1 needed it"),
        ("layers/app-a.erofs", "only 1.0 needed it"),
        ("layers/base-a.erofs", "only 1.0 and 1.1 needed it"),
    )
    assert (found.frees, found.over) == (330 * MB, 0)
    assert decide(keep=4, budget=400 * MB, used=510 * MB).remove == (("1.0", "110.0 MB over the space budget"),)
    assert decide(keep=4, budget=400 * MB, used=400 * MB).empty


def test_what_stays_over_the_budget_is_said() -> None:
    found = decide(keep=4, budget=0, used=1000 * MB)
    assert found.over == 670 * MB
    assert found.lines()[-2:] == ["frees 330.0 MB", "still 670.0 MB over the space budget"]


def test_a_release_that_an_unfinished_upgrade_needs_stays() -> None:
    found = decide(keep=2, protected=("1.0", "unknown"))
    assert ("1.0", "an unfinished upgrade needs it") in found.keep
    assert [name for name, _ in found.remove] == ["1.1"]
    assert found.data == ((5, "the data that 1.1 left behind"),)


def test_what_belongs_to_no_release_goes_unless_it_is_named() -> None:
    more = {"layers/app-z.erofs": 7, "kernels/5.10/initrd": 8, "upgrade/incoming/x.bundle.partial": 9}
    present = Present(FILES | more, {**PRESENT.data, 9: 1, 10: 2})
    found = decide(keep=4, present=present)
    assert found.files == (
        ("kernels/5.10/initrd", "no release needs it"),
        ("layers/app-z.erofs", "no release needs it"),
        ("upgrade/incoming/x.bundle.partial", "left behind by a download or an upgrade that did not end"),
    )
    assert found.data == ((9, "no release needs it"), (10, "no release needs it"))
    assert found.frees == 27
    named = present._replace(named_files=frozenset(more), named_data=frozenset({9, 10}))
    assert decide(keep=4, present=named).empty


def test_what_nobody_needs_goes_before_a_release_does() -> None:
    present = Present(FILES | {"layers/app-z.erofs": 100 * MB}, PRESENT.data)
    assert decide(keep=4, present=present, budget=400 * MB, used=500 * MB).remove == ()


def test_the_data_that_runs_stays_whoever_has_it() -> None:
    found = decide(keep=1, releases=(ONE._replace(data=1), TWO, THREE, FOUR))
    assert [number for number, _ in found.data] == [4, 5]


@pytest.mark.parametrize(("running", "previous"), [("1.9", "1.2"), ("1.3", "1.9"), ("", "")])
def test_without_the_records_of_what_must_stay_nothing_is_decided(running: str, previous: str) -> None:
    with pytest.raises(refusals.Damaged, match="cannot be read"):
        decide(running=running, previous=previous)
    assert decide(previous="").keep[0] == ("1.3", "it runs")


def test_a_release_that_was_installed_again_counts_as_new() -> None:
    found = decide(releases=(ONE._replace(installed_at=250), TWO, THREE, FOUR))
    assert [name for name, _ in found.remove] == ["1.1"]
    found = decide(keep=3, releases=tuple(one._replace(installed_at=0) for one in ALL))
    assert [name for name, _ in found.remove] == ["1.0"]


def test_the_files_of_a_release_are_those_of_one_node(tmp_path: Path) -> None:
    manifest = Maker(tmp_path).release(nodes=("one", "two")).manifest
    base, app, config, _ = manifest.layers
    kernel = manifest.kernel.id
    assert files_of(manifest, "one") == {
        f"layers/base-{base.digest}.erofs", f"layers/app-{app.digest}.erofs", f"layers/config-{config.digest}.erofs",
        f"kernels/{kernel}/vmlinuz", f"kernels/{kernel}/initrd",
    }  # fmt: skip


# --- properties ------------------------------------------------------------------------------------------------------

PATHS = [f"layers/base-{letter}.erofs" for letter in "abcde"] + [f"kernels/{letter}/vmlinuz" for letter in "abc"]


@dataclass(frozen=True)
class Node:
    """All that `plan` is given."""

    releases: tuple[Release, ...]
    present: Present
    running: str
    running_data: int
    previous: str
    keep: int
    budget: int | None
    used: int
    protected: frozenset[str]

    def plan(self) -> Plan:
        return plan(
            self.releases, self.present, running=self.running, running_data=self.running_data, previous=self.previous,
            keep=self.keep, budget_bytes=self.budget, used_bytes=self.used, protected=self.protected,
        )  # fmt: skip

    def after(self, found: Plan) -> Node:
        """The node once the plan is carried out."""
        files, data = {path for path, _ in found.files}, {number for number, _ in found.data}
        removed = {name for name, _ in found.remove}
        present = self.present._replace(
            files={path: size for path, size in self.present.files.items() if path not in files},
            data={number: size for number, size in self.present.data.items() if number not in data},
        )
        staying = tuple(one for one in self.releases if one.id not in removed)
        return replace(self, releases=staying, present=present, used=self.used - found.frees)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    count = draw(st.integers(1, 7))
    numbers = st.integers(1, 9)
    releases = tuple(
        Release(
            f"r{index}",
            draw(st.sampled_from(["1.0", "1.1", "2.0~rc1"])),
            draw(st.integers(0, 4)),
            draw(st.frozensets(st.sampled_from(PATHS), max_size=4)),
            draw(st.none() | numbers),
        )
        for index in range(count)
    )
    ids = st.sampled_from([one.id for one in releases])
    sizes = st.integers(0, 50)
    present = Present(
        draw(st.dictionaries(st.sampled_from([*PATHS, "upgrade/incoming/a.partial"]), sizes)),
        draw(st.dictionaries(numbers, sizes)),
        draw(st.frozensets(st.sampled_from(PATHS), max_size=2)),
        draw(st.frozensets(numbers, max_size=2)),
    )
    used = sum(present.files.values()) + sum(present.data.values()) + draw(sizes)
    return Node(
        releases, present, draw(ids), draw(numbers), draw(st.just("") | ids), draw(st.integers(0, 8)),
        draw(st.none() | st.integers(0, 300)), used, draw(st.frozensets(ids, max_size=2)),
    )  # fmt: skip


@given(nodes())
@settings(max_examples=200)
def test_no_kept_release_loses_anything(node: Node) -> None:
    found = node.plan()
    kept = {name for name, _ in found.keep}
    assert kept | {name for name, _ in found.remove} == {one.id for one in node.releases}
    assert len(found.keep) + len(found.remove) == len(node.releases)
    assert {node.running, *node.protected} <= kept
    assert not node.previous or node.previous in kept
    files, data = {path for path, _ in found.files}, {number for number, _ in found.data}
    for one in node.releases:
        if one.id in kept:
            assert not files & one.files
            assert one.data not in data
    assert node.running_data not in data
    assert not files & node.present.named_files
    assert not data & node.present.named_data
    assert all(why for _, why in (*found.keep, *found.remove, *found.files, *found.data))


@given(nodes())
@settings(max_examples=200)
def test_nothing_is_left_for_a_second_plan(node: Node) -> None:
    after = node.after(node.plan())
    assert after.plan().empty
    assert after.plan().frees == 0
    needed = after.present.named_files.union(*(one.files for one in after.releases))
    assert after.present.files.keys() <= needed


@given(nodes())
@settings(max_examples=200)
def test_it_frees_what_it_says(node: Node) -> None:
    found = node.plan()
    after = node.after(found)

    def total(one: Node) -> int:
        return sum(one.present.files.values()) + sum(one.present.data.values())

    assert total(node) - total(after) == found.frees >= 0
    assert found.over == (max(0, after.used - node.budget) if node.budget is not None else 0)


@given(nodes())
@settings(max_examples=200)
def test_no_more_goes_than_must(node: Node) -> None:
    """The newest stay, `keep` of them where the budget allows."""
    found = node.plan()
    must = {node.running, *node.protected} | ({node.previous} if node.previous else set())
    kept = {name for name, _ in found.keep}
    assert len(kept) <= max(node.keep, len(must))
    ages = {one.id: one.installed_at for one in node.releases}
    assert max((ages[name] for name, _ in found.remove), default=0) <= min(
        (ages[name] for name in kept - must), default=9
    )
    if node.budget is None:
        assert len(kept) == min(len(node.releases), max(node.keep, len(must)))
    if found.over:
        assert kept == must


# --- room ------------------------------------------------------------------------------------------------------------


def test_an_upgrade_that_does_not_fit_is_refused() -> None:
    assert need([300 * MB, 20 * MB], 600 * MB) == 320 * MB + MARGIN
    assert need([], 10, margin=10) == 10
    with pytest.raises(refusals.NoRoom) as caught:
        need([300 * MB, 2_345_678], 400 * MB)
    assert caught.value.message == (
        "the upgrade needs 558.3 MB (302.3 MB of files and 256.0 MB to spare), but 400.0 MB are free"
    )
    assert "cleanup" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2 * MB, "2.0 MB"), (10**12, "1000.0 GB")]
)
def test_figures(size: int, text: str) -> None:
    assert figure(size) == text
