"""Sign-in sessions and the brake on guessing passwords, both kept in Valkey."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .passwords import make_token, token_key

COOKIE = "__Host-samepage"  # the prefix makes browsers insist on Secure, Path=/ and no Domain
LIFETIME = 12 * 3600  # seconds without a call
_COOKIE_RULES = "Path=/; Secure; HttpOnly; SameSite=Strict"


class Store(Protocol):
    """The few commands needed of Valkey; redis.asyncio.Redis has them. Keys and values are strings."""

    async def set(self, name: str, value: str, *, ex: int) -> Any: ...
    async def getex(self, name: str, *, ex: int) -> Any: ...
    async def delete(self, *names: str) -> Any: ...
    async def incr(self, name: str) -> Any: ...
    async def decr(self, name: str) -> Any: ...
    async def expire(self, name: str, time: int, *, nx: bool) -> Any: ...
    async def ttl(self, name: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Session:
    """Who signed in. `password_version` is the member's at sign-in: changing the password ends older sessions."""

    token: str
    member: int
    password_version: int


class Sessions:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def open(self, member: int, password_version: int) -> Session:
        session = Session(make_token(), member, password_version)
        value = json.dumps({"member": member, "passwordVersion": password_version})
        await self._store.set(_session_key(session.token), value, ex=LIFETIME)
        return session

    async def find(self, token: str) -> Session | None:
        """The session of a cookie's token, its lifetime renewed; None when there is none."""
        value = await self._store.getex(_session_key(token), ex=LIFETIME)
        if value is None:
            return None
        fields = json.loads(value)
        return Session(token, fields["member"], fields["passwordVersion"])

    async def close(self, token: str) -> None:
        await self._store.delete(_session_key(token))


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `most` attempts within `window` seconds."""

    most: int
    window: int


LOGIN_RULES = {
    "pair": Rule(5, 900),  # one login from one address
    "address": Rule(50, 900),
    "login": Rule(100, 3600),  # from everywhere: high, so that nobody is locked out of an account by a stranger
}


class Brake:
    """Counts sign-ins per login and address, per address and per login."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def enter(self, login: str, address: str) -> int:
        """Count an attempt, before it is made, so that many at once count as many. 0, or the seconds to wait.

        An attempt that one rule refuses is not counted by the next: who guesses from one address locks only it out.
        """
        for key, rule in _counters(login, address):
            attempts = int(await self._store.incr(key))
            await self._store.expire(key, rule.window, nx=True)
            if attempts > rule.most:
                return max(1, int(await self._store.ttl(key)))
        return 0

    async def succeeded(self, login: str, address: str) -> None:
        """The attempt was no guess."""
        (pair, _), *others = _counters(login, address)
        await self._store.delete(pair)
        for key, _ in others:
            await self._store.decr(key)


def _counters(login: str, address: str) -> Sequence[tuple[str, Rule]]:
    parts = {"pair": f"{login} {address}", "address": address, "login": login}
    return [(f"samepage:failed:{kind}:{token_key(part)}", LOGIN_RULES[kind]) for kind, part in parts.items()]


def _session_key(token: str) -> str:
    return f"samepage:session:{token_key(token)}"


def set_cookie(session: Session) -> str:
    """The Set-Cookie header for a new session; the browser forgets it when it closes."""
    return f"{COOKIE}={session.token}; {_COOKIE_RULES}"


def clear_cookie() -> str:
    return f"{COOKIE}=; Max-Age=0; {_COOKIE_RULES}"


def read_cookie(header: str) -> str:
    """The session token in a Cookie header; empty when there is none."""
    for part in header.split(";"):
        name, separator, value = part.strip().partition("=")
        if separator and name == COOKIE:
            return value
    return ""
