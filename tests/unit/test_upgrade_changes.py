"""Which files differ between two mounted releases, and whether that concerns data."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.node.upgrade import changes
from appliance.node.upgrade.changes import changed_paths, concerns_data, read_node, recipes_of


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """Two trees with the same files."""
    old = tmp_path / "old"
    for name, content in {
        "etc/nginx/nginx.conf": "worker 1;", "etc/empty": "", "etc/deep/er/file": "x", "etc/big": "b" * 600_000,
        "opt/program": "run",
    }.items():  # fmt: skip
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(content)
    (old / "opt/program").chmod(0o755)
    (old / "etc/link").symlink_to("nginx/nginx.conf")
    (old / "etc/gone").symlink_to("/nowhere")
    new = tmp_path / "new"
    shutil.copytree(old, new, symlinks=True)
    for path in new.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    return old, new


def differ(trees: tuple[Path, Path], prefix: str = "") -> set[str]:
    old, new = map(str, trees)
    found = changed_paths(old, new, prefix)
    assert changed_paths(new, old, prefix) == found
    return found


def test_the_same_files_with_other_times_do_not_differ(trees: tuple[Path, Path]) -> None:
    assert differ(trees) == set()


def test_content_counts(trees: tuple[Path, Path]) -> None:
    _, new = trees
    (new / "etc/nginx/nginx.conf").write_text("worker 2;")
    (new / "etc/big").write_text("b" * 599_999 + "c")
    (new / "etc/empty").write_text("no longer")
    assert differ(trees) == {"/etc/nginx/nginx.conf", "/etc/big", "/etc/empty"}
    assert differ(trees, "/opt/samepage") == {
        "/opt/samepage/etc/nginx/nginx.conf", "/opt/samepage/etc/big", "/opt/samepage/etc/empty"
    }  # fmt: skip


def test_modes_count_of_files_and_folders(trees: tuple[Path, Path]) -> None:
    _, new = trees
    (new / "opt/program").chmod(0o644)
    (new / "etc/deep").chmod(0o700)
    assert differ(trees) == {"/opt/program", "/etc/deep"}


def test_links_count_by_where_they_lead(trees: tuple[Path, Path]) -> None:
    _, new = trees
    for name, target in (("link", "nginx/other"), ("gone", "/nowhere")):
        (new / "etc" / name).unlink()
        (new / "etc" / name).symlink_to(target)
    assert differ(trees) == {"/etc/link"}


def test_what_only_one_has_is_told_by_its_files(trees: tuple[Path, Path]) -> None:
    old, new = trees
    (new / "etc/more/still").mkdir(parents=True)
    (new / "etc/more/still/file").write_text("")
    (new / "etc/more/link").symlink_to("/etc")
    (new / "etc/bare").mkdir()
    shutil.rmtree(old / "etc/nginx")
    assert differ(trees) == {"/etc/more/still/file", "/etc/more/link", "/etc/nginx/nginx.conf"}


def test_another_kind_counts(trees: tuple[Path, Path]) -> None:
    _, new = trees
    (new / "etc/empty").unlink()
    (new / "etc/empty").mkdir()
    (new / "etc/link").unlink()
    (new / "etc/link").write_text("nginx/nginx.conf")
    shutil.rmtree(new / "etc/deep")
    (new / "etc/deep").symlink_to("nginx")
    (new / "etc/gone").unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(new / "etc/gone"))
    assert differ(trees) == {"/etc/empty", "/etc/link", "/etc/deep", "/etc/gone"}


@given(st.data())
@settings(max_examples=60)
def test_what_is_changed_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = st.sampled_from(["a", "b/a", "b/c", "d/e/f", "g"])
    contents = st.dictionaries(names, st.tuples(st.text("xy", max_size=3), st.sampled_from([0o644, 0o600])))
    folder = tmp_path_factory.mktemp("trees")
    wanted = []
    for name in ("old", "new"):
        files = data.draw(contents)
        (folder / name).mkdir()
        for path, (text, mode) in files.items():
            file = folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(mode)
        wanted.append(files)
    old, new = wanted
    expected = {f"/{path}" for path in old.keys() | new.keys() if old.get(path) != new.get(path)}
    assert differ((folder / "old", folder / "new")) == expected


# --- the node's description ------------------------------------------------------------------------------------------

NODE: dict[str, Any] = {
    "units": {
        "nginx.service": {"recipe": "nginx"}, "samepage.service": {"recipe": "samepage"},
        "postgresql.service": {"recipe": "postgresql"},
    },
    "data": ["postgresql", "samepage"],
}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"units"', b"null"])
def test_a_node_without_a_description_has_an_empty_one(tmp_path: Path, content: bytes) -> None:
    assert read_node(str(tmp_path)) == {}
    (tmp_path / "etc/samepage").mkdir(parents=True)
    (tmp_path / changes.NODE_FILE).write_bytes(content)
    assert read_node(str(tmp_path)) == {}
    (tmp_path / changes.NODE_FILE).write_bytes(b'{"name": "one"}')
    assert read_node(str(tmp_path)) == {"name": "one"}


def test_units_belong_to_recipes() -> None:
    assert recipes_of(NODE, {"nginx.service", "samepage.service", "other.service"}) == {"nginx", "samepage"}
    assert recipes_of({}, {"nginx.service"}) == set()


def test_data_is_concerned_when_a_unit_that_keeps_some_is_touched() -> None:
    assert not concerns_data([NODE, NODE], {"nginx.service": "reload", "samepage.service": "none"})
    assert concerns_data([NODE, NODE], {"samepage.service": "restart"})
    assert concerns_data([{}, NODE], {"postgresql.service": "start"})  # a recipe that only one release has
    assert concerns_data([NODE, {}], {"postgresql.service": "stop"})
    assert not concerns_data([{}, {}], {"postgresql.service": "stop"})
