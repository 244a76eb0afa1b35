"""Keeps a rendered tree on disk and compares two of them.

On disk a tree is a folder: `tree.json` (owner, mode, link and source of every path) and the files under `root/`.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.errors import ApplianceError
from appliance.model import RenderedFile, RenderedTree


def write_tree(tree: RenderedTree, folder: Path) -> None:
    """Write a tree into `folder`, replacing what an earlier call wrote there."""
    root = folder / "root"
    if root.exists():
        shutil.rmtree(root)
    index: dict[str, Any] = {"node": tree.node, "config": [], "app": []}
    for layer, files in (("config", tree.config), ("app", tree.app)):
        for file in files:
            index[layer].append(
                {name: getattr(file, name) for name in ("path", "uid", "gid", "recipe", "source", "link")}
                | {"mode": f"{file.mode:04o}"}
            )
            path = root / file.path.strip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.path.endswith("/"):
                path.mkdir(exist_ok=True)
            elif file.link:
                path.symlink_to(file.link)
            else:
                path.write_bytes(file.content)
    (folder / "tree.json").write_text(json.dumps(index, indent=1) + "\n")


def read_tree(folder: Path) -> RenderedTree:
    """The tree that `write_tree` left in `folder`. Raises ApplianceError when there is none."""
    try:
        index = json.loads((folder / "tree.json").read_text())
        layers = {layer: tuple(_read(folder / "root", entry) for entry in index[layer]) for layer in ("config", "app")}
        return RenderedTree(index["node"], layers["config"], layers["app"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ApplianceError(f"{folder} holds no rendered tree: {error}", hint="render one there first") from error


def _read(root: Path, entry: dict[str, Any]) -> RenderedFile:
    holds = not entry["link"] and not entry["path"].endswith("/")
    content = (root / entry["path"].strip("/")).read_bytes() if holds else b""
    return RenderedFile(content=content, **(entry | {"mode": int(entry["mode"], 8)}))


def diff_trees(old: RenderedTree, new: RenderedTree) -> str:
    """A unified diff from one tree to another, with lines for changed mode, owner and link; empty if they are alike."""
    before = {file.path: file for file in (*old.config, *old.app)}
    after = {file.path: file for file in (*new.config, *new.app)}
    return "".join(line for path in sorted(before | after) for line in _diff(path, before.get(path), after.get(path)))


def _diff(path: str, old: RenderedFile | None, new: RenderedFile | None) -> Iterator[str]:
    a = f"a{old.path}" if old else "/dev/null"
    b = f"b{new.path}" if new else "/dev/null"
    if attributes(old) != attributes(new):
        yield f"# {path}: {attributes(old) or 'absent'} -> {attributes(new) or 'absent'}\n"
    before, after = (file.content if file else b"" for file in (old, new))
    if before == after:
        return
    try:
        lines = before.decode().splitlines(keepends=True), after.decode().splitlines(keepends=True)
    except UnicodeDecodeError:
        yield f"# {a} and {b} differ ({len(before)} and {len(after)} bytes, not text)\n"
        return
    for line in difflib.unified_diff(*lines, a, b):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def attributes(file: RenderedFile | None) -> str:
    """Mode and owner, or where a link points to; empty for no file."""
    if file is None:
        return ""
    return f"link to {file.link}" if file.link else f"{file.mode:04o} {file.uid}:{file.gid}"
