"""Rendered trees on the host: written out for people, and kept from the last build to compare with."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from appliance.model import RenderedFile, RenderedTree

Kept = Mapping[str, Mapping[str, Any]]


def write_tree(tree: RenderedTree, folder: Path) -> None:
    """Writes the files below the folder, as the user who runs the builder; numeric owners are not applied."""
    for file in (*tree.config, *tree.app):
        target = folder / file.path.lstrip("/")
        if file.path.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if file.link:
            target.symlink_to(file.link)
        else:
            target.write_bytes(file.content)
            target.chmod(file.mode | 0o200)


def keep(tree: RenderedTree, state: Path, layout: str) -> None:
    """Remembers the tree as the last one built; does nothing when it is the same."""
    file = _file(state, layout, tree.node)
    text = json.dumps({entry.path: _plain(entry) for entry in (*tree.config, *tree.app)}, sort_keys=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)


def read_last(state: Path, layout: str, node: str) -> Kept | None:
    """What `keep` remembered, or None."""
    try:
        kept: Kept = json.loads(_file(state, layout, node).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return kept


def difference(last: Kept, tree: RenderedTree) -> Iterator[str]:
    """Unified differences from the last build to the tree, files by path."""
    now = {entry.path: _plain(entry) for entry in (*tree.config, *tree.app)}
    for path in sorted(last.keys() | now.keys()):
        old, new = last.get(path), now.get(path)
        if old == new:
            continue
        yield from difflib.unified_diff(_lines(old), _lines(new), f"last{path}", f"{tree.node}{path}", lineterm="", n=3)


def _plain(file: RenderedFile) -> dict[str, Any]:
    return {
        "mode": f"{file.mode:04o}", "owner": f"{file.uid}:{file.gid}", "link": file.link,
        "content": file.content.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode(),
    }  # fmt: skip


def _lines(entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return []
    head = f"(mode {entry['mode']}, owner {entry['owner']}" + (f", link to {entry['link']})" if entry["link"] else ")")
    return [head, *str(entry["content"]).splitlines()]


def _file(state: Path, layout: str, node: str) -> Path:
    return state / "rendered" / f"{layout}-{node}.json"
