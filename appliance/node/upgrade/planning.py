"""What leads from the running release to another one: how deep, what of units and data. Part of the node's own code."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from appliance.node.plan import classify, touched_units
from appliance.node.upgrade import changes, journal, mounts, records
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.node import Node
from appliance.node.upgrade.records import Held


class Plan(NamedTuple):
    """What will happen. `changed` are the paths that differ, of a live upgrade."""

    journal: Journal
    old: Held
    new: Held
    needs: str  # the class that the difference asks for; `journal.depth` may be deeper
    changed: frozenset[str] = frozenset()


def plan(
    node: Node, new: Held, *, action: str = "upgrade", apply: str = "auto", data: str = "keep", stop_before: str = ""
) -> Plan:
    """What leads from the running release to `new`. `data`: "restore" takes the data that `new` left behind.

    Raises OSError where layers cannot be looked at.
    """
    old = node.running
    needs = classify(old.manifest, new.manifest, node.name)
    restore = data == "restore" and new.data is not None
    least = "soft-reboot" if restore else "live"
    depth = max(needs, least, apply if apply in journal.CLASSES else "live", key=journal.CLASSES.index)
    units: Mapping[str, str] = {}
    changed: frozenset[str] = frozenset()
    with_data = True
    if needs in ("nothing", "live"):
        changed, units, nodes = _differences(node, old, new)
        schema = old.manifest.schema_level != new.manifest.schema_level
        with_data = depth != "live" or schema or changes.concerns_data(nodes, units)
    spare = max(records.data_numbers(node.root), default=0) + 1
    begun = Journal(
        state="plan", action=action, depth=depth, old=old.id, new=new.id, running_data=node.data,
        old_data=node.data if restore or not with_data else spare,
        new_data=spare if restore else node.data,
        spare_data=new.data or 0, with_data=with_data, started=int(time.time()), stop_before=stop_before,
        deadline=node.settings.trial_seconds, units=dict(units) if depth == "live" else {},
    )  # fmt: skip
    return Plan(begun, old, new, "live" if needs == "nothing" else needs, changed)


def _differences(
    node: Node, old: Held, new: Held
) -> tuple[frozenset[str], Mapping[str, str], list[Mapping[str, object]]]:
    """Paths that differ, what happens to units, and node.json of both; both releases have the same base."""
    before, after = node.layers(old), node.layers(new)
    kinds = [kind for kind in ("app", "config") if before[kind] != after[kind]]
    mounts.keep_config(node.trees(old))
    places = mounts.show(node.trees(new), kinds)
    try:
        changed: set[str] = set()
        other: Mapping[str, object] = node.description
        if "config" in places:
            changed |= changes.changed_paths(mounts.CONFIG, places["config"])
            other = changes.read_node(places["config"])
        if "app" in places:
            changed |= changes.changed_paths(mounts.APP, places["app"], mounts.APP)
        units = touched_units(node.description, other, changed)
        return frozenset(changed), units, [node.description, other]
    finally:
        mounts.hide()
