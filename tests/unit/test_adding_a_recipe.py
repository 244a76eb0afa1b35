"""docs/adding-a-recipe.md is done word for word in a copy of the project."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from appliance.check import check_project

PROJECT = Path(__file__).parents[2]
BLOCK = re.compile(r"^`([^`\n]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAYOUT = "recipes/layouts/private-cloud.yaml"


def blocks() -> dict[str, str]:
    """Every file that the page shows: name -> content."""
    return dict(BLOCK.findall((PROJECT / "docs" / "adding-a-recipe.md").read_text()))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project as the page's reader has it after writing all files."""
    for folder in ("recipes", "appliance"):
        shutil.copytree(
            PROJECT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name, content in blocks().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_page_shows_a_complete_recipe() -> None:
    folder = "recipes/node-exporter/"
    assert {name.removeprefix(folder).partition("/")[0] for name in blocks() if name != LAYOUT} == {
        "recipe.yaml", "README.md", "templates", "checks",
    }  # fmt: skip
    assert not (PROJECT / folder).exists()


def test_it_changes_nothing_but_one_name_in_a_layout() -> None:
    assert [name for name in blocks() if (PROJECT / name).exists()] == [LAYOUT]
    before, after = (yaml.safe_load(text) for text in ((PROJECT / LAYOUT).read_text(), blocks()[LAYOUT]))
    before["nodes"]["samepage"]["recipes"].append("node-exporter")
    assert before == after


def test_it_checks_and_renders(copy: Path) -> None:
    model, (tree,) = check_project(copy, "private-cloud", "1.0")
    files = {file.path: file.content.decode() for file in tree.config if file.recipe == "node-exporter"}
    assert files["/etc/default/prometheus-node-exporter"] == (
        'ARGS="--web.listen-address=127.0.0.1:9100 --collector.disable-defaults --collector.cpu --collector.diskstats'
        ' --collector.filesystem --collector.loadavg --collector.meminfo --collector.netdev"\n'
    )
    assert "MemoryMax=48M" in files["/etc/systemd/system/prometheus-node-exporter.service.d/samepage.conf"]
    assert files["/etc/tmpfiles.d/samepage-node-exporter.conf"] == "d /var/lib/prometheus 0750 830 830 - -\n"
    probes = json.loads(files["/etc/samepage/health.d/node-exporter.json"])["probes"]
    assert probes[0]["target"] == "http://127.0.0.1:9100/metrics"
    assert model.nodes[0].shares["node-exporter"] == 48


def test_on_several_nodes_it_listens_for_those_that_need_it(copy: Path) -> None:
    layout = copy / "recipes/layouts/qa-cloud.yaml"
    layout.write_text(layout.read_text().replace("node-tools]", "node-tools, node-exporter]", 1))
    web = copy / "recipes/postgresql/recipe.yaml"
    web.write_text(web.read_text() + "needs: [metrics]\n")
    _, trees = check_project(copy, "qa-cloud", "1.0")
    texts = [file.content.decode() for file in trees[0].config if file.path == "/etc/default/prometheus-node-exporter"]
    assert "--web.listen-address=:9100" in texts[0]


def test_its_checks_are_python() -> None:
    source = blocks()["recipes/node-exporter/checks/test_node_exporter.py"]
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert len(names) == 3
    assert all(name.startswith("test_") for name in names)
