"""What several modules of unit tests start from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import Faults
from appliance.layout import load_layout
from appliance.model import Model
from appliance.recipes import load_recipes
from tests.webserver import Site, serving


@pytest.fixture
def model(project: Path) -> Model:
    """The first layout of the small project."""
    faults = Faults()
    recipes = load_recipes(project, faults)
    found = load_layout(project, next((project / "recipes/layouts").glob("*.yaml")).stem, recipes, faults, "1")
    faults.check()
    assert found is not None
    return found


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "incoming.bundle"
