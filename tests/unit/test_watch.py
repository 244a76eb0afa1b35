"""Watching folders: what counts as a change, and when an editor is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.watch import QUIET, snapshot, wait_for_change


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes/nginx/templates").mkdir(parents=True)
    (tmp_path / "recipes/nginx/templates/nginx.conf.j2").write_text("one")
    return tmp_path / "recipes"


def write(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


def replaced(file: Path) -> None:
    """As many editors save."""
    (file.parent / "other").write_text("two")
    (file.parent / "other").replace(file)


@pytest.mark.parametrize(
    "change",
    [write("three"), write(""), replaced, Path.unlink, lambda file: file.chmod(0o755),
     lambda file: (file.parent / "new").write_text("x"), lambda file: (file.parent / "link").symlink_to("nowhere"),
     lambda file: file.rename(file.with_name("renamed"))],
)  # fmt: skip
def test_a_change_is_seen(folder: Path, change: Callable[[Path], object]) -> None:
    before = snapshot([folder])
    assert snapshot([folder]) == before
    change(folder / "nginx/templates/nginx.conf.j2")
    assert snapshot([folder]) != before


@pytest.mark.parametrize(
    "name", [".nginx.conf.j2.swp", "nginx.conf.j2~", ".#nginx.conf.j2", "#nginx.conf.j2#", "4913", "x.pyc"]
)
def test_what_editors_leave_aside_is_not_seen(folder: Path, name: str) -> None:
    before = snapshot([folder])
    (folder / "nginx/templates" / name).write_text("x")
    (folder / "nginx/__pycache__").mkdir()
    (folder / "nginx/__pycache__/x").write_text("x")
    assert snapshot([folder]) == before


def test_a_missing_folder_is_empty(folder: Path) -> None:
    assert snapshot([folder / "nowhere"]) == {}


def test_a_change_is_told_once_it_is_over(folder: Path) -> None:
    file = folder / "nginx/templates/nginx.conf.j2"
    before = snapshot([folder])
    pauses: list[float] = []
    idle: list[None] = []
    edits = {2: "two", 3: "three", 4: "four four"}

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if text := edits.get(len(pauses)):
            file.write_text(text)

    assert wait_for_change([folder], before, lambda: idle.append(None), sleep) == [str(file)]
    assert pauses[-1] == QUIET
    assert len(idle) == len(pauses) == 5
    assert file.read_text() == "four four"


def test_a_change_that_came_before_is_told_at_once(folder: Path) -> None:
    before = snapshot([folder])
    new = folder / "new"
    new.write_text("x")
    assert wait_for_change(iter([folder]), before, sleep=lambda _seconds: None) == [str(new)]


def test_a_change_that_was_taken_back_is_none(folder: Path) -> None:
    before = snapshot([folder])
    new, last = folder / "new", folder / "last"
    steps = [lambda: new.write_text("x"), new.unlink, lambda: None, lambda: last.write_text("x")]

    def sleep(_seconds: float) -> None:
        if steps:
            steps.pop(0)()

    assert wait_for_change([folder], before, sleep=sleep) == [str(last)]
