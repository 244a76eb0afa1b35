"""Renders the files of a node's config layer and of the app layer.

The config layer (/etc) is one node's own. The app layer (/opt/samepage) is the same on every node: its templates see
only what does not depend on the node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from appliance.accounts import group_ids, user_ids
from appliance.errors import Faults
from appliance.generated import generated_files
from appliance.model import Model, Node, Port, Probe, Recipe, RenderedFile, RenderedTree, Source
from appliance.templates import TemplateText, render_text

_UNIT_FILE = re.compile(
    r"/etc/systemd/.+\.(service|socket|target|timer|path|mount|automount|slice|swap|network|netdev|link|conf)"
)
_SECTION = re.compile(r"\[[A-Za-z0-9 -]+\]")


def render(model: Model, node: Node) -> RenderedTree:
    """The rendered files of one node. Raises InputError with every fault of every template."""
    faults = Faults()
    tree = render_tree(model, node, faults)
    faults.check()
    return tree


def render_tree(model: Model, node: Node, faults: Faults) -> RenderedTree:
    """Like `render`, but adds to faults that others have found too. With faults the tree is not complete."""
    config: dict[str, RenderedFile] = {}
    probes: dict[str, list[Probe]] = {}
    for recipe in node.recipes:
        variables = node_variables(model, node, recipe)
        probes[recipe.name] = [_rendered_probe(probe, variables, faults) for probe in recipe.health]
        config |= _rendered_sources(model, recipe, "/etc/", variables, faults)
    app: dict[str, RenderedFile] = {}
    for recipe in model.recipes:
        app |= _rendered_sources(model, recipe, "/opt/", app_variables(model, recipe), faults)
    generated = {file.path: file for file in generated_files(model, node, config | app, probes)}
    for path in sorted(generated.keys() & config.keys()):
        message = f"{path} is made by the builder, from {generated[path].source}"
        faults.add(config[path].source, 0, "", message, "leave the file out")
    return RenderedTree(node.name, _sorted(config | generated), _sorted(app))


def app_variables(model: Model, recipe: Recipe) -> dict[str, Any]:
    """What a template of the app layer sees."""
    return {
        "layout": model.name,
        "recipe": recipe.name,
        "settings": model.settings[recipe.name],
        "ports": {port.name: port.number for port in recipe.ports},
        "users": {user.name: user.uid for other in model.recipes for user in other.users},
    }


def node_variables(model: Model, node: Node, recipe: Recipe) -> dict[str, Any]:
    """What a template of the config layer and a health probe see. docs/recipe-format.md describes each."""
    own = {*recipe.needs, *(endpoint.name for endpoint in recipe.provides)}
    ports = [(other, port) for other in node.recipes for port in other.ports]
    peers = [peer for peer in model.nodes if peer.name != node.name]
    return app_variables(model, recipe) | {
        "node": _node(node),
        "peers": [_node(peer) for peer in peers],
        "memory": node.shares[recipe.name],
        "endpoints": {name: asdict(endpoint) for name, endpoint in node.endpoints.items() if name in own},
        "all_recipes": [other.name for other in node.recipes],
        "open_ports": [_port(other, port) for other, port in ports if port.exposure == "public"],
        "cluster_ports": _cluster_ports(node, ports, peers),
    }


def _node(node: Node) -> dict[str, Any]:
    return {name: getattr(node, name) for name in ("name", "address", "prefix", "memory")}


def _port(recipe: Recipe, port: Port) -> dict[str, Any]:
    return {"number": port.number, "protocol": port.protocol, "name": port.name, "recipe": recipe.name}


def _cluster_ports(node: Node, ports: list[tuple[Recipe, Port]], peers: list[Node]) -> list[dict[str, Any]]:
    """The ports that recipes on other nodes use, each with the addresses of those nodes."""
    found = []
    for recipe, port in ports:
        offered = [endpoint.name for endpoint in recipe.provides if endpoint.port == port.name]
        users = [peer.address for peer in peers if any(_reaches(peer, name, node) for name in offered)]
        if users and port.exposure == "cluster":
            found.append(_port(recipe, port) | {"peers": users})
    return found


def _reaches(peer: Node, endpoint: str, node: Node) -> bool:
    found = peer.endpoints.get(endpoint)
    return found is not None and not found.local and found.host == node.address


def _rendered_probe(probe: Probe, variables: Mapping[str, Any], faults: Faults) -> Probe:
    place = replace(probe.place, key=f"{probe.place.key}.{probe.kind}")
    target = render_text(TemplateText(probe.target, place), variables, faults)
    return replace(probe, target=target or "")


def _rendered_sources(
    model: Model, recipe: Recipe, root: str, variables: Mapping[str, Any], faults: Faults
) -> dict[str, RenderedFile]:
    users, groups = user_ids(model.recipes), group_ids(model.recipes)
    owned = {one.path: one for one in recipe.ownership}
    found: dict[str, RenderedFile] = {}

    def put(path: str, content: bytes, mode: int, source: str, link: str = "") -> None:
        one = owned.get(path)
        uid, gid = (users.get(one.owner, 0), groups.get(one.group, 0)) if one else (0, 0)
        mode = mode if one is None or one.mode is None else one.mode
        found[path] = RenderedFile(path, content, mode, uid, gid, recipe.name, source, link)

    for source in recipe.sources if recipe.readable else ():
        if source.target.startswith(root):
            content = b"" if source.link else _content(source, variables, faults)
            if content is not None:
                mode = 0o777 if source.link else 0o755 if source.executable else 0o644
                put(source.target, content, mode, source.place.file, source.link)
    for path in owned:
        if path.startswith(root) and path.endswith("/"):
            put(path, b"", 0o755, recipe.place.file)
    return found


def _content(source: Source, variables: Mapping[str, Any], faults: Faults) -> bytes | None:
    """The bytes of a file, or None after a fault."""
    try:
        content = source.path.read_bytes()
        text = content.decode() if source.template else ""
    except OSError as error:
        faults.add(source.place.file, 0, "", f"cannot be read: {error.strerror}")
        return None
    except UnicodeDecodeError as error:
        faults.add(source.place.file, content.count(b"\n", 0, error.start) + 1, "", "is not UTF-8 text")
        return None
    if source.template:
        rendered = render_text(TemplateText(text, source.place), variables, faults)
        if rendered is None:
            return None
        content = rendered.encode()
    lines = content.decode("utf-8", "replace").split("\n")
    for number, message in _malformed(source.target, content, lines):
        wrong = lines[number - 1].strip() if number else ""
        if source.template and number:  # the template's line, where it holds the wrong one as it is
            number = next((n for n, line in enumerate(text.split("\n"), 1) if line.strip() == wrong), 0)
        detail = f": {wrong}" if wrong else ""
        faults.add(source.place.file, number, "", f"gives {source.target}, {message}{detail}")
        return None
    return content


def _malformed(target: str, content: bytes, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Why the content does not fit the kind of file that the target's name promises, with the line (0: as a whole)."""
    if target.endswith(".json"):
        try:
            json.loads(content)
        except json.JSONDecodeError as error:
            yield error.lineno, f"which is not JSON ({error.msg})"
        except (ValueError, RecursionError):
            yield 0, "which is not JSON"
    if _UNIT_FILE.fullmatch(target):
        sections = []
        continued = False
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text.startswith(("#", ";")):
                continue
            if _SECTION.fullmatch(text):
                sections.append(text)
            elif text and not continued and ("=" not in text or not sections):
                yield number, "in which a line is neither a [Section] nor a Key=value of one"
            continued = line.endswith("\\")
        needed = "[Service]" if target.endswith(".service") else ""
        if not sections or (needed and needed not in sections):
            yield 0, f"which has no {needed or '[Section]'}"


def _sorted(files: Mapping[str, RenderedFile]) -> tuple[RenderedFile, ...]:
    return tuple(files[path] for path in sorted(files))
