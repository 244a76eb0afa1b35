"""Items.*: the notes that the team keeps."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from .. import rpc
from ..api import Call, method
from ..database import Connection
from ..params import Number, Text, Version, Whole
from ..rpc import RpcError
from .comments import read_comments
from .shapes import log_activity, person

Title = Annotated[str, Text(200)]
Body = Annotated[str, Text(50_000, least=0, lines=True)]
MaybeTitle = Annotated[str | None, Text(200)]
MaybeBody = Annotated[str | None, Text(50_000, least=0, lines=True)]
Query = Annotated[str, Text(200, least=0)]
Limit = Annotated[int, Whole(1, 100)]
Offset = Annotated[int, Whole(0, 10_000)]

# Characters of the private use area stand around the words found in a snippet; clients turn them into marks.
_HEADLINE = "StartSel=\ue000, StopSel=\ue001, MaxWords=24, MinWords=12, MaxFragments=1"
_COLUMNS = """
i.id, i.title, i.body, i.version, i.created_at, i.updated_at,
c.id AS created_by_id, c.name AS created_by_name, u.id AS updated_by_id, u.name AS updated_by_name
"""
_PEOPLE = "JOIN members c ON c.id = i.created_by JOIN members u ON u.id = i.updated_by"
_ITEM = f"SELECT {_COLUMNS} FROM items i {_PEOPLE} WHERE i.id = %s"
_LIST = f"""
WITH wanted AS (SELECT {{query}} AS query),
found AS (
    SELECT i.id, i.updated_at, ts_rank(i.search, w.query) AS rank, count(*) OVER () AS total
    FROM items i, wanted w WHERE %(text)s = '' OR i.search @@ w.query
    ORDER BY rank DESC, i.updated_at DESC, i.id DESC LIMIT %(limit)s OFFSET %(offset)s
)
SELECT {_COLUMNS}, f.total, f.rank, (SELECT count(*) FROM comments WHERE item_id = i.id) AS comments,
       CASE WHEN %(text)s = '' THEN left(i.body, 200)
            ELSE ts_headline('english', i.body, w.query, '{_HEADLINE}') END AS snippet
FROM found f JOIN items i USING (id) {_PEOPLE}, wanted w
ORDER BY f.rank DESC, i.updated_at DESC, i.id DESC
"""
_BY_WORDS = _LIST.format(query="to_tsquery('english', %(words)s)")
_BY_SYNTAX = _LIST.format(query="websearch_to_tsquery('english', %(text)s)")


@method("Items.get")
async def get(call: Call, id: Number) -> Any:
    """One item with its comments."""
    async with call.services.pool.connection() as connection:
        row = await (await connection.execute(_ITEM, (id,))).fetchone()
        if row is None:
            raise RpcError(rpc.NOT_FOUND, "there is no such item")
        return {**_item(row), "comments": await read_comments(connection, id)}


@method("Items.getList")
async def get_list(call: Call, query: Query = "", limit: Limit = 30, offset: Offset = 0) -> Any:
    """Items, the latest changed first; with `query`, those that match, the best first."""
    async with call.services.pool.connection() as connection:
        return await read_list(connection, query, limit, offset)


async def read_list(connection: Connection, query: str, limit: int, offset: int) -> dict[str, Any]:
    """Plain words are found by their beginnings; quotes, minus and "or" mean what they do in web search."""
    words = re.findall(r"\w+", query) if re.fullmatch(r"[\w\s]*", query) and " or " not in query.lower() else []
    values = {"text": query, "words": " & ".join(f"{word}:*" for word in words), "limit": limit, "offset": offset}
    rows = await (await connection.execute(_BY_WORDS if words else _BY_SYNTAX, values)).fetchall()
    return {"items": [_summary(row) for row in rows], "total": rows[0]["total"] if rows else 0}


@method("Items.create")
async def create(call: Call, title: Title, body: Body = "") -> Any:
    async with call.services.pool.connection() as connection, connection.transaction():
        cursor = await connection.execute(
            "INSERT INTO items (title, body, created_by, updated_by) VALUES (%s, %s, %s, %s) RETURNING id",
            (title, body, call.member.id, call.member.id),
        )
        created = await cursor.fetchone()
        assert created is not None
        await log_activity(connection, "create", call.member, created["id"], title)
        return {**await _read(connection, created["id"]), "comments": []}


@method("Items.update")
async def update(call: Call, id: Number, version: Version, title: MaybeTitle = None, body: MaybeBody = None) -> Any:
    """Change an item that still has `version`; otherwise the error's data holds the item as it is now."""
    if title is None and body is None:
        raise RpcError(rpc.INVALID_PARAMS, "title or body is missing")
    async with call.services.pool.connection() as connection, connection.transaction():
        cursor = await connection.execute(
            "UPDATE items SET title = coalesce(%s, title), body = coalesce(%s, body), version = version + 1,"
            " updated_by = %s, updated_at = now() WHERE id = %s AND version = %s RETURNING title",
            (title, body, call.member.id, id, version),
        )
        changed = await cursor.fetchone()
        current = await _read(connection, id)
        if changed is None:
            raise RpcError(rpc.CONFLICT, "somebody else has changed this item", {"current": current})
        await log_activity(connection, "update", call.member, id, changed["title"])
        return current


@method("Items.delete")
async def delete(call: Call, id: Number) -> Any:
    """Remove an item with its comments: for its author and administrators."""
    async with call.services.pool.connection() as connection, connection.transaction():
        item = await _read(connection, id, lock=True)
        if item["createdBy"]["id"] != call.member.id and not call.member.administrator:
            raise RpcError(rpc.NOT_ALLOWED, "only its author or an administrator may delete an item")
        await connection.execute("DELETE FROM items WHERE id = %s", (id,))
        await log_activity(connection, "delete", call.member, id, item["title"])
    return {"deleted": id}


async def _read(connection: Connection, id: int, lock: bool = False) -> dict[str, Any]:
    row = await (await connection.execute(_ITEM + " FOR UPDATE OF i" * lock, (id,))).fetchone()
    if row is None:
        raise RpcError(rpc.NOT_FOUND, "there is no such item")
    return _item(row)


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "title": row["title"],
        "body": row["body"],
        "version": row["version"],
        "createdAt": row["created_at"],
        "updatedAt": row["updated_at"],
        "createdBy": person(row, "created_by"),
        "updatedBy": person(row, "updated_by"),
    }


def _summary(row: Mapping[str, Any]) -> dict[str, Any]:
    summary = {**_item(row), "snippet": row["snippet"], "comments": row["comments"]}
    del summary["body"]
    return summary
