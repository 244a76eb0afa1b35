"""The API's frame: which methods exist, who may call them, and the record that each call leaves."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from . import rpc, usage
from .clock import timestamp, utc_now
from .config import Settings
from .database import Connection
from .params import Parameter, bind, parameters_of
from .passwords import make_token
from .records import CallRecord, Spool
from .rpc import RpcError
from .sessions import Brake, Session, Sessions
from .valkey import Unreachable

_log = logging.getLogger(__name__)


class Access(enum.Enum):
    """Who may call a method."""

    EVERYBODY = enum.auto()
    SIGNED_IN = enum.auto()  # also before a one-time password was changed
    MEMBER = enum.auto()
    ADMINISTRATOR = enum.auto()


@dataclass(frozen=True, slots=True)
class Member:
    """The person who calls. `group` is the ring in which changes reach them."""

    id: int
    login: str
    name: str
    email: str
    role: str
    group: str
    timezone: str
    password_version: int
    must_change_password: bool

    @property
    def administrator(self) -> bool:
        return self.role == "administrator"


@dataclass(slots=True)
class Exchange:
    """One HTTP request: what its calls share. `origin` is the site as the browser sees it, https://host[:port]."""

    address: str
    origin: str
    token: str  # of the session cookie; empty without one
    set_cookie: str = ""
    session: Session | None = None
    member: Member | None = None
    identified: bool = False


@dataclass(frozen=True, slots=True)
class Services:
    """What the methods work with."""

    settings: Settings
    release: str
    pool: AsyncConnectionPool[Connection]
    sessions: Sessions
    brake: Brake
    spool: Spool


@dataclass(frozen=True, slots=True)
class Call:
    """What a method's handler is given besides its parameters."""

    services: Services
    exchange: Exchange

    @property
    def member(self) -> Member:
        """The caller, of methods that are not for everybody."""
        member = self.exchange.member
        if member is None:
            raise RpcError(rpc.NOT_SIGNED_IN, "sign in first")
        return member


Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    access: Access
    handler: Handler
    parameters: tuple[Parameter, ...]


METHODS: dict[str, Method] = {}


def method(name: str, access: Access = Access.MEMBER) -> Callable[[H], H]:
    """Decorator that adds a handler to the API."""

    def add(handler: H) -> H:
        METHODS[name] = Method(name, access, handler, parameters_of(handler))
        return handler

    return add


_MEMBER = (
    "SELECT id, login, name, email, role, user_group AS group, timezone, password_version, must_change_password"
    " FROM members WHERE id = %s"
)


class Api:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def serve(self, request: rpc.Request, exchange: Exchange) -> Any:
        """Run one call and record it. Raises RpcError, and nothing else."""
        method = METHODS.get(request.method)
        account = usage.Usage()
        usage.current.set(account)
        moment, began = utc_now(), time.perf_counter_ns()
        outcome = 0
        try:
            return await usage.Metered(self._run(method, request, exchange), account)
        except RpcError as error:
            outcome = error.code
            raise
        finally:
            usage.current.set(None)
            self._services.spool.write(
                CallRecord(
                    at=timestamp(moment),
                    id=make_token()[:16],
                    method=method.name if method else "unknown",
                    group=exchange.member.group if exchange.member else "anonymous",
                    release=self._services.release,
                    variants={},
                    outcome=outcome,
                    real_ms=round((time.perf_counter_ns() - began) / 1e6, 3),
                    cpu_ms=round(account.cpu / 1e6, 3),
                    db_ms=round(account.database / 1e6, 3),
                    statements=account.statements,
                    transactions=account.transactions,
                )
            )

    async def _run(self, method: Method | None, request: rpc.Request, exchange: Exchange) -> Any:
        try:
            if method is None:
                raise RpcError(rpc.METHOD_NOT_FOUND, "there is no such method")
            await self._identify(exchange)
            _authorise(method, exchange.member)
            return await method.handler(Call(self._services, exchange), **bind(method.parameters, request.params))
        except RpcError:
            raise
        except (psycopg.OperationalError, PoolTimeout, TooManyRequests, Unreachable) as error:
            _log.warning("%s: %s", request.method[:80], str(error).strip())
            raise RpcError(rpc.UNAVAILABLE, "the service is busy or restarting, please try again") from None
        except Exception:
            _log.exception("%s failed", request.method[:80])
            raise RpcError(rpc.INTERNAL_ERROR, "something went wrong on the server") from None

    async def _identify(self, exchange: Exchange) -> None:
        """Find out who calls, once per request."""
        if exchange.identified:
            return
        session = await self._services.sessions.find(exchange.token) if exchange.token else None
        if session is not None:
            async with self._services.pool.connection() as connection:
                row = await (await connection.execute(_MEMBER, (session.member,))).fetchone()
            if row is not None and row["password_version"] == session.password_version:
                exchange.session, exchange.member = session, Member(**row)
        exchange.identified = True


def _authorise(method: Method, member: Member | None) -> None:
    if method.access is Access.EVERYBODY:
        return
    if member is None:
        raise RpcError(rpc.NOT_SIGNED_IN, "sign in first")
    if member.must_change_password and method.access is not Access.SIGNED_IN:
        raise RpcError(rpc.PASSWORD_CHANGE_NEEDED, "change the one-time password first")
    if method.access is Access.ADMINISTRATOR and not member.administrator:
        raise RpcError(rpc.NOT_ALLOWED, "only an administrator may do this")
