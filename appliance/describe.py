"""Describes a layout: as plain values for --json, and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from appliance.model import Model, Node


def describe(model: Model) -> dict[str, Any]:
    """Nodes, components, ports, users, memory and endpoints of a layout, ready for JSON."""
    return {
        "layout": model.name,
        "summary": model.summary,
        "version": model.version,
        "schema_level": max((recipe.schema_level for recipe in model.recipes), default=0),
        "packages": sorted({package for recipe in model.recipes for package in recipe.packages}),
        "users": [
            {
                "name": user.name,
                "uid": user.uid,
                "recipe": recipe.name,
                "groups": list(user.groups),
                "group_only": user.group_only,
            }
            for recipe in model.recipes
            for user in recipe.users
        ],
        "nodes": [_node(node) for node in model.nodes],
    }


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "address": f"{node.address}/{node.prefix}" if node.address else "dhcp",
        "memory": node.memory,
        "components": [
            {
                "recipe": recipe.name,
                "summary": recipe.summary,
                "memory": node.shares[recipe.name],
                "minimum": recipe.memory.minimum,
                "units": [unit.name for unit in recipe.units],
                "probes": [probe.name for probe in recipe.health],
            }
            for recipe in node.recipes
        ],
        "ports": [
            {
                "number": port.number,
                "protocol": port.protocol,
                "exposure": port.exposure,
                "name": port.name,
                "recipe": recipe.name,
            }
            for recipe in node.recipes
            for port in recipe.ports
        ],
        "endpoints": [
            {
                "name": one.name,
                "provider": one.provider,
                "local": one.local,
                "host": one.host,
                "port": one.port,
                "socket": one.socket,
            }
            for one in node.endpoints.values()
        ],
    }


def as_text(layout: dict[str, Any]) -> str:
    """What `describe` returned, for reading."""
    lines = [f"{layout['layout']}: {layout['summary']}"]
    for node in layout["nodes"]:
        lines += ["", f"node {node['name']}: {node['address']}, {node['memory']} MiB"]
        lines += _table(("component", "memory", "probes", ""), _components(node))
        lines += _table(("port", "exposure", "component", "name"), _ports(node))
        lines += _table(("endpoint", "provider", "reached at"), _endpoints(node))
    users = sorted(layout["users"], key=lambda user: user["uid"])
    lines += [
        "",
        *_table(("uid", "user", "component"), ((str(user["uid"]), user["name"], user["recipe"]) for user in users)),
    ]
    lines += ["", f"{len(layout['packages'])} packages named by the recipes; schema level {layout['schema_level']}"]
    return "\n".join(lines)


def _components(node: dict[str, Any]) -> Iterable[Sequence[str]]:
    for one in node["components"]:
        yield one["recipe"], f"{one['memory']} MiB", str(len(one["probes"])), one["summary"]


def _ports(node: dict[str, Any]) -> Iterable[Sequence[str]]:
    for port in sorted(node["ports"], key=lambda port: port["number"]):
        yield f"{port['number']}/{port['protocol']}", port["exposure"], port["recipe"], port["name"]


def _endpoints(node: dict[str, Any]) -> Iterable[Sequence[str]]:
    for one in node["endpoints"]:
        yield one["name"], one["provider"], one["socket"] or f"{one['host']}:{one['port']}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns, indented, with a heading; nothing when there are no rows."""
    body = [list(row) for row in rows]
    if not body:
        return []
    widths = [max(len(row[column]) for row in [list(head), *body]) for column in range(len(head))]
    cells = [["", *(text.ljust(width) for text, width in zip(row, widths, strict=True))] for row in [head, *body]]
    return ["", *("  ".join(row).rstrip() for row in cells)]
