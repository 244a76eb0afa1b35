"""What a call costs is counted on its own account only, however many calls run at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from samepage.usage import Metered, Usage, current, in_thread

T = TypeVar("T")


def burn(milliseconds: int) -> None:
    until = time.thread_time_ns() + milliseconds * 1_000_000
    while time.thread_time_ns() < until:
        pass


async def busy(milliseconds: int, pause: float = 0.01) -> int:
    burn(milliseconds)
    await asyncio.sleep(pause)
    burn(milliseconds)
    return milliseconds


def test_interleaved_calls_pay_for_themselves() -> None:
    async def run() -> tuple[Usage, Usage]:
        little, much = Usage(), Usage()
        results = await asyncio.gather(_await(busy(5), little), _await(busy(40), much))
        assert tuple(results) == (5, 40)
        return little, much

    little, much = asyncio.run(run())
    assert 10e6 <= little.cpu < 30e6
    assert 80e6 <= much.cpu < 150e6


async def _await(coroutine: Coroutine[Any, Any, T], usage: Usage) -> T:
    return await Metered(coroutine, usage)


def test_waiting_costs_no_cpu() -> None:
    usage = Usage()
    asyncio.run(_await(asyncio.sleep(0.2), usage))
    assert usage.cpu < 50e6


def test_errors_and_cancellations_pass_through() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    usage = Usage()
    with pytest.raises(LookupError, match="gone"):
        asyncio.run(_await(fail(), usage))

    cleaned = []

    async def patient() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def cancel() -> None:
        task = asyncio.create_task(_await(patient(), usage))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert cleaned == [True]


def test_a_timeout_inside_works() -> None:
    async def impatient() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return "late"
        return "never"

    assert asyncio.run(_await(impatient(), Usage())) == "late"


def test_work_in_a_thread_is_on_the_account() -> None:
    async def run() -> Usage:
        usage = Usage()
        current.set(usage)
        await in_thread(burn, 30)
        return usage

    assert 30e6 <= asyncio.run(run()).cpu < 100e6
