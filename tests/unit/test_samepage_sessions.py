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

    async def delete(self, *names: str) -> None:
        for name in names:
            self.values.pop(name, None)

    async def incr(self, name: str) -> int:
        value = self._alive(name)
        end = self.values[name][1] if value is not None else None
        self.values[name] = (str(int(value or 0) + 1), end)
        return int(value or 0) + 1

    async def decr(self, name: str) -> None:
        value, end = self.values[name]
        self.values[name] = (str(int(value) - 1), end)

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
        assert do(brake.enter("ann", "10.0.0.1")) == 0
    assert do(brake.enter("ann", "10.0.0.1")) == rule.window
    assert do(brake.enter("ann", "10.0.0.2")) == 0, "somebody else cannot lock Ann out"
    assert do(brake.enter("bob", "10.0.0.1")) == 0
    store.now += rule.window - 1
    assert do(brake.enter("ann", "10.0.0.1")) == 1, "attempts do not lengthen the wait"
    store.now += 1
    assert do(brake.enter("ann", "10.0.0.1")) == 0


def test_attempts_at_the_same_time_are_all_counted(store: Memory) -> None:
    brake = Brake(store)

    async def at_once() -> list[int]:
        return list(await asyncio.gather(*(brake.enter("ann", "a") for _ in range(40))))

    assert do(at_once()).count(0) == LOGIN_RULES["pair"].most


def test_signing_in_is_no_guess(store: Memory) -> None:
    brake = Brake(store)
    for _ in range(3 * LOGIN_RULES["login"].most):
        assert do(brake.enter("ann", "a")) == 0
        do(brake.succeeded("ann", "a"))


def test_success_does_not_wipe_out_other_guesses_of_the_address(store: Memory) -> None:
    brake, most = Brake(store), LOGIN_RULES["address"].most
    for number in range(most - 1):
        assert do(brake.enter(f"guess{number}", "a")) == 0
    do(brake.enter("eve", "a"))
    do(brake.succeeded("eve", "a"))
    assert do(brake.enter("next", "a")) == 0
    assert do(brake.enter("last", "a")) == LOGIN_RULES["address"].window
    assert do(brake.enter("last", "b")) == 0


def test_guessing_from_one_address_locks_nobody_else_out(store: Memory) -> None:
    brake = Brake(store)
    for _ in range(10 * LOGIN_RULES["login"].most):
        do(brake.enter("ann", "villain"))
    assert do(brake.enter("ann", "home")) == 0


def test_guessing_one_login_from_everywhere_is_braked_too(store: Memory) -> None:
    brake = Brake(store)
    for number in range(LOGIN_RULES["login"].most):
        assert do(brake.enter("ann", f"address {number}")) == 0
    assert do(brake.enter("ann", "fresh")) == LOGIN_RULES["login"].window
