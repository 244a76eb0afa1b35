"""The first stages in a row: reads a project and says everything that is wrong with it in one run."""

from __future__ import annotations

from pathlib import Path

from appliance.errors import Faults, InputError
from appliance.layout import load_layout
from appliance.model import Model, RenderedTree
from appliance.recipes import load_recipes
from appliance.render import render_tree


def check_project(project: Path, layout: str, version: str) -> tuple[Model, tuple[RenderedTree, ...]]:
    """The validated model and the rendered tree of each node. Raises InputError with the faults of all stages."""
    faults = Faults()
    project = project.resolve()
    recipes = load_recipes(project, faults)
    model = load_layout(project, layout, recipes, faults, version)
    trees = tuple(render_tree(model, node, faults) for node in model.nodes) if model else ()
    faults.check()
    if model is None:
        raise InputError(())  # never: no model without a fault
    return model, trees
