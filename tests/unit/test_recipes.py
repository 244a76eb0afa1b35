"""recipe.yaml and the files of a recipe's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import Faults
from appliance.model import Memory, Recipe
from appliance.recipes import load_recipes
from appliance.yamlfile import Fields
from tests.trees import VALID, add, edit, link, write_tree

WEB = "recipes/web/recipe.yaml"


def load(project: Path) -> dict[str, Recipe]:
    faults = Faults()
    recipes = load_recipes(project, faults)
    assert [str(fault) for fault in faults.found] == []
    return recipes


def test_a_whole_recipe(project: Path) -> None:
    recipes = load(project)
    assert list(recipes) == ["base", "store", "web"]
    web = recipes["web"]
    assert web.summary == "Answers requests"
    assert web.packages == ("python3",)
    assert [(wheel.requirement, len(wheel.sha256)) for wheel in web.wheels] == [("tiny==1.0", 64)]
    assert [(user.name, user.uid, user.home, user.groups) for user in web.users] == [
        ("web", 820, "/nonexistent", ("store",)),
    ]
    assert [(port.name, port.number, port.protocol, port.exposure) for port in web.ports] == [
        ("web", 443, "tcp", "public")
    ]
    assert [(one.name, one.port, one.socket) for one in web.provides] == [("web", "web", "")]
    assert web.needs == ("store",)
    assert web.memory == Memory(weight=1, minimum=32)
    assert [(one.path, one.owner, one.group, one.mode, one.kind) for one in web.state] == [
        ("/var/lib/web", "web", "web", 0o755, "data"),
        ("/state/identity/web", "web", "web", 0o700, "identity"),
    ]
    assert [(one.name, one.kind, one.target, one.expect, one.timeout) for one in web.health] == [
        ("page", "http", "http://127.0.0.1:{{ ports.web }}/", "200 ok", 5.0)
    ]
    assert web.settings == {"workers": 4, "colours": {"page": "white", "text": "black"}}
    assert web.schema_level == 2
    assert web.place.file == WEB
    assert web.users[0].place.line == 7


def test_a_unit_is_own_when_its_file_is_in_the_recipe(project: Path) -> None:
    recipes = load(project)
    assert [(unit.name, unit.own, unit.enable) for unit in recipes["web"].units] == [("web.service", True, True)]
    assert [(unit.name, unit.own, unit.on_change) for unit in recipes["store"].units] == [
        ("store.service", False, "restart")
    ]


def test_the_smallest_recipe_is_a_summary(tmp_path: Path) -> None:
    write_tree(tmp_path, {"recipes/tiny/recipe.yaml": "summary: Nothing at all\n"})
    tiny = load(tmp_path)["tiny"]
    assert (tiny.packages, tiny.units, tiny.sources, tiny.memory) == ((), (), (), Memory(1, 0))


def test_sources_keep_links_and_the_executable_bit(project: Path) -> None:
    add("recipes/web/templates/opt/samepage/bin/start.j2", "#!/bin/sh\n")(project)
    (project / "recipes/web/templates/opt/samepage/bin/start.j2").chmod(0o755)
    link("recipes/web/files/etc/web/current", "../hostname")(project)
    link("recipes/web/files/opt/samepage/share", "/var/lib/web")(project)
    add("recipes/web/files/etc/web/__pycache__/x.pyc", "x")(project)
    found = {one.target: (one.template, one.executable, one.link) for one in load(project)["web"].sources}
    assert found == {
        "/etc/systemd/system/web.service": (True, False, ""),
        "/etc/web/current": (False, False, "../hostname"),
        "/etc/web/web.json": (True, False, ""),
        "/opt/samepage/bin/start": (True, True, ""),
        "/opt/samepage/bin/web": (False, True, ""),
        "/opt/samepage/share": (False, False, "/var/lib/web"),
    }


def test_include_copies_a_folder_of_the_project(project: Path) -> None:
    edit(WEB, "schema_level: 2", "include: {opt/samepage/lib/tool: source/tool}")(project)
    add("source/tool/__init__.py", "")(project)
    add("source/tool/deep/part.py", "x = 1\n")(project)
    add("source/tool/__pycache__/part.pyc", "x")(project)
    found = {one.target: one.group for one in load(project)["web"].sources if one.group}
    group = "/opt/samepage/lib/tool/"
    assert found == {"/opt/samepage/lib/tool/__init__.py": group, "/opt/samepage/lib/tool/deep/part.py": group}


@pytest.mark.parametrize("target", ["usr/lib/x", "../etc/x", "etc", "opt/samepage/../../x"])
def test_include_stays_in_the_appliances_folders(project: Path, target: str) -> None:
    edit(WEB, "schema_level: 2", f"include: {{{target}: source}}")(project)
    add("source/x", "x")(project)
    faults = Faults()
    load_recipes(project, faults)
    assert ["is not a folder under etc/ or opt/samepage/" in fault.message for fault in faults.found] == [True]


def test_a_folder_linked_from_outside_the_project_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (project / "source").symlink_to(tmp_path / "outside")
    edit(WEB, "schema_level: 2", "include: {opt/samepage/lib/x: source}")(project)
    faults = Faults()
    load_recipes(project, faults)
    assert [fault.message for fault in faults.found] == ["source leads out of the project"]


@pytest.mark.parametrize("name", ["templates", "files"])
def test_a_recipes_own_folders_are_no_links(project: Path, tmp_path: Path, name: str) -> None:
    write_tree(tmp_path / "outside", {"etc/secret.j2": "x"})
    folder = project / "recipes" / "base" / name
    if folder.exists():
        folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "outside")
    faults = Faults()
    recipes = load_recipes(project, faults)
    assert [(fault.file, fault.message) for fault in faults.found] == [
        (f"recipes/base/{name}", "is a symbolic link; a recipe's folders stand in the recipe")
    ]
    assert "/etc/secret" not in [source.target for source in recipes["base"].sources]


def test_a_pipe_is_neither_file_nor_folder(project: Path) -> None:
    (project / "recipes/web/files/etc").mkdir()
    os.mkfifo(project / "recipes/web/files/etc/pipe")
    faults = Faults()
    load_recipes(project, faults)
    assert [fault.message for fault in faults.found] == ["is neither a file, a folder nor a symbolic link"]


def test_a_faulty_recipe_is_there_all_the_same(project: Path) -> None:
    edit(WEB, "port: 443", "port: many")(project)
    edit("recipes/base/recipe.yaml", "summary: ", "summary: [")(project)
    faults = Faults()
    recipes = load_recipes(project, faults)
    assert recipes["web"].ports[0].number == 0
    assert not recipes["base"].readable
    assert len(faults.found) == 2


def test_a_project_without_recipes(tmp_path: Path) -> None:
    faults = Faults()
    assert load_recipes(tmp_path, faults) == {}
    assert faults.found


def test_the_build_step_must_be_executable(project: Path) -> None:
    edit(WEB, "schema_level: 2", "build: steps/cluster")(project)
    add("recipes/web/steps/cluster", "#!/bin/sh\n")(project)
    faults = Faults()
    load_recipes(project, faults)
    assert [fault.message for fault in faults.found] == ["steps/cluster is not executable"]
    (project / "recipes/web/steps/cluster").chmod(0o755)
    assert load(project)["web"].build == "steps/cluster"


# --- properties ----------------------------------------------------------------------------------------------------

keys = [
    "summary", "packages", "wheels", "users", "ports", "provides", "needs", "units", "mask", "state", "memory",
    "health", "modules", "settings", "schema_level", "files", "include", "build", "exclude", "omit",
]  # fmt: skip
inner_keys = st.sampled_from(
    ["port", "uid", "exposure", "class", "mode", "owner", "name", "http", "unit", "weight", "/var/x", "a.service", "x"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 70000)
    | st.sampled_from(["", "x", "/etc/x", "a.service", "..", "{{ x }}"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_keys, inner, max_size=4)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(keys) | st.text(max_size=4), values, max_size=6))
def test_any_values_give_faults_and_never_an_exception(tmp_path: Path, tree: dict[str, object]) -> None:
    folder = write_tree(tmp_path / "project", VALID)
    (folder / WEB).write_text(yaml.safe_dump(tree))
    faults = Faults()
    recipe = load_recipes(folder, faults)["web"]
    assert recipe.name == "web"
    assert all(fault.file.startswith("recipes/") for fault in faults.found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="abc:/[]{}-,.&*!#'\"\n {}%0129", max_size=80) | st.binary(max_size=80))
def test_any_text_gives_faults_and_never_an_exception(tmp_path: Path, text: str | bytes) -> None:
    folder = write_tree(tmp_path / "project", VALID)
    (folder / WEB).write_bytes(text.encode() if isinstance(text, str) else text)
    faults = Faults()
    assert "web" in load_recipes(folder, faults)
    assert faults.found  # no such text has a summary


def test_every_key_is_documented(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[str] = set()
    finish = Fields.finish

    def remember(fields: Fields) -> None:
        known.update(() if fields.place.key else fields.known)
        finish(fields)

    monkeypatch.setattr(Fields, "finish", remember)
    load(project)
    page = (Path(__file__).parents[2] / "docs" / "recipe-format.md").read_text()
    described = page.partition("## recipe.yaml")[2].partition("\n## ")[0]
    assert {line[4:] for line in described.splitlines() if line.startswith("### ")} == known == set(keys)
