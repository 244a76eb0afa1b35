"""Activities.*: what happened, newest first."""

from collections.abc import Mapping
from typing import Annotated, Any

from ..api import Call, method
from ..database import Connection
from ..params import MaybeNumber, Whole
from .shapes import person

Limit = Annotated[int, Whole(1, 100)]

_STREAM = """
SELECT a.id, a.at, a.kind, a.item_id, coalesce(i.title, a.title) AS title, i.id IS NOT NULL AS present,
       m.id AS member_id, m.name AS member_name
FROM activities a JOIN members m ON m.id = a.member_id LEFT JOIN items i ON i.id = a.item_id
WHERE (%(item)s::bigint IS NULL OR a.item_id = %(item)s) AND (%(before)s::bigint IS NULL OR a.id < %(before)s)
ORDER BY a.id DESC LIMIT %(limit)s
"""


@method("Activities.getItemStream")
async def get_item_stream(call: Call, itemId: MaybeNumber = None, before: MaybeNumber = None, limit: Limit = 30) -> Any:
    """What happened to all items or one. `next` is the `before` of the following page, null at the end."""
    async with call.services.pool.connection() as connection:
        return await read_stream(connection, itemId, before, limit)


async def read_stream(connection: Connection, item: int | None, before: int | None, limit: int) -> dict[str, Any]:
    cursor = await connection.execute(_STREAM, {"item": item, "before": before, "limit": limit + 1})
    rows = await cursor.fetchall()
    page = rows[:limit]
    return {"activities": [_activity(row) for row in page], "next": page[-1]["id"] if len(rows) > limit else None}


def _activity(row: Mapping[str, Any]) -> dict[str, Any]:
    item = None
    if row["item_id"] is not None:
        item = {"id": row["item_id"], "title": row["title"], "exists": row["present"]}
    return {
        "id": row["id"],
        "at": row["at"],
        "kind": row["kind"],
        "title": row["title"],
        "item": item,
        "member": person(row, "member"),
    }
