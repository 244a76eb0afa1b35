"""Reads a layout file and allots everything once per node: recipes, memory, endpoints and settings."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.collisions import find_collisions
from appliance.endpoints import Resolver
from appliance.errors import Faults, nearest
from appliance.model import Model, Node, Place, Recipe, frozen_map
from appliance.yamlfile import NAME, Fields, Value, add_fault, load_yaml, shown

BASE = "base"  # the recipe whose packages every node boots from


def layout_names(project: Path) -> tuple[str, ...]:
    """The layouts that the project has."""
    return tuple(sorted(path.stem for path in (project / "recipes" / "layouts").glob("*.yaml")))


def load_layout(project: Path, name: str, recipes: Mapping[str, Recipe], faults: Faults, version: str) -> Model | None:
    """The model of a layout, or None where its file cannot be read or places nothing.

    A model that came with faults serves only to find more of them.
    """
    file = project / "recipes" / "layouts" / f"{name}.yaml"
    if not re.fullmatch(NAME, name) or not file.is_file():
        faults.add("recipes/layouts", 0, "", f"there is no layout {name!r}", nearest(name, layout_names(project)))
        return None
    value = load_yaml(project, file, faults)
    if value is None:
        return None
    fields = Fields(value, faults)
    summary = fields.text("summary")
    missing: list[str] = [recipe.name for recipe in recipes.values() if not recipe.readable]
    nodes = [
        _node(node_name, node, recipes, missing)
        for node_name, node in fields.entries("nodes", NAME, "the name of a node", required=True)
    ]
    if fields.has("nodes") and not nodes:
        fields.fault("nodes", "a layout has at least one node")
    used = {recipe.name: recipe for node, _ in nodes for recipe in node.recipes}
    settings = _settings(fields.take("settings", False), recipes, used, faults) if nodes else {}
    fields.known.append("settings")
    fields.finish()
    if not nodes:
        return None
    resolver = Resolver([node for node, _ in nodes], recipes, not missing, faults)
    complete = tuple(
        replace(
            node,
            endpoints=frozen_map(resolver.resolve(node, place)),
            shares=frozen_map(share_memory(node.memory, node.recipes)),
            settings=frozen_map({recipe.name: settings[recipe.name] for recipe in node.recipes}),
        )
        for node, place in nodes
    )
    model = Model(
        name, version, complete, tuple(used[key] for key in sorted(used)), file, summary, frozen_map(settings)
    )
    validate(model, {node.name: place for node, place in nodes}, not missing, faults)
    return model


def validate(model: Model, places: Mapping[str, Place], whole: bool, faults: Faults) -> None:
    """What the model must fulfil as a whole.

    `places` says where each node stands in the layout file; `whole` is false where some of its recipes are missing.
    """
    addresses: dict[str, str] = {}
    for node in model.nodes:
        minimums = {recipe.name: recipe.memory.minimum for recipe in node.recipes if recipe.memory.minimum}
        if sum(minimums.values()) > node.memory > 0:
            parts = ", ".join(f"{name} {minimum}" for name, minimum in minimums.items())
            message = (
                f"the recipes need at least {sum(minimums.values())} MiB ({parts}); the node has {node.memory} MiB"
            )
            add_fault(faults, places[node.name], message)
        holder = addresses.setdefault(node.address, node.name)
        if node.address and holder != node.name:
            message = f"the address {node.address} belongs to the node {holder} already"
            add_fault(faults, places[node.name], message)
    find_collisions(model, whole, faults)


def share_memory(memory: int, recipes: Sequence[Recipe]) -> dict[str, int]:
    """MiB per recipe: its minimum, and its weight's part of what the minimums leave, rounded down.

    When the minimums exceed the memory each recipe has its minimum, and `validate` finds the fault.
    """
    spare = max(0, memory - sum(recipe.memory.minimum for recipe in recipes))
    weights = sum(recipe.memory.weight for recipe in recipes) or 1
    return {recipe.name: recipe.memory.minimum + spare * recipe.memory.weight // weights for recipe in recipes}


def _node(name: str, fields: Fields, recipes: Mapping[str, Recipe], missing: list[str]) -> tuple[Node, Place]:
    """A node without what is allotted later, and its place; names of recipes that do not exist go into `missing`."""
    chosen = []
    for item in fields.texts("recipes", r"\S+", "the name of a recipe", required=True):
        if item.data in recipes:
            chosen.append(recipes[item.data])
        else:
            missing.append(item.data)
            add_fault(fields.faults, item.place, f"there is no recipe {shown(item.data)}", nearest(item.data, recipes))
    if BASE not in [recipe.name for recipe in chosen] and BASE in recipes:
        fields.fault("recipes", f"the node lacks the recipe {BASE!r}, which every node boots from")
    address, prefix = _address(fields)
    node = Node(
        name=name,
        address=address,
        memory=fields.integer("memory", 128, 1_048_576),
        recipes=tuple(chosen),
        endpoints={},
        shares={},
        settings={},
        prefix=prefix,
    )
    return node, fields.place


def _address(fields: Fields) -> tuple[str, int]:
    """Address (empty for DHCP) and the length of its network part."""
    text = fields.text("address", "dhcp", what="dhcp or an IPv4 address")
    if text == "dhcp":
        return "", 24
    try:
        interface = ipaddress.IPv4Interface(text if "/" in text else f"{text}/24")
    except ValueError:
        fields.fault("address", f"{shown(text)} is neither dhcp nor an IPv4 address", "as 10.0.0.5 or 10.0.0.5/24")
        return "", 24
    return str(interface.ip), interface.network.prefixlen


# --- settings ------------------------------------------------------------------------------------------------------


def _settings(
    found: Value | None, recipes: Mapping[str, Recipe], used: Mapping[str, Recipe], faults: Faults
) -> dict[str, Mapping[str, Any]]:
    """The settings of every used recipe: its defaults with the layout's overrides."""
    result: dict[str, Mapping[str, Any]] = {name: recipe.settings for name, recipe in used.items()}
    if found is not None and not isinstance(found.data, Mapping):
        add_fault(faults, found.place, f"must be a mapping, not {found.kind}")
    elif found is not None:
        for name, overrides in found.data.items():
            if name not in recipes:
                add_fault(faults, overrides.place, f"there is no recipe {shown(name)}", nearest(name, used))
            elif name not in used:
                add_fault(faults, overrides.place, f"the recipe {name!r} is on no node of this layout")
            elif recipes[name].readable:
                result[name] = frozen_map(_override(result[name], overrides, faults))
    return result


def _override(default: Any, value: Value, faults: Faults) -> Any:
    """`value` where it has the type of `default`; mappings are merged key by key, and an empty one takes any."""
    if isinstance(default, Mapping) and default and isinstance(value.data, Mapping):
        merged = dict(default)
        for name, inner in value.data.items():
            if name in default:
                merged[name] = _override(default[name], inner, faults)
            else:
                add_fault(faults, inner.place, f"there is no setting {shown(name)}", nearest(name, default))
        return merged
    if type(value.data) is type(default) or (type(default) is float and type(value.data) is int):
        return value.plain()
    if default is not None:  # an empty default is a fault of the recipe
        kind = Value(default, value.place).kind
        add_fault(faults, value.place, f"must be of the type of the recipe's default, {kind}, not {value.kind}")
    return default
