"""The product's manual says what its sources do."""

from __future__ import annotations

import re
from pathlib import Path

from samepage import rpc

RECIPE = Path(__file__).parents[2] / "recipes" / "samepage"
MANUAL = (RECIPE / "README.md").read_text()
SOURCES = RECIPE / "files" / "opt" / "samepage" / "lib" / "samepage"


def parameters(text: str) -> list[str]:
    """Names of a handler's parameters but the first."""
    return re.findall(r"(\w+): ", text)[1:]


def test_every_method_is_described_with_its_parameters() -> None:
    methods: dict[str, str] = {}
    for file in (SOURCES / "methods").glob("*.py"):
        found = re.findall(r'@method\("([\w.]+)"[^\n]*\)\n(?:async )?def \w+\(([^\n]*)\) -> Any:', file.read_text())
        methods |= {name: ", ".join(parameters(signature)) for name, signature in found}
    described = dict(re.findall(r"^\| `(\w+\.\w+)` \| ([^|]*?) ?\|", MANUAL, re.MULTILINE))
    assert described == methods
    assert len(methods) == 17


def test_every_error_code_is_described() -> None:
    codes = {value for name, value in vars(rpc).items() if name.isupper() and isinstance(value, int)}
    table = MANUAL[MANUAL.index("| code | meaning |") :]
    assert {int(code) for code in re.findall(r"-32\d\d\d", table)} >= codes
