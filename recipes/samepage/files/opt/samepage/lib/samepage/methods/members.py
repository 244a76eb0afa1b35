"""Members.* and Invitations.*: who is here, and how others get in."""

from typing import Annotated, Any

from psycopg.types.json import Jsonb

from .. import rpc
from ..api import Access, Call, Member, method
from ..database import Connection
from ..params import Email, MaybeNumber, NewPassword, Text
from ..passwords import hash_password, make_token, token_key
from ..rpc import RpcError
from ..usage import in_thread
from .session import check_new_password, start_session
from .shapes import log_activity, own

Name = Annotated[str, Text(100)]
Token = Annotated[str, Text(100)]
DAYS_VALID = 7

_INVITED = """
SELECT m.id, m.login, m.name, m.email, m.role, m.user_group AS group, m.timezone, m.password_version,
       m.must_change_password
FROM invitations i JOIN members m ON m.id = i.member_id WHERE i.token_key = %s AND i.expires_at > now()
"""


@method("Members.get")
async def get(call: Call, id: MaybeNumber = None) -> Any:
    """A member; without `id` the caller, with all that is known of them."""
    if id is None or id == call.member.id:
        return own(call.member)
    async with call.services.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT id, name, email, role, password_hash IS NULL AS invited FROM members WHERE id = %s", (id,)
        )
        row = await cursor.fetchone()
    if row is None:
        raise RpcError(rpc.NOT_FOUND, "there is no such member")
    return dict(row)


@method("Members.invite", Access.ADMINISTRATOR)
async def invite(call: Call, email: Email, name: Name) -> Any:
    """Mail a link with which the invited person sets a password. Inviting again replaces a link not yet used."""
    token = make_token()
    link = f"{call.services.settings.public_url or call.exchange.origin}/invitation#{token}"
    async with call.services.pool.connection() as connection, connection.transaction():
        cursor = await connection.execute(
            "INSERT INTO members (login, name, email, role) VALUES (lower(%(email)s), %(name)s, %(email)s, 'member')"
            " ON CONFLICT (login) DO UPDATE SET name = excluded.name WHERE members.password_hash IS NULL RETURNING id",
            {"email": email, "name": name},
        )
        invited = await cursor.fetchone()
        if invited is None:
            raise RpcError(rpc.CONFLICT, "this address belongs to a member already")
        await connection.execute("DELETE FROM invitations WHERE member_id = %s", (invited["id"],))
        await connection.execute(
            "INSERT INTO invitations (token_key, member_id, invited_by, expires_at)"
            " VALUES (%s, %s, %s, now() + make_interval(days => %s))",
            (token_key(token), invited["id"], call.member.id, DAYS_VALID),
        )
        mail = {"to": email, "name": name, "from_name": call.member.name, "link": link, "days": DAYS_VALID}
        await connection.execute("INSERT INTO jobs (kind, payload) VALUES ('invitation', %s)", (Jsonb(mail),))
        await log_activity(connection, "invite", call.member, None, name)
    return {"id": invited["id"], "email": email, "name": name, "invited": True}


@method("Invitations.get", Access.EVERYBODY)
async def get_invitation(call: Call, token: Token) -> Any:
    """For whom a link is, before it is used."""
    async with call.services.pool.connection() as connection:
        member = await _invited(connection, token)
    return {"name": member.name, "login": member.login}


@method("Invitations.accept", Access.EVERYBODY)
async def accept(call: Call, token: Token, password: NewPassword) -> Any:
    """Set the first password, which uses the link up, and sign in."""
    async with call.services.pool.connection() as connection:
        await _invited(connection, token)  # no costly hash for a worthless link
    hashed = await in_thread(hash_password, password)
    async with call.services.pool.connection() as connection, connection.transaction():
        member = await _invited(connection, token, lock=True)
        check_new_password(password, member)
        await connection.execute("DELETE FROM invitations WHERE member_id = %s", (member.id,))
        await connection.execute("UPDATE members SET password_hash = %s WHERE id = %s", (hashed, member.id))
        await log_activity(connection, "join", member, None, member.name)
    await start_session(call, member)
    return {"user": own(member)}


async def _invited(connection: Connection, token: str, lock: bool = False) -> Member:
    row = await (await connection.execute(_INVITED + "FOR UPDATE" * lock, (token_key(token),))).fetchone()
    if row is None:
        raise RpcError(rpc.NOT_FOUND, "this invitation was used already, has expired or never existed")
    return Member(**row)
