"""A project damaged anywhere gives faults, never an exception, and the undamaged one none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.check import check_project
from appliance.errors import InputError
from tests.trees import BROKEN, VALID, write_tree


@pytest.mark.parametrize("layout", ["one", "two"])
def test_the_valid_project_has_no_faults(project: Path, layout: str) -> None:
    model, trees = check_project(project, layout, "1.0")
    assert [tree.node for tree in trees] == [node.name for node in model.nodes]


def test_the_project_may_be_named_by_a_relative_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "recipes")
    assert check_project(Path(".."), "one", "1.0") == check_project(project, "one", "1.0")


def test_faults_name_files_of_the_project_only(project: Path) -> None:
    for change in BROKEN["many-at-once"]:
        change(project)
    with pytest.raises(InputError) as caught:
        check_project(project, "one", "1.0")
    assert all((project / fault.file).exists() for fault in caught.value.faults)
    assert str(project) not in str(caught.value)
    assert list(caught.value.faults) == sorted(caught.value.faults)


@settings(max_examples=100)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_no_damage_makes_it_fall_over(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    project = write_tree(tmp_path_factory.getbasetemp() / "damaged", VALID)
    (project / name).write_text(damaged(VALID[name], data), encoding="utf-8")
    for layout in ("one", "two"):
        try:
            check_project(project, layout, "1.0")
        except InputError as error:
            assert error.faults  # noqa: PT017 - both outcomes are right, a third is not


def damaged(text: str, data: st.DataObject) -> str:
    """The text with a part of it left out, doubled, moved or replaced."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    part = text[start:end]
    words = st.text(max_size=6) | st.sampled_from(
        ["{", "}", "[", ": ", "\n", "- ", "0", "-1", "null", "{{ x }}", "{% if %}"]
    )
    put = data.draw(st.sampled_from(["", part * 2]) | words)
    return text[:start] + put + text[end:]
