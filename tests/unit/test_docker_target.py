"""What the target does where the engine answers otherwise than expected; tests/boot/test_docker.py has the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import NotFound

from appliance.targets import docker
from appliance.targets.base import NodeError


class Engine:
    """Has one container, and says of so many attempts to remove it that something was not found."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.there = refusals, True
        self.containers = SimpleNamespace(get=self.get)

    def get(self, _name: str) -> Any:
        if not self.there:
            raise NotFound("No such container")
        return SimpleNamespace(remove=self.remove)

    def remove(self, *, force: bool, v: bool) -> None:
        assert force
        assert v
        if self.refusals:
            self.refusals -= 1
            raise NotFound("cannot kill container: no such process")
        self.there = False


def test_a_container_that_cannot_be_ended_yet_is_removed_a_moment_later() -> None:
    engine = Engine(refusals=1)
    docker.remove(engine, "one")
    assert not engine.there


def test_a_container_that_is_gone_is_no_error() -> None:
    engine = Engine(refusals=0)
    engine.there = False
    docker.remove(engine, "one")


def test_a_container_that_stays_is_told() -> None:
    with pytest.raises(NodeError, match="cannot be removed") as caught:
        docker.remove(Engine(refusals=9), "one", pauses=(0, 0))
    assert "docker rm -f one" in caught.value.hint
