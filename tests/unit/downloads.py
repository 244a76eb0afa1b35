"""What the tests of downloads share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.node.upgrade.fetch import FetchError, fetch
from tests.webserver import CONTENT, SHA256, SIZE, Site


def get(site: Site, target: Path, **more: Any) -> str:
    values: dict[str, Any] = {"size": SIZE, "sha256": SHA256, "pause": 0, "timeout": 5.0} | more
    return fetch(f"{site.url}/a.bundle", str(target), **values)


def left(target: Path) -> set[str]:
    return {path.name.removeprefix(target.name) for path in target.parent.iterdir()}


def whole(target: Path) -> bool:
    """The file is there, and nothing else."""
    return target.read_bytes() == CONTENT and left(target) == {""}


def broken(site: Site, target: Path, cut: int = 1_000_000) -> None:
    """A run that ends after `cut` bytes."""
    site.cuts = [cut]
    with pytest.raises(FetchError):
        get(site, target, attempts=1)
    assert left(target) == {".partial", ".partial.json"}
    site.asked.clear()
