"""What each real recipe renders in the private cloud: paths, modes, owners, and the content of what templates make."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.check import check_project
from appliance.model import RenderedFile, RenderedTree
from appliance.treefiles import attributes
from tests.conftest import Golden

PROJECT = Path(__file__).parents[2]
RECIPES = sorted(path.parent.name for path in PROJECT.glob("recipes/*/recipe.yaml"))


@pytest.fixture(scope="module")
def tree() -> RenderedTree:
    _, (tree,) = check_project(PROJECT, "private-cloud", "0.0")
    return tree


@pytest.mark.parametrize("recipe", [*RECIPES, ""])
def test_rendered_recipe(recipe: str, tree: RenderedTree, golden: Golden) -> None:
    files = [file for file in (*tree.config, *tree.app) if file.recipe == recipe and file.source.startswith("recipes/")]
    golden(f"rendered/{recipe or 'node'}.txt", "".join(map(shown, files)))


def test_every_golden_file_has_its_recipe() -> None:
    files = {file.stem for file in (Path(__file__).parent / "rendered").glob("*.txt")}
    assert files == {*RECIPES, "node"}


def shown(file: RenderedFile) -> str:
    """A heading, and the content where a template or the model decides it; what is copied is its own record."""
    heading = f"{file.path}  {attributes(file)}\n"
    if file.link or "/files/" in file.source:
        return heading
    return heading + "".join(f"    {line}".rstrip() + "\n" for line in file.content.decode().splitlines())
