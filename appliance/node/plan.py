"""What an upgrade will do to a node, from the two releases' records. Part of the node's own code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from appliance.node.release import Manifest

UpgradeClass = Literal["nothing", "live", "soft-reboot", "reboot"]
Action = Literal["start", "stop", "reload", "restart", "none"]

UNITS = "/etc/systemd/system/"


def classify(old: Manifest, new: Manifest, node: str = "") -> UpgradeClass:
    """How deep the upgrade goes: the kernel, all of userspace, single units, or nothing that runs.

    Raises ReleaseError where a release has no layers for the node.
    """
    if (old.kernel.id, old.kernel.cmdline) != (new.kernel.id, new.kernel.cmdline):
        return "reboot"
    before, after = ({layer.kind: layer.digest for layer in one.layers_of(node)} for one in (old, new))
    if before["base"] != after["base"]:
        return "soft-reboot"
    return "live" if before != after else "nothing"


def touched_units(old: Mapping[str, Any], new: Mapping[str, Any], changed: Collection[str]) -> dict[str, Action]:
    """What a live upgrade does to units, by the two releases' node.json and the paths that differ; others run on.

    A unit reloads where it says so, but restarts where its own file changed.
    """
    before, after = (_units(one) for one in (old, new))
    found: dict[str, Action] = dict.fromkeys(before.keys() - after.keys(), "stop")
    for name, unit in after.items():
        if name not in before:
            found[name] = "start" if unit.get("enable", True) else "none"
            continue
        own = (UNITS + name, UNITS + name + ".d/")
        if any(path == own[0] or path.startswith(own[1]) for path in changed):
            found[name] = "none" if unit.get("on_change") == "none" else "restart"
        elif any(_concerns(str(watched), path) for watched in unit.get("files", ()) for path in changed):
            action = unit.get("on_change")
            found[name] = action if action in ("reload", "restart") else "none"
    return dict(sorted(found.items()))


def _units(node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    units = node.get("units", {})
    return dict(units) if isinstance(units, dict) else {}


def _concerns(watched: str, path: str) -> bool:
    return path.startswith(watched) if watched.endswith("/") else path == watched
