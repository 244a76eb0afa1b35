"""Comments.*: what members say about an item."""

from collections.abc import Mapping
from typing import Annotated, Any

import psycopg

from .. import rpc
from ..api import Call, method
from ..database import Connection
from ..params import Number, Text
from ..rpc import RpcError
from .shapes import log_activity, person

Body = Annotated[str, Text(5000, lines=True)]
_NEWEST = 200


@method("Comments.add")
async def add(call: Call, itemId: Number, body: Body) -> Any:
    async with call.services.pool.connection() as connection:
        try:
            async with connection.transaction():
                cursor = await connection.execute(
                    "INSERT INTO comments (item_id, member_id, body) VALUES (%s, %s, %s)"
                    " RETURNING id, body, created_at, (SELECT title FROM items WHERE id = item_id) AS title",
                    (itemId, call.member.id, body),
                )
                row = await cursor.fetchone()
                assert row is not None
                await log_activity(connection, "comment", call.member, itemId, row["title"])
        except psycopg.errors.IntegrityError:
            raise RpcError(rpc.NOT_FOUND, "there is no such item") from None
    return _comment({**row, "member_id": call.member.id, "member_name": call.member.name})


async def read_comments(connection: Connection, item: int) -> list[dict[str, Any]]:
    """The newest comments of an item, oldest first."""
    cursor = await connection.execute(
        "SELECT * FROM (SELECT c.id, c.body, c.created_at, m.id AS member_id, m.name AS member_name"
        " FROM comments c JOIN members m ON m.id = c.member_id WHERE c.item_id = %s ORDER BY c.id DESC LIMIT %s) newest"
        " ORDER BY id",
        (item, _NEWEST),
    )
    return [_comment(row) for row in await cursor.fetchall()]


def _comment(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "body": row["body"], "createdAt": row["created_at"], "member": person(row, "member")}
