"""Every kind of broken tree gives its complete message: file, line, key, what is wrong and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Golden
from trees import BROKEN, layout_of

from appliance.check import check_project
from appliance.errors import InputError


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tree(kind: str, project: Path, golden: Golden) -> None:
    for change in BROKEN[kind]:
        change(project)
    with pytest.raises(InputError) as caught:
        check_project(project, layout_of(kind), "1.0")
    golden(f"broken/{kind}.txt", f"{caught.value}\n")
    assert caught.value.status == 2


def test_every_golden_file_has_its_kind() -> None:
    files = {file.stem for file in (Path(__file__).parent / "broken").glob("*.txt")}
    assert files == set(BROKEN)
