"""Reads recipes/<name>/recipe.yaml into frozen recipes. docs/recipe-format.md describes every key."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from appliance.errors import Faults, nearest
from appliance.model import (
    Endpoint,
    Exposure,
    Memory,
    OnChange,
    Ownership,
    Place,
    Port,
    Probe,
    ProbeKind,
    Recipe,
    Source,
    StateClass,
    StateDir,
    Unit,
    User,
    Wheel,
    frozen_map,
)
from appliance.sources import ROOTS, find_sources
from appliance.yamlfile import NAME, Fields, Value, add_fault, load_yaml, shown

_USER = r"[a-z_][a-z0-9_-]{0,30}"
_WORD = r"[a-z][a-z0-9_-]{0,62}"
_PACKAGE = r"[a-z0-9][a-z0-9+.-]+"
_PATH = r"(/[A-Za-z0-9@:._+-]+)+"
_FILE = r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*"
_GLOB = r"(/[A-Za-z0-9@:._+*?\[\]-]+)+/?"
_UNIT = r"[A-Za-z0-9@:._\\-]+\.(service|socket|target|timer|path|mount|automount|slice|swap)"
_SIGNAL = r"HUP|INT|QUIT|TERM|USR1|USR2|WINCH|CONT|TSTP"
_MODULE = r"(?!.*\.\.)[A-Za-z0-9_-]+(/[A-Za-z0-9_.-]+)*"
_PROBE_KINDS: tuple[ProbeKind, ...] = ("unit", "http", "tcp", "unix", "command")
_UNIT_FOLDER = "/etc/systemd/system/"


def load_recipes(project: Path, faults: Faults) -> dict[str, Recipe]:
    """Every recipe of the project by name. What is wrong goes into `faults`; a faulty recipe is there all the same."""
    root = project / "recipes"
    if not root.is_dir():
        faults.add("recipes", 0, "", "the project has no folder of recipes")
        return {}
    recipes = {}
    for folder in sorted(root.iterdir()):
        if folder.name == "layouts" or folder.name.startswith((".", "__")) or not folder.is_dir():
            continue
        if re.fullmatch(NAME, folder.name):
            recipes[folder.name] = load_recipe(project, folder, faults)
        else:
            faults.add(f"recipes/{folder.name}", 0, "", "a recipe's name is small letters, digits and '-'")
    return recipes


def load_recipe(project: Path, folder: Path, faults: Faults) -> Recipe:
    """One recipe from its folder."""
    file = folder / "recipe.yaml"
    value = load_yaml(project, file, faults)
    fields = Fields(
        value or Value({}, Place(file.relative_to(project).as_posix())), Faults() if value is None else faults
    )
    summary = fields.text("summary")
    ports = tuple(_ports(fields))
    users = tuple(_users(fields))
    include = _include(project, fields)
    build = _build(folder, fields)
    known = [path for path, _ in include.values()] + ([folder / build] if build else [])
    sources = find_sources(project, folder, include, known, faults)
    units = tuple(_units(fields, sources))
    needs = fields.texts("needs", _WORD, "the name of an endpoint")
    mask = fields.texts("mask", _UNIT, "the name of a unit")
    recipe = Recipe(
        name=folder.name,
        summary=summary,
        folder=folder,
        packages=tuple(item.data for item in fields.texts("packages", _PACKAGE, "the name of a Debian package")),
        wheels=tuple(_wheels(fields)),
        users=users,
        ports=ports,
        provides=tuple(_provides(fields, ports)),
        needs=tuple(item.data for item in needs),
        units=units,
        mask=tuple(item.data for item in mask),
        state=tuple(_state(fields)),
        memory=_memory(fields),
        health=tuple(_health(fields, units)),
        modules=tuple(item.data for item in fields.texts("modules", _MODULE, "a path below the kernel's modules")),
        settings=frozen_map(_settings(fields)),
        schema_level=fields.integer("schema_level", 0, 1_000_000, 0),
        place=fields.place,
        sources=sources,
        ownership=tuple(_ownership(fields, sources)),
        readable=value is not None,
        build=build,
        exclude=tuple(item.data for item in fields.texts("exclude", _GLOB, "an absolute path, with * for any text")),
        omit=tuple(item.data for item in fields.texts("omit", _PACKAGE, "the name of a Debian package")),
        places=frozen_map(
            {f"{key}.{item.data}": item.place for key, items in (("needs", needs), ("mask", mask)) for item in items}
        ),
    )
    fields.finish()
    return recipe


def _users(fields: Fields) -> Iterator[User]:
    for name, user in fields.entries("users", _USER, "the name of a user"):
        yield User(
            name=name,
            uid=user.integer("uid", 101, 999),
            home=user.text("home", "/nonexistent", pattern=_PATH + "|/", what="an absolute path"),
            groups=tuple(item.data for item in user.texts("groups", _USER, "the name of a group")),
            place=user.place,
            group_only=user.flag("group_only", False),
        )


def _ports(fields: Fields) -> Iterator[Port]:
    for name, port in fields.entries("ports", _WORD, "the name of a port"):
        yield Port(
            name=name,
            number=port.integer("port", 1, 65535),
            protocol="udp" if port.choice("protocol", ("tcp", "udp"), "tcp") == "udp" else "tcp",
            exposure=cast(Exposure, port.choice("exposure", ("public", "cluster", "local"), "local")),
            place=port.place,
        )


def _provides(fields: Fields, ports: tuple[Port, ...]) -> Iterator[Endpoint]:
    names = [port.name for port in ports]
    for name, endpoint in fields.entries("provides", _WORD, "the name of an endpoint"):
        port = endpoint.text("port", "", pattern=_WORD, what="the name of a port")
        socket = endpoint.text("socket", "", pattern=_PATH, what="an absolute path")
        if port and port not in names:
            endpoint.fault("port", f"the recipe has no port {port!r}", nearest(port, names))
        if not endpoint.has("port") and not endpoint.has("socket"):
            endpoint.fault(None, "an endpoint needs a port, a socket or both")
        yield Endpoint(name, port, socket, endpoint.place)


def _units(fields: Fields, sources: tuple[Source, ...]) -> Iterator[Unit]:
    targets = {source.target for source in sources}
    declared = []
    for name, unit in fields.entries("units", _UNIT, "the name of a unit"):
        file = _UNIT_FOLDER + re.sub(r"@.*\.", "@.", name)
        own = unit.flag("own", file in targets)
        watch = unit.texts("watch", _PATH + "/?", "an absolute path")
        if own and file not in targets:
            unit.fault("own", f"the recipe has no file {file[1:]} or {file[1:]}.j2 under files/ or templates/")
        for path in watch:
            if not any(target.startswith(path.data) for target in targets):
                add_fault(
                    unit.faults,
                    path.place,
                    f"no file of the recipe begins with {path.data}",
                    nearest(path.data, targets),
                )
        declared.append(file)
        yield Unit(
            name=name,
            on_change=cast(OnChange, unit.choice("on_change", ("reload", "restart", "none"), "restart")),
            enable=unit.flag("enable", True),
            own=own,
            place=unit.place,
            wanted_by=unit.text("wanted_by", "", pattern=_UNIT, what="the name of a unit"),
            watch=tuple(path.data for path in watch),
            hold=_hold(unit),
        )
    for source in sources:
        folder, name = posixpath.split(source.target)
        if (
            folder + "/" == _UNIT_FOLDER
            and not source.link
            and re.fullmatch(_UNIT, name)
            and source.target not in declared
        ):
            add_fault(
                fields.faults,
                source.place,
                f"the unit {name} is not declared",
                f"add it to units in {fields.place.file}",
            )


def _hold(unit: Fields) -> tuple[str, ...]:
    signals = tuple(name.data for name in unit.texts("hold", _SIGNAL, "a signal's name without SIG, such as WINCH"))
    if len(signals) not in (0, 2):
        unit.fault("hold", "two signals are needed: one that makes clients wait, and one that ends it")
    return signals


def _state(fields: Fields) -> Iterator[StateDir]:
    for path, state in fields.entries("state", _PATH, "an absolute path"):
        identity = path.startswith("/state/identity/")
        default = "identity" if identity else "data"
        kind = state.choice("class", ("data", "cache", "identity"), default)
        if not identity and not path.startswith("/var/"):
            state.fault(
                None,
                "state lies under /var or /state/identity",
                "what need not survive a boot is RuntimeDirectory= of a unit",
            )
        elif identity != (kind == "identity"):
            state.fault(
                "class",
                f"{path} cannot be of class {kind}",
                "data and cache lie under /var, identity under /state/identity",
            )
        owner = state.text("owner", "root", pattern=_USER, what="the name of a user")
        yield StateDir(
            path=path,
            owner=owner,
            group=state.text("group", owner, pattern=_USER, what="the name of a group"),
            mode=_mode(state, "0755") or 0,
            kind=cast(StateClass, kind),
            place=state.place,
        )


def _mode(fields: Fields, default: str) -> int | None:
    text = fields.text("mode", default, pattern="[0-7]{3,4}|", what='octal digits in quotes, as "0640"')
    return int(text, 8) if text else None


def _memory(fields: Fields) -> Memory:
    found = fields.take("memory", False)
    memory = Fields(found or Value({}, fields.place), fields.faults)
    result = Memory(memory.integer("weight", 0, 1000, 1), memory.integer("minimum", 0, 1_000_000, 0))
    memory.finish()
    return result


def _health(fields: Fields, units: tuple[Unit, ...]) -> Iterator[Probe]:
    names: dict[str, int] = {}
    for probe in fields.items("health"):
        name = probe.text("name", pattern=_WORD, what="the name of a probe")
        if names.setdefault(name, probe.place.line) != probe.place.line:
            probe.fault("name", f"the probe {name!r} stands twice; the first is in line {names[name]}")
        kinds = [kind for kind in _PROBE_KINDS if probe.has(kind)]
        targets = [probe.text(kind, "") for kind in _PROBE_KINDS]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            probe.fault(None, f"a probe has exactly one of {', '.join(_PROBE_KINDS)}, not {found}")
        kind = kinds[0] if kinds else "command"
        target = "".join(targets)
        if kind == "unit" and target and "{" not in target and target not in [unit.name for unit in units]:
            probe.fault("unit", f"the recipe has no unit {target!r}", nearest(target, [unit.name for unit in units]))
        if probe.has("expect") and len(kinds) == 1 and kind not in ("http", "command"):
            probe.fault("expect", f"has a meaning for http and command only, not for {kind}")
        if kind == "http":
            pattern = r"[1-5][0-9][0-9]( [^\n]+)?"
            expect = probe.text("expect", "200", pattern=pattern, what='a status in quotes, as "200" or "200 text"')
        else:
            expect = probe.text("expect", "")
        yield Probe(name, kind, target, expect, probe.number("timeout", 0.1, 300, 5.0), probe.place)


def _wheels(fields: Fields) -> Iterator[Wheel]:
    for wheel in fields.items("wheels"):
        requirement = wheel.text("requirement", pattern=r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", what='as "name==version"')
        yield Wheel(
            requirement, wheel.text("sha256", pattern="[0-9a-f]{64}", what="64 hexadecimal digits"), wheel.place
        )


def _settings(fields: Fields) -> dict[str, Any]:
    found = fields.take("settings", False)
    if found is None or not isinstance(found.data, dict):
        if found is not None:
            add_fault(fields.faults, found.place, f"must be a mapping, not {found.kind}")
        return {}
    for name, value in found.data.items():
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or hasattr(dict, name):
            add_fault(
                fields.faults,
                value.place,
                f"{shown(name)} is not the name of a setting",
                "small letters, digits and '_'",
            )
        elif value.data is None:
            add_fault(fields.faults, value.place, "has no value", "the default says what type an override must have")
    return cast(dict[str, Any], found.plain())


def _include(project: Path, fields: Fields) -> dict[str, tuple[Path, Place]]:
    """Target (absolute, without a final '/') -> folder of the project."""
    found = fields.take("include", False)
    result: dict[str, tuple[Path, Place]] = {}
    if found is not None and not isinstance(found.data, dict):
        add_fault(fields.faults, found.place, f"must be a mapping, not {found.kind}")
    elif found is not None:
        for name, value in found.data.items():
            target = "/" + name.strip("/")
            if posixpath.normpath(target) != target or not target.startswith(ROOTS):
                add_fault(fields.faults, value.place, f"{shown(name)} is not a folder under etc/ or opt/samepage/")
            elif not isinstance(value.data, str):
                add_fault(fields.faults, value.place, f"must be a folder of the project, not {value.kind}")
            elif not (project / value.data).resolve().is_relative_to(project.resolve()) or value.data.startswith("/"):
                add_fault(fields.faults, value.place, f"{value.data} leads out of the project")
            else:
                result[target] = (project / posixpath.normpath(value.data), value.place)
    return result


def _build(folder: Path, fields: Fields) -> str:
    """The recipe's own step of the base layer's build: an executable file of its folder."""
    name = fields.text("build", "", pattern=_FILE, what="the name of a file in the recipe's folder")
    if name and not (folder / name).is_file():
        fields.fault("build", f"the recipe has no file {name}")
    elif name and not os.access(folder / name, os.X_OK):
        fields.fault("build", f"{name} is not executable", f"chmod +x {fields.place.file.rpartition('/')[0]}/{name}")
    return name


def _ownership(fields: Fields, sources: tuple[Source, ...]) -> Iterator[Ownership]:
    targets = {source.target for source in sources if not source.link}
    folders = {posixpath.dirname(target) + "/" for target in targets}
    for path, owned in fields.entries("files", _PATH + "/?", "an absolute path"):
        if path not in targets and path not in folders and not path.endswith("/"):
            owned.fault(None, f"the recipe has no file {path}", nearest(path, targets))
        elif not path.startswith(ROOTS):
            owned.fault(None, f"{path} is not under /etc or /opt/samepage")
        owner = owned.text("owner", "root", pattern=_USER, what="the name of a user")
        group = owned.text("group", owner, pattern=_USER, what="the name of a group")
        yield Ownership(path, owner, group, _mode(owned, ""), owned.place)
