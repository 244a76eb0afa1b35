"""Rendered trees: what templates see, what the builder makes itself, and trees kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.check import check_project
from appliance.errors import ApplianceError, Faults, InputError
from appliance.layout import load_layout
from appliance.model import Model, Place, RenderedFile, RenderedTree
from appliance.recipes import load_recipes
from appliance.render import node_variables, render, render_tree
from appliance.templates import TemplateText, render_text
from tests.trees import CONF, ONE, STORE, TWO, VALID, WEB, WEB_UNIT, add, edit, link, write_tree

from appliance.treefiles import diff_trees, read_tree, write_tree as keep_tree  # isort: skip


def rendered(project: Path, layout: str = "one", node: int = 0) -> tuple[Model, dict[str, RenderedFile]]:
    model, trees = check_project(project, layout, "1.0")
    return model, {file.path: file for file in (*trees[node].config, *trees[node].app)}


def text(files: dict[str, RenderedFile], path: str) -> str:
    return files[path].content.decode()


def test_templates_see_the_model(project: Path) -> None:
    _, files = rendered(project)
    assert text(files, "/etc/hostname") == "all\n"
    assert json.loads(text(files, "/etc/web/web.json")) == {
        "store": "/run/store/socket", "host": "127.0.0.1", "workers": 8,
    }  # fmt: skip
    assert text(files, "/etc/store/store.conf") == (
        "# rendered for all\nmemory = 301\nport = 5000\nconnections = 20\ndurable\n"
    )
    _, files = rendered(project, "two")
    assert json.loads(text(files, "/etc/web/web.json")) == {"store": "", "host": "10.0.0.2", "workers": 4}


def test_owners_modes_and_sources(project: Path) -> None:
    add("recipes/web/files/etc/web/plain", "x")(project)
    link("recipes/web/files/etc/web/here", "plain")(project)
    edit(WEB, "schema_level: 2", 'files: {/etc/web/: {owner: web, mode: "0750"}}')(project)
    _, files = rendered(project)
    found = {path: (f"{file.mode:04o}", file.uid, file.gid, file.link) for path, file in files.items()}
    assert found["/etc/store/store.conf"] == ("0640", 0, 810, "")
    assert found["/etc/web/plain"] == ("0644", 0, 0, "")
    assert found["/etc/web/here"] == ("0777", 0, 0, "plain")
    assert found["/etc/web/"] == ("0750", 820, 820, "")
    assert found["/opt/samepage/bin/web"] == ("0755", 0, 0, "")
    assert files["/etc/store/store.conf"].source == CONF
    assert files["/etc/store/store.conf"].recipe == "store"


def test_trees_are_sorted_and_every_render_is_the_same(project: Path) -> None:
    model, first = check_project(project, "two", "1.0")
    _, second = check_project(project, "two", "1.0")
    assert first == second
    for tree, node in zip(first, model.nodes, strict=True):
        assert tree == render(model, node)
        for layer in (tree.config, tree.app):
            assert [file.path for file in layer] == sorted(file.path for file in layer)
        assert all(file.path.startswith("/etc/") for file in tree.config)
        assert all(file.path.startswith("/opt/samepage/") for file in tree.app)


def test_the_app_layer_is_the_same_on_every_node(project: Path) -> None:
    _, (front, data) = check_project(project, "two", "1.0")
    assert front.app == data.app != ()


def test_a_recipe_sees_only_the_endpoints_it_needs_or_provides(project: Path) -> None:
    model, _ = rendered(project)
    (node,) = model.nodes
    seen = {recipe.name: sorted(node_variables(model, node, recipe)["endpoints"]) for recipe in node.recipes}
    assert seen == {"base": [], "store": ["store"], "web": ["store", "web"]}


def test_ports_by_exposure(project: Path) -> None:
    model, _ = check_project(project, "two", "1.0")
    front, data = (node_variables(model, node, node.recipes[0]) for node in model.nodes)
    assert [(port["number"], port["protocol"]) for port in front["open_ports"]] == [(22, "tcp"), (443, "tcp")]
    assert front["cluster_ports"] == []
    assert data["cluster_ports"] == [
        {"number": 5000, "protocol": "tcp", "name": "store", "recipe": "store", "peers": ["10.0.0.1"]}
    ]
    assert [peer["name"] for peer in data["peers"]] == ["front"]
    alone, _ = check_project(project, "one", "1.0")
    assert node_variables(alone, alone.nodes[0], alone.recipes[0])["cluster_ports"] == []


# --- what the builder makes itself ---------------------------------------------------------------------------------


def test_node_json(project: Path) -> None:
    _, files = rendered(project)
    node = json.loads(text(files, "/etc/samepage/node.json"))
    assert (node["name"], node["layout"], node["recipes"]) == ("all", "one", ["base", "store", "web"])
    assert {"recipe": "web", "name": "web", "number": 443, "protocol": "tcp", "exposure": "public"} in node["ports"]
    assert node["units"]["web.service"] == {
        "recipe": "web", "on_change": "reload", "own": True, "enable": True,
        "files": ["/etc/systemd/system/web.service", "/etc/web/web.json"],
    }  # fmt: skip
    assert node["units"]["store.service"]["files"] == ["/etc/store/store.conf"]
    assert node["schema_level"] == 2


def test_a_units_files_leave_out_the_recipes_other_units(project: Path) -> None:
    edit(WEB, "  web.service: {on_change: reload, watch: [/etc/web/]}", "  web.service: {}\n  more.service: {}")(
        project
    )
    add("recipes/web/files/etc/systemd/system/more.service", "[Service]\nExecStart=/bin/true\n")(project)
    add("recipes/web/files/etc/systemd/system/more.service.d/limits.conf", "[Service]\nNice=1\n")(project)
    add("source/part.py", "")(project)
    edit(WEB, "schema_level: 2", "include: {opt/samepage/lib/part: source}")(project)
    units = json.loads(text(rendered(project)[1], "/etc/samepage/node.json"))["units"]
    shared = ["/etc/web/web.json", "/opt/samepage/bin/web", "/opt/samepage/lib/part/"]
    assert units["web.service"]["files"] == ["/etc/systemd/system/web.service", *shared]
    assert units["more.service"]["files"] == [
        "/etc/systemd/system/more.service", "/etc/systemd/system/more.service.d/limits.conf", *shared,
    ]  # fmt: skip


def test_health_probes(project: Path) -> None:
    _, files = rendered(project)
    assert json.loads(text(files, "/etc/samepage/health.d/web.json")) == {
        "recipe": "web",
        "needs": ["store"],
        "probes": [
            {"name": "page", "kind": "http", "target": "http://127.0.0.1:443/", "expect": "200 ok", "timeout": 5.0},
        ],
    }
    assert json.loads(text(files, "/etc/samepage/health.d/base.json"))["probes"][0]["target"] == "127.0.0.1:22"


def test_state_folders_become_tmpfiles(project: Path) -> None:
    _, files = rendered(project)
    assert text(files, "/etc/tmpfiles.d/samepage-web.conf") == (
        "d /state/identity/web 0700 820 820 - -\nd /var/lib/web 0755 820 820 - -\n"
    )
    assert "/etc/tmpfiles.d/samepage-base.conf" not in files


def links(project: Path) -> dict[str, str]:
    units = "/etc/systemd/system/"
    return {path.removeprefix(units): file.link for path, file in rendered(project)[1].items() if file.link}


def test_units_are_enabled_and_masked_by_links(project: Path) -> None:
    assert links(project) == {
        "apt-daily.timer": "/dev/null",
        "multi-user.target.wants/ssh.service": "/usr/lib/systemd/system/ssh.service",
        "multi-user.target.wants/store.service": "/usr/lib/systemd/system/store.service",
        "multi-user.target.wants/web.service": "/etc/systemd/system/web.service",
    }


def test_install_sections_and_wanted_by_decide_where_a_unit_hangs(project: Path) -> None:
    install = "WantedBy=multi-user.target"
    edit(WEB_UNIT, install, "WantedBy=early.target \\\n  late.target\nRequiredBy=store.service\nAlias=www.service")(
        project
    )
    edit(STORE, "store.service: {}", "store.timer: {}\n  store.service: {wanted_by: sysinit.target}")(project)
    edit("recipes/base/recipe.yaml", "{on_change: reload}", "{enable: false}")(project)
    assert links(project) == {
        "apt-daily.timer": "/dev/null",
        "early.target.wants/web.service": "/etc/systemd/system/web.service",
        "late.target.wants/web.service": "/etc/systemd/system/web.service",
        "store.service.requires/web.service": "/etc/systemd/system/web.service",
        "www.service": "/etc/systemd/system/web.service",
        "timers.target.wants/store.timer": "/usr/lib/systemd/system/store.timer",
        "sysinit.target.wants/store.service": "/usr/lib/systemd/system/store.service",
    }


def test_instances_are_enabled_through_their_template(project: Path) -> None:
    edit("recipes/base/recipe.yaml", "ssh.service: {on_change: reload}", "getty@tty1.service: {}")(project)
    target = "multi-user.target.wants/getty@tty1.service"
    assert links(project)[target] == "/usr/lib/systemd/system/getty@.service"


# --- templates -----------------------------------------------------------------------------------------------------

VARIABLES = {"memory": 64, "settings": {"name": "x", "deep": {"one": 1}}, "ports": {"web": 443}}


def attempt(template: str) -> tuple[str | None, list[tuple[int, str]]]:
    faults = Faults()
    result = render_text(TemplateText(template, Place("t.j2")), VARIABLES, faults)
    return result, [(fault.line, fault.message) for fault in faults.found]


@pytest.mark.parametrize(
    "template",
    [
        "{{ nam }}", "{{ settings.nam }}", "{{ settings['nam'] }}", "{{ settings.deep.two }}", "{{ nam.x.y.z }}",
        "{% if nam %}{% endif %}", "{% for x in nam %}{% endfor %}", "{% set x = nam %}{{ x }}", "{{ nam() }}",
        "{% macro m() %}{{ nam }}{% endmacro %}{{ m() }}", "{{ nam + 1 }}", "{{ 1 - nam }}", "{{ -nam }}",
        "{{ nam > 1 }}", "{{ nam == 1 }}", "{{ nam | int }}", "{{ nam | length }}", "{{ nam | join(',') }}",
        "{{ nam | upper }}",
        "{{ nam | tojson }}", "{{ nam ~ 'x' }}", "{{ 'x' in nam }}", "{{ '%s' % nam }}", "{{ [nam] | first }}",
        "{{ ports[nam] }}",
    ],
)  # fmt: skip
def test_no_use_of_an_undefined_name_passes(template: str) -> None:
    result, faults = attempt(f"first\n{template}\n")
    assert result is None
    assert faults
    assert {line for line, _ in faults} == {2}


def test_undefined_names_may_be_asked_about() -> None:
    assert attempt("{{ nam is defined }} {{ nam | default('none') }} {{ settings.x is undefined }}")[0] == (
        "False none True"
    )


def test_all_faults_of_a_template_are_found_at_once() -> None:
    _, faults = attempt(
        "{{ a }}\n{% for port in ports.values() %}\n{{ b }}{{ port.c }}\n{% endfor %}\n{{ settings.d }}\n"
    )
    assert faults == [
        (1, "the variable 'a' is not defined"), (3, "the variable 'b' is not defined"), (3, "the value has no 'c'"),
        (5, "settings has no 'd'"),
    ]  # fmt: skip


def test_whitespace_is_kept_as_written() -> None:
    assert attempt("a\n{% if memory %}\n  b\n{% endif %}\nc <&>\n")[0] == "a\n  b\nc <&>\n"


@given(st.text(alphabet="{}%# \nmemory.+|()[]'x1", max_size=60))
def test_no_template_makes_it_fall_over(template: str) -> None:
    result, faults = attempt(template)
    assert (result is None) == bool(faults)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.binary(max_size=60))
def test_no_bytes_in_a_file_make_it_fall_over(tmp_path: Path, content: bytes) -> None:
    project = write_tree(tmp_path / "any", VALID)
    for name in ("etc/x.json", "etc/systemd/system/web.service.d/x.conf", "opt/samepage/share/x"):
        (project / "recipes/web/files" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "recipes/web/files" / name).write_bytes(content)
    faults = Faults()
    model = load_layout(project, "one", load_recipes(project, faults), faults, "1.0")
    assert model is not None
    tree = render_tree(model, model.nodes[0], faults)
    assert {fault.file.rpartition("/")[2] for fault in faults.found} <= {"x.json", "x.conf"}
    assert content in [file.content for file in tree.app if file.path == "/opt/samepage/share/x"]


def test_render_raises_all_faults_of_a_node(project: Path) -> None:
    model, _ = check_project(project, "one", "1.0")
    edit(CONF, "{{ memory }}", "{{ memry }}")(project)
    edit("recipes/base/templates/etc/hostname.j2", "node.name", "node.nam")(project)
    with pytest.raises(InputError) as caught:
        render(model, model.nodes[0])
    assert len(caught.value.faults) == 2


def test_a_file_that_vanished_or_cannot_be_read(project: Path) -> None:
    model, _ = check_project(project, "one", "1.0")
    (project / CONF).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        render(model, model.nodes[0])


# --- trees on disk -------------------------------------------------------------------------------------------------


def test_a_tree_kept_on_disk_is_read_back_the_same(project: Path, tmp_path: Path) -> None:
    link("recipes/web/files/etc/web/here", "/nowhere")(project)
    edit(WEB, "schema_level: 2", 'files: {/etc/web/: {owner: web, mode: "0750"}}')(project)
    _, (tree,) = check_project(project, "one", "1.0")
    keep_tree(tree, tmp_path / "kept")
    assert read_tree(tmp_path / "kept") == tree
    assert diff_trees(read_tree(tmp_path / "kept"), tree) == ""
    keep_tree(RenderedTree("all", (), ()), tmp_path / "kept")
    assert read_tree(tmp_path / "kept").config == ()


def test_a_diff_shows_contents_owners_links_and_files_that_came_or_went(project: Path) -> None:
    link("recipes/web/files/etc/web/here", "one")(project)
    _, (old,) = check_project(project, "one", "1.0")
    edit(CONF, "durable\n{%", "very durable\n{%")(project)
    edit(STORE, 'mode: "0640"', 'mode: "0600"')(project)
    (project / "recipes/web/files/etc/web/here").unlink()
    link("recipes/web/files/etc/web/here", "two")(project)
    add("recipes/web/files/etc/web/new", "no newline")(project)
    (project / "recipes/web/files/opt/samepage/bin/web").unlink()
    _, (new,) = check_project(project, "one", "1.0")
    difference = diff_trees(old, new)
    for expected in (
        "# /etc/store/store.conf: 0640 0:810 -> 0600 0:810\n--- a/etc/store/store.conf\n+++ b/etc/store/store.conf\n",
        "-durable\n+very durable\n",
        "# /etc/web/here: link to one -> link to two\n",
        "# /etc/web/new: absent -> 0644 0:0\n--- /dev/null\n+++ b/etc/web/new\n",
        "+no newline\n\\ No newline at end of file\n",
        "# /opt/samepage/bin/web: 0755 0:0 -> absent\n--- a/opt/samepage/bin/web\n+++ /dev/null\n",
    ):
        assert expected in difference


def test_a_diff_of_bytes_says_only_that_they_differ(project: Path) -> None:
    file = project / "recipes/web/files/opt/samepage/share/image"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\x00")
    _, (old,) = check_project(project, "one", "1.0")
    file.write_bytes(b"\xff\x00\x01")
    _, (new,) = check_project(project, "one", "1.0")
    assert diff_trees(old, new) == (
        "# a/opt/samepage/share/image and b/opt/samepage/share/image differ (2 and 3 bytes, not text)\n"
    )


def test_a_folder_without_a_tree_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ApplianceError, match="holds no rendered tree"):
        read_tree(tmp_path)


def test_layouts_differ_where_they_should(project: Path) -> None:
    edit(ONE, "memory: 512", "memory: 600")(project)
    edit(TWO, "memory: 256", "memory: 300")(project)
    assert text(rendered(project)[1], "/etc/store/store.conf") != text(
        rendered(project, "two", 1)[1], "/etc/store/store.conf"
    )
