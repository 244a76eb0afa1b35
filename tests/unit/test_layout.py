"""Layouts: endpoints, memory, settings, collisions, and the description of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.describe import as_text, describe
from appliance.endpoints import needed_recipes
from appliance.errors import Faults
from appliance.layout import layout_names, load_layout, share_memory
from appliance.model import Memory, Model, Place, Recipe, frozen_map
from appliance.recipes import load_recipes
from tests.trees import ONE, STORE, TWO, WEB, add, edit, write_tree


def load(project: Path, name: str = "one") -> Model:
    model, faults = try_load(project, name)
    assert faults == []
    assert model is not None
    return model


def try_load(project: Path, name: str) -> tuple[Model | None, list[str]]:
    faults = Faults()
    model = load_layout(project, name, load_recipes(project, faults), faults, "1.0")
    return model, [str(fault) for fault in faults.found]


def test_one_node(project: Path) -> None:
    model = load(project)
    assert (model.name, model.version, model.summary) == ("one", "1.0", "Everything on one node")
    assert model.project == project
    assert [recipe.name for recipe in model.recipes] == ["base", "store", "web"]
    (node,) = model.nodes
    assert (node.name, node.address, node.memory) == ("all", "", 512)
    assert [recipe.name for recipe in node.recipes] == ["base", "store", "web"]


def test_an_endpoint_on_the_same_node_is_a_socket_or_loopback(project: Path) -> None:
    endpoints = load(project).nodes[0].endpoints
    store, web = endpoints["store"], endpoints["web"]
    assert (store.socket, store.host, store.port, store.provider, store.local) == (
        "/run/store/socket", "127.0.0.1", 5000, "store", True,
    )  # fmt: skip
    assert (web.socket, web.host, web.port) == ("", "127.0.0.1", 443)


def test_an_endpoint_on_another_node_is_its_address(project: Path) -> None:
    front, data = load(project, "two").nodes
    store = front.endpoints["store"]
    assert (store.socket, store.host, store.port, store.provider, store.local) == ("", "10.0.0.2", 5000, "store", False)
    assert data.endpoints["store"].local
    assert (front.prefix, data.prefix) == (24, 16)


def test_the_nearer_of_several_providers_is_taken(project: Path) -> None:
    edit(TWO, "[base, web]", "[base, web, store]")(project)
    front, _ = load(project, "two").nodes
    assert front.endpoints["store"].local


def test_a_node_that_uses_another_needs_an_address_too(project: Path) -> None:
    edit(TWO, "    address: 10.0.0.1\n", "")(project)
    _, faults = try_load(project, "two")
    assert len(faults) == 1
    assert "but 'front' has no fixed address" in faults[0]


def test_layouts_override_settings_and_keep_the_rest(project: Path) -> None:
    add(ONE, "    colours: {text: blue}\n  store: {durable: false}\n")(project)
    (node,) = load(project).nodes
    assert node.settings["web"] == {"workers": 8, "colours": {"page": "white", "text": "blue"}}
    assert node.settings["store"] == {"connections": 20, "durable": False, "label": "main"}


def test_a_whole_number_may_override_a_fraction_but_a_flag_no_number(project: Path) -> None:
    edit(WEB, "workers: 4", "workers: 4\n  load: 0.5")(project)
    edit(ONE, "workers: 8", "load: 1")(project)
    assert load(project).settings["web"]["load"] == 1
    edit(ONE, "load: 1", "workers: true")(project)
    assert "not the flag true" in try_load(project, "one")[1][0]


def test_models_cannot_be_changed(project: Path) -> None:
    model = load(project)
    with pytest.raises(TypeError):
        model.settings["web"]["workers"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        model.nodes[0].memory = 1  # type: ignore[misc]


def test_needed_recipes_are_followed_to_the_end(project: Path) -> None:
    edit("recipes/base/recipe.yaml", "mask:", "provides: {names: {port: ssh}}\nmask:")(project)
    edit(STORE, "units:", "needs: [names]\nunits:")(project)
    (node,) = load(project).nodes
    by_name = {recipe.name: recipe for recipe in node.recipes}
    assert needed_recipes(by_name["web"], node) == ("base", "store")
    assert needed_recipes(by_name["base"], node) == ()
    front, _ = load(project, "two").nodes
    assert needed_recipes(front.recipes[1], front) == ()  # what another node runs is not this node's health


def test_recipes_may_need_each_other(project: Path) -> None:
    edit(STORE, "units:", "needs: [web]\nunits:")(project)
    (node,) = load(project).nodes
    assert [needed_recipes(recipe, node) for recipe in node.recipes] == [(), ("web",), ("store",)]


def test_the_same_user_may_stand_in_two_recipes(project: Path) -> None:
    edit(WEB, "  web: {uid: 820", "  store: {uid: 810, home: /var/lib/store}\n  web: {uid: 820")(project)
    load(project)


def test_recipes_on_different_nodes_do_not_collide(project: Path) -> None:
    edit(WEB, "port: 443", "port: 5000")(project)
    load(project, "two")
    assert "the port 5000/tcp is claimed" in try_load(project, "one")[1][0]


def test_users_and_app_files_are_the_same_on_every_node(project: Path) -> None:
    edit(WEB, "uid: 820", "uid: 810")(project)
    add("recipes/store/files/opt/samepage/bin/web", "x")(project)
    assert len(try_load(project, "two")[1]) == 2


def test_layout_names(project: Path) -> None:
    assert layout_names(project) == ("one", "two")


@pytest.mark.parametrize("name", ["../one", "", "one.yaml", "/etc/passwd", "recipes/one"])
def test_a_layouts_name_is_no_path(project: Path, name: str) -> None:
    model, faults = try_load(project, name)
    assert model is None
    assert "there is no layout" in faults[0]


def test_the_description_is_json_and_text(project: Path) -> None:
    described = describe(load(project, "two"))
    assert json.loads(json.dumps(described)) == described
    front = described["nodes"][0]
    assert front["ports"][1] == {
        "number": 443, "protocol": "tcp", "exposure": "public", "name": "web", "recipe": "web",
    }  # fmt: skip
    assert [one["recipe"] for one in front["components"]] == ["base", "web"]
    text = as_text(described)
    for expected in (
        "node front: 10.0.0.1/24, 256 MiB",
        "443/tcp",
        "10.0.0.2:5000",
        "/run/store/socket",
        "820",
        "level 2",
    ):
        assert expected in text


def test_the_real_layouts_are_valid() -> None:
    project = Path(__file__).parents[2]
    for name in layout_names(project):
        model, faults = try_load(project, name)
        assert faults == []
        assert model is not None


# --- properties ----------------------------------------------------------------------------------------------------


def recipe(number: int, memory: Memory) -> Recipe:
    place = Place(f"recipes/r{number}/recipe.yaml")
    return Recipe(
        f"r{number}", "", Path(), (), (), (), (), (), (), (), (), (), memory, (), (), frozen_map(), 0, place
    )  # fmt: skip


memories = st.lists(st.builds(Memory, weight=st.integers(0, 1000), minimum=st.integers(0, 4096)), max_size=12)


@given(memories, st.integers(0, 100_000))
def test_memory_shares(parts: list[Memory], spare: int) -> None:
    recipes = [recipe(number, memory) for number, memory in enumerate(parts)]
    total = spare + sum(memory.minimum for memory in parts)
    shares = share_memory(total, recipes)
    assert sum(shares.values()) <= total
    assert sum(shares.values()) > total - len(parts) - (0 if any(memory.weight for memory in parts) else spare + 1)
    assert all(shares[one.name] >= one.memory.minimum for one in recipes)
    assert shares == share_memory(total, recipes[::-1])
    above = [(one.memory.weight, shares[one.name] - one.memory.minimum) for one in recipes]
    assert all(left[1] <= right[1] for left in above for right in above if left[0] <= right[0])


@given(memories, st.integers(0, 20_000), st.integers(0, 20_000))
def test_more_memory_takes_from_nobody(parts: list[Memory], memory: int, more: int) -> None:
    recipes = [recipe(number, part) for number, part in enumerate(parts)]
    small, large = share_memory(memory, recipes), share_memory(memory + more, recipes)
    assert all(large[name] >= share for name, share in small.items())


@given(st.text(alphabet="abc:/[]{}-,.\n {}%0129'\"", max_size=100))
def test_any_layout_text_gives_faults_and_never_an_exception(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    project = tmp_path_factory.getbasetemp() / "any-layout"
    write_tree(project, {ONE: text, "recipes/base/recipe.yaml": "summary: x\n"})
    model, faults = try_load(project, "one")
    assert model is None or not faults
