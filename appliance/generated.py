"""The files of the config layer that come from the model itself: node.json, health.d, tmpfiles.d, links of units."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from appliance.accounts import group_ids, user_ids
from appliance.endpoints import needed_recipes
from appliance.model import Model, Node, Probe, Recipe, RenderedFile, Unit

UNITS = "/etc/systemd/system/"
_GATE = """# The front door of a release that is tried opens once it is found good.
[Unit]
After=samepage-upgrade-gate.service
"""
_USUAL_TARGET = {
    "timer": "timers.target",
    "socket": "sockets.target",
    "path": "paths.target",
    "mount": "local-fs.target",
}


def generated_files(
    model: Model, node: Node, rendered: Mapping[str, RenderedFile], probes: Mapping[str, Iterable[Probe]]
) -> Iterator[RenderedFile]:
    """`rendered` holds the node's other files by path, `probes` each recipe's probes with their templates rendered."""
    yield _file("/etc/samepage/node.json", _json(_node(model, node, rendered.values())), "", model)
    users, groups = user_ids(model.recipes), group_ids(model.recipes)
    for recipe in node.recipes:
        health = {
            "recipe": recipe.name,
            "needs": needed_recipes(recipe, node),
            "probes": [*map(_probe, probes[recipe.name])],
        }
        yield _file(f"/etc/samepage/health.d/{recipe.name}.json", _json(health), recipe.name, model)
        if recipe.state:
            folders = sorted(recipe.state, key=lambda state: state.path)
            lines = [
                f"d {one.path} {one.mode:04o} {users.get(one.owner, 0)} {groups.get(one.group, 0)} - -\n"
                for one in folders
            ]
            yield _file(f"/etc/tmpfiles.d/samepage-{recipe.name}.conf", "".join(lines), recipe.name, model)
        for unit in recipe.units:
            if unit.enable:
                yield from _enabling_links(recipe, unit, rendered)
            if unit.hold:
                yield _file(f"{UNITS}{unit.name}.d/samepage-gate.conf", _GATE, recipe.name, model)
                file = UNITS + unit.name if unit.own else f"/usr/lib/systemd/system/{unit.name}"
                yield _link(f"{UNITS}samepage-front-door.target.wants/{unit.name}", file, recipe)
        for name in recipe.mask:
            yield _link(UNITS + name, "/dev/null", recipe)


def _node(model: Model, node: Node, files: Iterable[RenderedFile]) -> dict[str, Any]:
    paths = {recipe.name: _changeable(recipe, files) for recipe in node.recipes}
    return {
        "name": node.name,
        "layout": model.name,
        "address": node.address or "dhcp",
        "memory": node.memory,
        "recipes": [recipe.name for recipe in node.recipes],
        "ports": [
            {
                "recipe": recipe.name,
                "name": port.name,
                "number": port.number,
                "protocol": port.protocol,
                "exposure": port.exposure,
            }
            for recipe in node.recipes
            for port in recipe.ports
        ],
        "units": {
            unit.name: {
                "recipe": recipe.name,
                "on_change": unit.on_change,
                "own": unit.own,
                "enable": unit.enable,
                "files": _watched(unit, paths[recipe.name]),
                **({"hold": list(unit.hold)} if unit.hold else {}),
            }
            for recipe in node.recipes
            for unit in recipe.units
        },
        "data": sorted(recipe.name for recipe in node.recipes if any(one.kind == "data" for one in recipe.state)),
        "schema_level": max((recipe.schema_level for recipe in model.recipes), default=0),
    }


def _changeable(recipe: Recipe, files: Iterable[RenderedFile]) -> list[str]:
    """The recipe's paths; an included folder counts as one path that ends in '/'."""
    groups = {source.target: source.group for source in recipe.sources}
    return sorted(
        {
            groups.get(file.path) or file.path
            for file in files
            if file.recipe == recipe.name and not file.path.endswith("/")
        }
    )


def _watched(unit: Unit, paths: list[str]) -> list[str]:
    """The paths whose change concerns the unit: not the unit files of the recipe's other units."""
    file = UNITS + unit.name
    template = UNITS + re.sub(r"@.*\.", "@.", unit.name)
    own = [path for path in paths if path in (file, template) or path.startswith((file + ".d/", template + ".d/"))]
    if unit.watch:
        return sorted({*own, *(path for path in paths if path.startswith(unit.watch))})
    return sorted({*own, *(path for path in paths if not path.startswith(UNITS))})


def _probe(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "kind": probe.kind,
        "target": probe.target,
        "expect": probe.expect,
        "timeout": probe.timeout,
    }


def _enabling_links(recipe: Recipe, unit: Unit, rendered: Mapping[str, RenderedFile]) -> Iterator[RenderedFile]:
    """What `systemctl enable` would make. The [Install] section of a Debian unit is not known here."""
    name = re.sub(r"@.*\.", "@.", unit.name)
    file = rendered.get(UNITS + name)
    install = read_install(file.content.decode("utf-8", "replace")) if file and not file.link else {}
    wanted = [unit.wanted_by] if unit.wanted_by else install.get("WantedBy", [])
    required = [] if unit.wanted_by else install.get("RequiredBy", [])
    if not wanted and not required and "Also" not in install and "Alias" not in install:
        wanted = [_USUAL_TARGET.get(unit.name.rpartition(".")[2], "multi-user.target")]
    target = UNITS + name if file else f"/usr/lib/systemd/system/{name}"
    for folder, owners in (("wants", wanted), ("requires", required)):
        for owner in owners:
            yield _link(f"{UNITS}{owner}.{folder}/{unit.name}", target, recipe)
    for alias in install.get("Alias", []):
        yield _link(UNITS + alias, target, recipe)


def read_install(text: str) -> dict[str, list[str]]:
    """The [Install] section of a unit file: key -> words."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line.strip()
        elif section == "[Install]" and "=" in line and not line.startswith(("#", ";")):
            key, _, words = line.partition("=")
            found.setdefault(key.strip(), []).extend(words.split())
    return found


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _file(path: str, text: str, recipe: str, model: Model) -> RenderedFile:
    source = f"recipes/{recipe}/recipe.yaml" if recipe else model.file.relative_to(model.project).as_posix()
    return RenderedFile(path, text.encode(), 0o644, 0, 0, recipe, source)


def _link(path: str, target: str, recipe: Recipe) -> RenderedFile:
    return RenderedFile(path, b"", 0o777, 0, 0, recipe.name, recipe.place.file, target)
