"""Finds what two recipes both claim, and names that nothing defines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from appliance.accounts import STATIC_GROUPS, STATIC_USERS, group_ids, user_ids
from appliance.errors import Faults, nearest
from appliance.model import Model, Node, Ownership, Place, Recipe, StateDir, User
from appliance.yamlfile import add_fault


@dataclass(slots=True)
class _Claims:
    """What has been claimed so far, and by whom; `where` ends the message, as ' on node x'."""

    faults: Faults
    where: str
    taken: dict[Any, tuple[str, Place]] = field(default_factory=dict)

    def claim(self, key: Any, recipe: str, place: Place, what: str) -> None:
        holder, first = self.taken.setdefault(key, (recipe, place))
        if first is place or first == place:
            return
        line = f":{first.line}" if first.line else ""
        whose = f"by the recipe {holder!r} too" if holder != recipe else "twice"
        message = f"{what} is claimed by the recipe {recipe!r} and {whose}{self.where}"
        add_fault(self.faults, place, message, f"the other claim is in {first.file}{line}")


def find_collisions(model: Model, whole: bool, faults: Faults) -> None:
    """Adds a fault for every collision, at the later of the two claims.

    `whole` is false where recipes of the layout could not be read; they may hold the names that are missing.
    """
    for node in model.nodes:
        _node_collisions(node, faults)
    _accounts(model.recipes, faults)
    if whole:
        _references(model.recipes, faults)
    app = _Claims(faults, "")
    for recipe in model.recipes:
        for source in recipe.sources:
            if not source.target.startswith("/etc/"):
                app.claim(source.target, recipe.name, source.place, f"the file {source.target}")
    _file_as_folder(app, faults)


def _node_collisions(node: Node, faults: Faults) -> None:
    where = f", on the node {node.name!r}"
    claims = _Claims(faults, where)
    files = _Claims(faults, where)
    for recipe in node.recipes:
        for port in recipe.ports:
            what = f"the port {port.number}/{port.protocol}"
            if port.number:  # 0: not a valid number, which is a fault already
                claims.claim(("port", port.number, port.protocol), recipe.name, port.place, what)
        for endpoint in recipe.provides:
            claims.claim(("endpoint", endpoint.name), recipe.name, endpoint.place, f"the endpoint {endpoint.name!r}")
            if endpoint.socket:
                claims.claim(("socket", endpoint.socket), recipe.name, endpoint.place, f"the socket {endpoint.socket}")
        for unit in recipe.units:
            claims.claim(("unit", unit.name), recipe.name, unit.place, f"the unit {unit.name}")
        for state in recipe.state:
            claims.claim(("state", state.path), recipe.name, state.place, f"the state folder {state.path}")
        for source in recipe.sources:
            if source.target.startswith("/etc/"):
                files.claim(source.target, recipe.name, source.place, f"the file {source.target}")
    for recipe in node.recipes:
        for name in recipe.mask:
            claims.claim(("unit", name), recipe.name, recipe.places[f"mask.{name}"], f"the unit {name} (masked here)")
    _file_as_folder(files, faults)


def _file_as_folder(files: _Claims, faults: Faults) -> None:
    """A path cannot be a file for one recipe and a folder for another."""
    for target, (recipe, place) in files.taken.items():
        parts = target.split("/")
        for length in range(2, len(parts)):
            parent = files.taken.get("/".join(parts[:length]))
            if parent:
                message = f"{target} of the recipe {recipe!r} lies in a file of the recipe {parent[0]!r}"
                add_fault(faults, place, message, f"that file is {parent[1].file}")


def _accounts(recipes: tuple[Recipe, ...], faults: Faults) -> None:
    """Users are the same on every node: the nodes share their base layer."""
    numbers = _Claims(faults, "")
    names: dict[str, tuple[str, User]] = {}
    for recipe in recipes:
        for user in recipe.users:
            holder, first = names.setdefault(user.name, (recipe.name, user))
            if first is user:
                if user.uid:  # 0: not a valid number, which is a fault already
                    numbers.claim(user.uid, recipe.name, user.place, f"the uid {user.uid}")
                if user.name in STATIC_USERS | STATIC_GROUPS:
                    add_fault(
                        faults, user.place, f"{user.name!r} is a static user or group of Debian", "leave the entry out"
                    )
            elif _definition(first) != _definition(user):
                message = f"the user {user.name!r} is defined differently by the recipes {recipe.name!r} and {holder!r}"
                add_fault(
                    faults, user.place, message, f"the other definition is in {first.place.file}:{first.place.line}"
                )


def _definition(user: User) -> tuple[object, ...]:
    return user.uid, user.home, user.groups, user.group_only


def _references(recipes: tuple[Recipe, ...], faults: Faults) -> None:
    """Every owner and group that a recipe names must exist."""
    users, groups = user_ids(recipes), group_ids(recipes)

    def check(place: Place, what: str, name: str, valid: Mapping[str, int]) -> None:
        if name not in valid:
            hint = nearest(name, valid, "a recipe of the layout must define it under users")
            add_fault(faults, place, f"there is no {what} {name!r}", hint)

    for recipe in recipes:
        for user in recipe.users:
            for group in user.groups:
                check(user.place, "group", group, groups)
        owners: tuple[StateDir | Ownership, ...] = (*recipe.state, *recipe.ownership)
        for owned in owners:
            check(owned.place, "user", owned.owner, users)
            check(owned.place, "group", owned.group, groups)
