"""Whether a release is good: the node's probes, and the front door. Part of the node's own code."""

from __future__ import annotations

from appliance.node.upgrade import changes, services

_DOOR_SECONDS = 60.0


class Failed(Exception):
    """The release is not good; the message says why."""


class Shut(Failed):
    """The front door has served nobody since it was held."""


def wait_healthy(seconds: float, *, behind_door: bool) -> None:
    """Wait until the node is healthy. Raises Failed with what is not. `behind_door`: the door's own probes wait."""
    description = changes.read_node("/")
    try:
        from appliance.node import health as probes

        recipes = probes.load_recipes()
        if behind_door:
            units = {door.unit for door in services.doors(description)}
            for name in changes.recipes_of(description, units):
                recipes.pop(name, None)
        found, _ = probes.wait_healthy(recipes, seconds)
    except Exception as error:  # the probes and their program may be another release's
        raise Failed(f"the probes cannot be run: {type(error).__name__}: {error}") from error
    if not found.healthy:
        bad = [f"{one.name}: {one.detail}" for one in found.outcomes() if not one.ok]
        lines = services.last_words(found.bad_units)
        raise Failed("\n".join([f"not healthy: {'; '.join(bad)}", *([lines] if lines else [])]))


def wait_open() -> None:
    """Wait until the front door serves. Raises Shut where it does not begin to."""
    for door in services.doors(changes.read_node("/")):
        if not services.wait_serving(door.unit, _DOOR_SECONDS):
            raise Shut(f"{door.unit} does not start\n{services.last_words([door.unit])}".rstrip())
