"""The connection to Valkey. The client library is loaded with the first use, because it is slow to load."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from .config import Settings


class Unreachable(Exception):
    """Valkey does not answer."""


class Valkey:
    """The commands of `sessions.Store`. Every one reconnects by itself; raises Unreachable when that fails."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: Any = None
        self._failures: tuple[type[Exception], ...] = ()
        self._loading = asyncio.Lock()

    async def warm_up(self) -> None:
        """Load the client library beside the event loop."""
        async with self._loading:
            if self._client is None:
                self._client = await asyncio.to_thread(self._make_client)

    async def set(self, name: str, value: str, *, ex: int) -> Any:
        return await self._ask(lambda client: client.set(name, value, ex=ex))

    async def getex(self, name: str, *, ex: int) -> Any:
        return await self._ask(lambda client: client.getex(name, ex=ex))

    async def delete(self, *names: str) -> Any:
        return await self._ask(lambda client: client.delete(*names))

    async def incr(self, name: str) -> Any:
        return await self._ask(lambda client: client.incr(name))

    async def decr(self, name: str) -> Any:
        return await self._ask(lambda client: client.decr(name))

    async def expire(self, name: str, time: int, *, nx: bool) -> Any:
        return await self._ask(lambda client: client.expire(name, time, nx=nx))

    async def ttl(self, name: str) -> Any:
        return await self._ask(lambda client: client.ttl(name))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _ask(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        if self._client is None:
            await self.warm_up()
        try:
            return await command(self._client)
        except self._failures as error:
            raise Unreachable(f"Valkey does not answer: {error}") from error

    def _make_client(self) -> Any:
        redis = importlib.import_module("redis.asyncio")
        backoff = importlib.import_module("redis.backoff")
        retry = importlib.import_module("redis.asyncio.retry")
        errors = importlib.import_module("redis.exceptions")
        lost = (errors.ConnectionError, errors.TimeoutError, errors.BusyLoadingError, OSError)
        self._failures = (errors.RedisError, OSError)
        options = {
            "decode_responses": True,
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            # Long enough for a restart of the server.
            "retry": retry.Retry(backoff.ExponentialBackoff(cap=1.0, base=0.1), 8, supported_errors=lost),
            "retry_on_error": list(lost),
        }
        if self._settings.valkey_socket:
            return redis.Redis(unix_socket_path=self._settings.valkey_socket, **options)
        return redis.Redis(host=self._settings.valkey_host, port=self._settings.valkey_port, **options)
