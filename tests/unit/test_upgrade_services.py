"""What the node's units are asked: whether the front door serves, and what they said last."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from appliance.node.upgrade import services, trial
from appliance.node.upgrade.services import ServiceError

UNIT = "nginx.service"


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, set[int]]]:
    """State, main process, restarts and processes of the unit, one after the other; the last of them stays."""
    told: list[tuple[str, int, int, set[int]]] = []

    def systemctl(*words: str) -> str:
        state, main, restarts, _ = told[0]
        if "MainPID" in words:
            return f"{main}\n"
        if len(told) > 1:
            told.pop(0)
        return f"ActiveState={state}\nNRestarts={restarts}\n"

    monkeypatch.setattr(services, "systemctl", systemctl)
    monkeypatch.setattr(services, "processes", lambda _unit: told[0][3])
    monkeypatch.setattr(services, "_ASK", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    return told


def test_door_serves_once_it_has_more_than_its_main_process(facts: list[tuple[str, int, int, set[int]]]) -> None:
    facts += [("activating", 0, 7, {4}), ("active", 5, 7, {5}), ("active", 5, 7, {5, 6})]
    assert services.wait_serving(UNIT, 600)


def test_door_that_has_failed(facts: list[tuple[str, int, int, set[int]]]) -> None:
    facts += [("activating", 0, 0, set()), ("failed", 0, 0, set())]
    assert not services.wait_serving(UNIT, 600)


def test_door_that_fails_again_and_again(facts: list[tuple[str, int, int, set[int]]]) -> None:
    facts += [("active", 5, 7, {5}), ("activating", 0, 8, set()), ("active", 6, 9, {6}), ("activating", 0, 10, set())]
    assert not services.wait_serving(UNIT, 600)


def test_door_that_says_nothing(facts: list[tuple[str, int, int, set[int]]]) -> None:
    facts += [("active", 5, 0, {5})]
    assert not services.wait_serving(UNIT, 0.01)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"a.service": "failed", "b.service": "active"}, "a.service says no"),
        ({"a.service": "activating", "b.service": "active"}, "a.service says no\nb.service says no"),
        ({}, ""),
    ],
)
def test_last_words(monkeypatch: pytest.MonkeyPatch, states: dict[str, str], said: str) -> None:
    """Of the units that have failed; a unit that is to be started again at once is not marked as failed."""

    def run(*words: str) -> str:
        if words[0] == "systemctl":
            return states[words[-1]]
        if words[1] == "--sync":
            raise ServiceError("this journal cannot do that")
        return f"{words[-1]} says no\n"

    monkeypatch.setattr(services, "run", run)
    assert services.last_words(states) == said


def test_units_may_be_restarted_as_often_as_somebody_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd counts starts; a unit's limit is for one that fails again and again."""
    told: list[tuple[str, ...]] = []

    def systemctl(*words: str) -> str:
        told.append(words)
        if words[0] == "reset-failed":
            raise ServiceError("b.service is not loaded")
        return ""

    monkeypatch.setattr(services, "systemctl", systemctl)
    services.take_over({"a.service": "restart", "b.service": "restart", "c.service": "reload"}, ())
    assert told == [
        ("reset-failed", "a.service", "b.service"), ("restart", "a.service", "b.service"),
        ("reload-or-restart", "c.service"),
    ]  # fmt: skip


def test_soft_reboot_forgets_how_often_units_were_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the order in which the engine calls them; that it does is in test_upgrade_engine.py."""
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(services, "systemctl", lambda *words: told.append(words) or "")
    monkeypatch.setattr(trial, "systemctl", lambda *words: told.append(words) or "")
    for name in ("RELEASE_FILE", "HEALTH_FILE", "MARK"):
        monkeypatch.setattr(trial, name, str(tmp_path / name))
    services.forget_failures()
    trial.soft_reboot(b"{}", trial=True)
    assert told == [("reset-failed",), ("--no-block", "soft-reboot")]
