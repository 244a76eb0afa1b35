"""Which files differ between two releases' layers, and what that means for units. Part of the node's own code."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from typing import Any

NODE_FILE = "etc/samepage/node.json"
_PIECE = 1 << 18


def changed_paths(old: str, new: str, prefix: str = "") -> set[str]:
    """Paths that differ between two mounted trees in kind, owner, mode or content; `prefix` is where they are mounted.

    Times do not count. A folder that only one tree has is told by what is in it.
    """
    found: set[str] = set()
    _compare(old, new, "", found)
    return {f"{prefix}/{path}" for path in found}


def _compare(old: str, new: str, path: str, found: set[str]) -> None:
    before, after = (_entries(os.path.join(root, path)) for root in (old, new))
    for name in before.keys() | after.keys():
        inside = f"{path}/{name}" if path else name
        one, two = before.get(name), after.get(name)
        if one is None or two is None:
            only = old if one is not None else new
            _all(only, inside, found)
        elif stat.S_ISDIR(one.st_mode) and stat.S_ISDIR(two.st_mode):
            if _owner(one) != _owner(two):
                found.add(inside)
            _compare(old, new, inside, found)
        elif _owner(one) != _owner(two) or one.st_size != two.st_size or _differs(old, new, inside, one):
            found.add(inside)


def _entries(folder: str) -> dict[str, os.stat_result]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def _owner(one: os.stat_result) -> tuple[int, int, int]:
    return one.st_mode, one.st_uid, one.st_gid


def _all(root: str, path: str, found: set[str]) -> None:
    whole = os.path.join(root, path)
    if os.path.islink(whole) or not os.path.isdir(whole):
        found.add(path)
        return
    for name in os.listdir(whole):
        _all(root, f"{path}/{name}", found)


def _differs(old: str, new: str, path: str, one: os.stat_result) -> bool:
    before, after = os.path.join(old, path), os.path.join(new, path)
    if stat.S_ISLNK(one.st_mode):
        return os.readlink(before) != os.readlink(after)
    if not stat.S_ISREG(one.st_mode):
        return False
    with open(before, "rb", buffering=0) as left, open(after, "rb", buffering=0) as right:
        while True:
            part = left.read(_PIECE)
            if part != right.read(_PIECE):
                return True
            if not part:
                return False


# --- the node's description ------------------------------------------------------------------------------------------


def read_node(root: str) -> dict[str, Any]:
    """node.json of a mounted config layer, or of the running system with root "/". Empty where there is none."""
    try:
        with open(os.path.join(root, NODE_FILE), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recipes_of(node: Mapping[str, Any], units: Collection[str]) -> set[str]:
    known = node.get("units", {})
    return {str(known[unit].get("recipe")) for unit in units if unit in known}


def concerns_data(nodes: Collection[Mapping[str, Any]], units: Mapping[str, str]) -> bool:
    """Whether one of the units that start, stop or reload anew belongs to a recipe that keeps data."""
    moved = {unit for unit, action in units.items() if action != "none"}
    return any(recipes_of(node, moved) & set(node.get("data", ())) for node in nodes)
