"""The API's process: wait for PostgreSQL, migrate, make the first administrator, serve, stop without losing a call."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from pathlib import Path
from types import FrameType

import psycopg
from uvicorn.config import Config
from uvicorn.server import Server

from . import methods, service
from .api import METHODS, Api, Services
from .config import SHARE, ConfigError, Settings, running_release
from .database import connect_patiently, make_pool, migrate
from .first_login import ensure_administrator
from .http import Application
from .migrations import SchemaError, read_migrations
from .records import Spool
from .rpc import Limits
from .sessions import Brake, Sessions
from .valkey import Valkey

_WAIT_FOR_DATABASE = 280.0  # seconds; the unit's own limit is a little longer
_KEEP_ALIVE = 120  # seconds; longer than the front door keeps an idle connection, so it never meets a closing one
_CANNOT_WORK = 78  # EX_CONFIG: starting again would not help, and the unit does not try
_log = logging.getLogger(__name__)


async def prepare(settings: Settings, release: str) -> None:
    """Bring the database to this release. Raises SchemaError or psycopg.OperationalError."""
    migrations = read_migrations(SHARE / "migrations")
    service.notify("STATUS=Waiting for PostgreSQL")
    async with await connect_patiently(settings, _WAIT_FOR_DATABASE) as connection:
        service.notify("STATUS=Migrating the database")
        await migrate(connection, migrations, release)
        await ensure_administrator(connection, settings)


class Announced(Server):
    """Tells the service manager when requests are answered and when stopping begins, and sleeps in between."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._exit = asyncio.Event()
        self.ready = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._exit.set)

    async def main_loop(self) -> None:
        # The base class looks at a flag ten times a second.
        await self._exit.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        service.notify("READY=1", f"STATUS=Serving {len(METHODS)} methods")
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service.notify("STOPPING=1")
        await super().shutdown(sockets)


async def serve(settings: Settings) -> None:
    release = running_release(settings.release_file)
    listeners = [service.listen_unix(settings.listen_socket, "api")]
    if settings.listen_port:
        listeners.append(service.listen_tcp(settings.listen_port, "api-tcp"))
    # All that needs no database comes first: at boot PostgreSQL is on its way.
    valkey, pool = Valkey(settings), make_pool(settings)
    spool = Spool(Path(settings.calls_folder), file_bytes=settings.calls_file_bytes, files=settings.calls_files)
    services = Services(settings, release, pool, Sessions(valkey), Brake(valkey), spool)
    server = Announced(configure(Application(Api(services), Limits(), SHARE / "web"), settings))
    await prepare(settings, release)
    async with pool:
        warm_up = asyncio.create_task(_warm_up(server, valkey))
        await server.serve(listeners)
        warm_up.cancel()
    await valkey.close()
    spool.close()


async def _warm_up(server: Announced, valkey: Valkey) -> None:
    """Spare the first client the loading of Valkey's library, while the rest of the node starts."""
    await server.ready.wait()
    await valkey.warm_up()


def configure(application: Application, settings: Settings) -> Config:
    """uvicorn's configuration, with all its parts loaded."""
    config = Config(
        application,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=settings.graceful_seconds,
    )
    config.load()
    return config


def main() -> None:
    """The entry point. Exit status 78 means that a human must act first."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("psycopg.pool", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    assert methods
    try:
        asyncio.run(serve(Settings.load()))
    except (ConfigError, SchemaError) as error:
        _log.error("%s", error)
        service.notify(f"STATUS={error}")
        sys.exit(_CANNOT_WORK)
    except psycopg.OperationalError as error:
        _log.error("PostgreSQL is not available: %s", str(error).strip())
        sys.exit(1)
