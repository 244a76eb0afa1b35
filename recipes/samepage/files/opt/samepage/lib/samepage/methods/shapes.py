"""How rows look to clients."""

from collections.abc import Mapping
from typing import Any

from ..api import Member
from ..database import Connection


def own(member: Member) -> dict[str, Any]:
    """The signed-in member, as told to themselves."""
    return {
        "id": member.id,
        "login": member.login,
        "name": member.name,
        "email": member.email,
        "role": member.role,
        "group": member.group,
        "timezone": member.timezone,
        "mustChangePassword": member.must_change_password,
    }


def person(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A member named in columns `<prefix>_id` and `<prefix>_name`."""
    return {"id": row[f"{prefix}_id"], "name": row[f"{prefix}_name"]}


async def log_activity(connection: Connection, kind: str, member: Member, item: int | None, title: str) -> None:
    """Add to the stream, in the caller's transaction."""
    await connection.execute(
        "INSERT INTO activities (kind, member_id, item_id, title) VALUES (%s, %s, %s, %s)",
        (kind, member.id, item, title),
    )
