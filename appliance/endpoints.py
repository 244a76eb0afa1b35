"""Resolves endpoints: on the same node a socket or loopback, on another node its address and port."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.errors import Faults, nearest
from appliance.model import Endpoint, Node, Place, Recipe, Resolved
from appliance.yamlfile import add_fault


@dataclass(frozen=True, slots=True)
class Offer:
    """A recipe on a node that provides an endpoint."""

    node: Node
    recipe: Recipe
    endpoint: Endpoint

    @property
    def port(self) -> int:
        return next((port.number for port in self.recipe.ports if port.name == self.endpoint.port), 0)

    @property
    def reachable(self) -> bool:
        """Whether other nodes get at it."""
        return any(port.name == self.endpoint.port and port.exposure != "local" for port in self.recipe.ports)


@dataclass(frozen=True, slots=True)
class Resolver:
    """Resolves for all nodes of a layout. An endpoint that cannot be resolved is a fault and gets a stand-in.

    `whole` is false where recipes are missing, of which one may provide what nothing else does.
    """

    nodes: Sequence[Node]
    recipes: Mapping[str, Recipe]
    whole: bool
    faults: Faults

    def resolve(self, node: Node, place: Place) -> dict[str, Resolved]:
        """Every endpoint that the node's recipes provide or need, by name; `place` is the node's in the layout."""
        own = [Offer(node, recipe, endpoint) for recipe in node.recipes for endpoint in recipe.provides]
        found = {
            offer.endpoint.name: Resolved(
                offer.endpoint.name, "127.0.0.1", offer.port, offer.endpoint.socket, offer.recipe.name, True
            )
            for offer in own
        }
        remote = {
            need: self._remote(need, recipe, node, place)
            for recipe in node.recipes
            for need in recipe.needs
            if need not in found
        }
        return dict(sorted((found | remote).items()))

    def _remote(self, need: str, recipe: Recipe, node: Node, place: Place) -> Resolved:
        offers = [
            Offer(peer, provider, endpoint)
            for peer in self.nodes
            for provider in peer.recipes
            for endpoint in provider.provides
            if endpoint.name == need
        ]
        reachable = [offer for offer in offers if offer.reachable]
        who = f"the recipe {recipe.name!r} on the node {node.name!r} needs {need!r}"
        if not offers:
            self._unprovided(need, recipe, place)
        elif not reachable:
            provider, peer = offers[0].recipe.name, offers[0].node.name
            message = f"{who}, which the recipe {provider!r} gives to its own node {peer!r} only"
            hint = f"give its port exposure cluster, or place {provider} on {node.name}"
            add_fault(self.faults, place, message, hint)
        elif len(reachable) > 1:
            where = ", ".join(f"{offer.recipe.name} on {offer.node.name}" for offer in reachable)
            hint = f"place one of them on {node.name}"
            add_fault(self.faults, place, f"{who}, which several offer: {where}", hint)
        else:
            for unknown in (peer for peer in (reachable[0].node, node) if not peer.address):
                message = f"{who} from the node {reachable[0].node.name!r}, but {unknown.name!r} has no fixed address"
                add_fault(self.faults, place, message, f"give {unknown.name} an address")
        if not reachable:
            return Resolved(need, "127.0.0.1", 0, "", "", False)
        offer = reachable[0]
        return Resolved(need, offer.node.address, offer.port, "", offer.recipe.name, False)

    def _unprovided(self, need: str, recipe: Recipe, place: Place) -> None:
        """The fault of a need that no node fulfils."""
        if not self.whole:
            return
        offered = [(endpoint.name, other.name) for other in self.recipes.values() for endpoint in other.provides]
        providers = sorted(name for endpoint, name in offered if endpoint == need)
        if providers:
            message = f"the recipe {recipe.name!r} needs {need!r}, which no node of the layout provides"
            add_fault(self.faults, place, message, f"place {' or '.join(providers)} on a node")
        else:
            message = f"the recipe {recipe.name!r} needs {need!r}, which no recipe provides"
            hint = nearest(need, {endpoint for endpoint, _ in offered})
            add_fault(self.faults, recipe.places[f"needs.{need}"], message, hint)


def needed_recipes(recipe: Recipe, node: Node) -> tuple[str, ...]:
    """The recipes on the same node that the recipe needs, directly or through others, sorted by name."""
    by_name: dict[str, Recipe] = {other.name: other for other in node.recipes}
    found: set[str] = set()
    open_ends = [recipe]
    while open_ends:
        needs = (node.endpoints[need] for need in open_ends.pop().needs)
        for name in {one.provider for one in needs if one.local} - found - {recipe.name}:
            found.add(name)
            open_ends.append(by_name[name])
    return tuple(sorted(found))
