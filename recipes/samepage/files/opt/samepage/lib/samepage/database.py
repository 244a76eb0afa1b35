"""PostgreSQL: connections that count what they do for the current call, the pool, and the migrations."""

from __future__ import annotations

import asyncio
import logging
import select
import time
from collections.abc import Iterable
from typing import Any

from psycopg import AsyncConnection, AsyncCursor, OperationalError
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from . import usage
from .config import Settings
from .migrations import Migration, plan

_LOCK = 0x5A6D_6570  # the advisory lock of migrations: one node at a time
_log = logging.getLogger(__name__)


class CountingCursor(AsyncCursor[DictRow]):
    """Adds its statements to the current call's account."""

    async def execute(self, query: Query, params: Params | None = None, **options: Any) -> CountingCursor:
        account = usage.current.get()
        idle = self._conn.pgconn.transaction_status == TransactionStatus.IDLE
        try:
            return await super().execute(query, params, **options)
        finally:
            if account is not None:
                account.statements += 1
                # Idle before and after: the statement was a transaction of its own.
                if idle and self._conn.pgconn.transaction_status == TransactionStatus.IDLE:
                    account.transactions += 1

    async def executemany(self, query: Query, params_seq: Iterable[Params], **options: Any) -> None:
        rows = list(params_seq)
        account = usage.current.get()
        if account is not None:
            account.statements += len(rows)
        await super().executemany(query, rows, **options)


class Connection(AsyncConnection[DictRow]):
    """Every exchange with the server passes through `wait`, so time and explicit transactions are taken there."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cursor_factory = CountingCursor

    async def wait(self, gen: PQGen[Any], *arguments: Any, **options: Any) -> Any:
        account = usage.current.get()
        if account is None:
            return await super().wait(gen, *arguments, **options)
        idle = self.pgconn.transaction_status == TransactionStatus.IDLE
        before = time.perf_counter_ns()
        try:
            return await super().wait(gen, *arguments, **options)
        finally:
            account.database += time.perf_counter_ns() - before
            opened = self.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)
            account.transactions += idle and opened


def conninfo(settings: Settings, application: str) -> dict[str, Any]:
    """Arguments of psycopg's connect()."""
    return {
        "host": settings.database_host,
        "port": settings.database_port,
        "dbname": settings.database_name,
        "user": settings.database_user,
        "application_name": application,
        "connect_timeout": 5,
        "autocommit": True,
        "row_factory": dict_row,
    }


_TIME_LIMITS = "-c statement_timeout=15s -c lock_timeout=5s -c idle_in_transaction_session_timeout=60s"


def make_pool(settings: Settings) -> AsyncConnectionPool[Connection]:
    """A pool that is not open yet. After an outage it asks again within seconds, whenever somebody needs it."""
    return AsyncConnectionPool(
        connection_class=Connection,
        kwargs={**conninfo(settings, "samepage"), "options": _TIME_LIMITS},
        min_size=1,
        max_size=settings.pool_size,
        max_waiting=1000,  # all that waited at the front door during an upgrade come at once
        timeout=30,
        reconnect_timeout=8,
        check=_refuse_dead,
        open=False,
        name="samepage",
    )


async def _refuse_dead(connection: Connection) -> None:
    """An idle connection has nothing to say; one that is readable has been closed by the server."""
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    if poll.poll(0):
        await connection.close()
        raise OperationalError("the server closed the connection")


async def connect_patiently(settings: Settings, seconds: float) -> Connection:
    """A connection for migrations, as soon as the server takes one. Raises OperationalError after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.1
    while True:
        try:
            return await Connection.connect(**conninfo(settings, "samepage-migrations"))
        except OperationalError as error:
            if time.monotonic() > deadline:
                raise
            if pause == 0.1:
                _log.info("waiting for PostgreSQL: %s", str(error).strip().splitlines()[0])
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.4)


async def migrate(connection: Connection, migrations: tuple[Migration, ...], release: str) -> int:
    """Bring the schema to the newest level, one transaction per migration, one node at a time. Returns the old level.

    Raises SchemaError when the database is of another make, with nothing changed.
    """
    await connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
    try:
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (level integer PRIMARY KEY, name text NOT NULL,"
            " checksum text NOT NULL, release text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        cursor = await connection.execute("SELECT level, checksum FROM schema_migrations")
        applied = {row["level"]: row["checksum"] for row in await cursor.fetchall()}
        for migration in plan(migrations, applied):
            async with connection.transaction():
                await connection.execute(migration.sql.encode())
                await connection.execute(
                    "INSERT INTO schema_migrations (level, name, checksum, release) VALUES (%s, %s, %s, %s)",
                    (migration.level, migration.name, migration.checksum, release),
                )
            _log.info("applied migration %04d_%s", migration.level, migration.name)
        return max(applied, default=0)
    finally:
        await connection.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
