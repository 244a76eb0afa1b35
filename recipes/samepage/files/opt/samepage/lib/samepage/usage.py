"""What one call costs: CPU time of its own steps, time in the database, statements and transactions.

The database driver adds to the current call's Usage (see database.py); the event loop runs many calls interleaved, so
CPU time is taken around every step of the call's own coroutine and not over the whole call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Usage:
    """Times in nanoseconds."""

    cpu: int = 0
    database: int = 0
    statements: int = 0
    transactions: int = 0


current: ContextVar[Usage | None] = ContextVar("current_usage", default=None)


class Metered(Generic[T]):
    """Await this instead of `coroutine` and the CPU time of its steps is added to `usage`."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], usage: Usage) -> None:
        self._coroutine = coroutine
        self._usage = usage

    def __await__(self) -> Generator[Any, Any, T]:
        step: Callable[[Any], Any] = self._coroutine.send
        argument: Any = None
        while True:
            before = time.thread_time_ns()
            try:
                waited_for = step(argument)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                self._usage.cpu += time.thread_time_ns() - before
            try:
                argument = yield waited_for
                step = self._coroutine.send
            except BaseException as error:  # a cancellation, to be raised inside the coroutine
                argument = error
                step = self._coroutine.throw


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run slow pure code beside the event loop, on the current call's account."""
    result, spent = await asyncio.to_thread(_timed, function, arguments)
    usage = current.get()
    if usage is not None:
        usage.cpu += spent
    return result


def _timed(function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T, int]:
    before = time.thread_time_ns()
    result = function(*arguments)
    return result, time.thread_time_ns() - before


