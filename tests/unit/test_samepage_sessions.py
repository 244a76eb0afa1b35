"""Sessions and the brake on guessing, against a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from samepage.sessions import (
    LIFETIME,
    LOGIN_RULES,
    Brake,
    Sessions,
    clear_cookie,
    read_cookie,
    set_cookie,
)

T = TypeVar("T")


class Memory:
    """Valkey's commands on a dictionary, with a clock that tests move."""

    def __init__(self) -> None:
        self.now = 0
        self.values: dict[str, tuple[str, int | None]] = {}

    def _alive(self, name: str) -> str | None:
        value, end = self.values.get(name, ("", 0))
        return value if end is None or end > self.now else None

    async def set(self, name: str, value: str, *, ex: int) -> None:
        self.values[name] = (value, self.now + ex)

    async def getex(self, name: str, *, ex: int) -> str | None:
        value = self._alive(name)
        if value is not None:
            self.values[name] = (value, self.now + ex)
        return value

    async def get(self, name: str) -> str | None:
        return self._alive(name)

    async def delete(self, *names: str) -> None:
        for name in names:
            self.values.pop(name, None)

    async def incr(self, name: str) -> None:
        value = self._alive(name)
        end = self.values[name][1] if value is not None else None
        self.values[name] = (str(int(value or 0) + 1), end)

    async def expire(self, name: str, time: int, *, nx: bool) -> None:
        value, end = self.values[name]
        assert nx
        self.values[name] = (value, self.now + time if end is None else end)

    async def ttl(self, name: str) -> int:
        end = self.values[name][1]
        assert end is not None
        return end - self.now


@pytest.fixture
def store() -> Memory:
    return Memory()


def do(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def test_a_session_lives_as_long_as_it_is_used(store: Memory) -> None:
    sessions = Sessions(store)
    session = do(sessions.open(7, 3))
    for _ in range(3):
        store.now += LIFETIME - 1
        assert do(sessions.find(session.token)) == session
    store.now += LIFETIME
    assert do(sessions.find(session.token)) is None


def test_a_closed_session_is_gone_and_others_stay(store: Memory) -> None:
    sessions = Sessions(store)
    first, second = do(sessions.open(1, 1)), do(sessions.open(1, 1))
    assert first.token != second.token
    do(sessions.close(first.token))
    assert do(sessions.find(first.token)) is None
    assert do(sessions.find(second.token)) == second


def test_the_store_never_sees_a_token(store: Memory) -> None:
    token = do(Sessions(store).open(1, 1)).token
    assert token not in repr(store.values)


def test_the_cookie_goes_to_this_site_only_and_comes_back(store: Memory) -> None:
    session = do(Sessions(store).open(1, 1))
    header = set_cookie(session)
    name, *rules = header.split("; ")
    assert set(rules) == {"Path=/", "Secure", "HttpOnly", "SameSite=Strict"}
    assert read_cookie(f"other=1; {name}; more=2") == session.token
    assert "Max-Age=0" in clear_cookie()


@pytest.mark.parametrize("header", ["", ";", "a=b", "__Host-samepage", "x__Host-samepage=1", "=", "__Host-samepag=1"])
def test_other_cookies_are_no_session(header: str) -> None:
    assert read_cookie(header) == ""


def test_the_brake_holds_one_login_from_one_address(store: Memory) -> None:
    brake, rule = Brake(store), LOGIN_RULES["pair"]
    for _ in range(rule.most):
        assert do(brake.wait("ann", "10.0.0.1")) == 0
        do(brake.failed("ann", "10.0.0.1"))
    assert do(brake.wait("ann", "10.0.0.1")) == rule.window
    assert do(brake.wait("ann", "10.0.0.2")) == 0, "somebody else cannot lock Ann out"
    assert do(brake.wait("bob", "10.0.0.1")) == 0
    store.now += rule.window - 1
    assert do(brake.wait("ann", "10.0.0.1")) == 1
    store.now += 1
    assert do(brake.wait("ann", "10.0.0.1")) == 0


def test_attempts_do_not_lengthen_the_wait(store: Memory) -> None:
    brake = Brake(store)
    do(brake.failed("ann", "a"))
    store.now += 600
    for _ in range(4):
        do(brake.failed("ann", "a"))
    assert do(brake.wait("ann", "a")) == LOGIN_RULES["pair"].window - 600


def test_success_forgets_the_pair_but_not_the_address(store: Memory) -> None:
    brake = Brake(store)
    for number in range(LOGIN_RULES["address"].most):
        do(brake.failed(f"guess{number}", "a"))
    do(brake.succeeded("guess0", "a"))
    assert do(brake.wait("guess0", "a")) > 0
    assert do(brake.wait("guess0", "b")) == 0


def test_guessing_one_login_from_everywhere_is_braked_too(store: Memory) -> None:
    brake = Brake(store)
    for number in range(LOGIN_RULES["login"].most):
        do(brake.failed("ann", f"address {number}"))
    assert do(brake.wait("ann", "fresh")) == LOGIN_RULES["login"].window
