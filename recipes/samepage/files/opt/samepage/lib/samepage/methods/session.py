"""Session.*: signing in and out, and changing one's password."""

from dataclasses import replace
from typing import Annotated, Any

from .. import rpc
from ..api import Access, Call, Member, method
from ..first_login import forget
from ..params import NewPassword, Text
from ..passwords import NOBODY, hash_password, verify_password
from ..rpc import RpcError
from ..sessions import clear_cookie, set_cookie
from ..usage import in_thread
from .shapes import own

Login = Annotated[str, Text(320)]
Password = Annotated[str, Text(200, trim=False)]

_BY_LOGIN = """
SELECT id, login, name, email, role, user_group AS group, timezone, password_version, must_change_password,
       password_hash FROM members WHERE login = lower(%s)
"""


@method("Session.login", Access.EVERYBODY)
async def login(call: Call, login: Login, password: Password) -> Any:
    """Sign in. Wrong names and wrong passwords get the same answer after the same work."""
    brake, address = call.services.brake, call.exchange.address
    wait = await brake.enter(login.lower(), address)
    if wait:
        minutes = -(-wait // 60)
        raise RpcError(
            rpc.TOO_MANY_ATTEMPTS, f"too many attempts, try again in {minutes} minutes", {"retryAfter": wait}
        )
    async with call.services.pool.connection() as connection:
        row = await (await connection.execute(_BY_LOGIN, (login,))).fetchone()
    stored = (row.pop("password_hash") if row else None) or NOBODY
    right = await in_thread(verify_password, password, stored)
    if row is None or not right:
        raise RpcError(rpc.WRONG_CREDENTIALS, "the name or the password is wrong")
    await brake.succeeded(login.lower(), address)
    member = Member(**row)
    await start_session(call, member)
    return {"user": own(member)}


@method("Session.logout", Access.EVERYBODY)
async def logout(call: Call) -> Any:
    if call.exchange.token:
        await call.services.sessions.close(call.exchange.token)
    call.exchange.set_cookie = clear_cookie()
    call.exchange.token, call.exchange.session, call.exchange.member = "", None, None
    return {}


@method("Session.changePassword", Access.SIGNED_IN)
async def change_password(call: Call, current: Password, password: NewPassword) -> Any:
    """Set a new password, which ends every other session of the member."""
    member = call.member
    check_new_password(password, member)
    if password == current:
        raise RpcError(rpc.INVALID_PARAMS, "password must differ from the current one")
    async with call.services.pool.connection() as connection:
        row = await (await connection.execute(_BY_LOGIN, (member.login,))).fetchone()
    if row is None or not await in_thread(verify_password, current, row["password_hash"] or NOBODY):
        raise RpcError(rpc.WRONG_CREDENTIALS, "the current password is wrong")
    hashed = await in_thread(hash_password, password)
    async with call.services.pool.connection() as connection:
        cursor = await connection.execute(
            "UPDATE members SET password_hash = %s, password_version = password_version + 1,"
            " must_change_password = false WHERE id = %s AND password_version = %s RETURNING password_version",
            (hashed, member.id, member.password_version),
        )
        changed = await cursor.fetchone()
    if changed is None:
        raise RpcError(rpc.CONFLICT, "the password was changed meanwhile, sign in again")
    if member.must_change_password and member.login == "admin":
        forget(call.services.settings)
    member = replace(member, password_version=changed["password_version"], must_change_password=False)
    await start_session(call, member)
    return {"user": own(member)}


def check_new_password(password: str, member: Member) -> None:
    """Raises RpcError(INVALID_PARAMS) for a password that is the member's own name."""
    if password.lower() in (member.login, member.name.lower(), member.email.lower()):
        raise RpcError(rpc.INVALID_PARAMS, "password must not be your name or address")


async def start_session(call: Call, member: Member) -> None:
    """A new session in place of the one that came with the request, so that none can be planted on somebody."""
    sessions, exchange = call.services.sessions, call.exchange
    if exchange.token:
        await sessions.close(exchange.token)
    session = await sessions.open(member.id, member.password_version)
    exchange.token, exchange.session, exchange.member = session.token, session, member
    exchange.set_cookie = set_cookie(session)
