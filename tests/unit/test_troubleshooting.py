"""docs/troubleshooting.md explains every hint that the builder can give."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
GAP = "\0"  # stands for what is filled in at run time


def texts(node: ast.expr, names: Mapping[str, list[str]]) -> list[str]:
    """What an expression may read as, with gaps."""
    match node:
        case ast.Constant(value=str(value)):
            return [value]
        case ast.JoinedStr(values=values):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in values)]
        case ast.Name(id=name):
            return names.get(name, [])
        case ast.IfExp(body=body, orelse=other):
            return texts(body, names) + texts(other, names)
    return []


def hints(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each hint in a module: keyword arguments `hint`, and what follows "hint: " in a message."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.setdefault(node.targets[0].id, []).extend(texts(node.value, {}))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            for text in texts(node.value, names):
                yield node.value.lineno, text
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            for text in texts(node, {}):
                if "\n  hint: " in text:
                    yield node.lineno, text.partition("\n  hint: ")[2]


def test_every_hint_is_explained() -> None:
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split())
    missing = []
    for file in [ROOT / "build.py", *sorted((ROOT / "appliance").rglob("*.py"))]:
        if "node" in file.relative_to(ROOT).parts:
            continue
        for line, hint in hints(file):
            parts = [part.strip() for part in re.split(GAP, hint) if len(part.strip()) > 4]
            if parts and not all(" ".join(part.split()) in page for part in parts):
                missing.append(f"{file.relative_to(ROOT)}:{line}: {hint.replace(GAP, '...')}")
    assert not missing, "explain in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_the_finder_finds(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        'A = "one"\nf(hint=A)\nf(hint=f"two {x} three" if x else "four")\nfail(f"no {x}\\n  hint: five")\n'
    )
    assert {text for _, text in hints(module)} == {"one", f"two {GAP} three", "four", "five"}
