"""Stats.*: figures that the page measures."""

from typing import Annotated, Any

from psycopg.types.json import Jsonb

from ..api import Call, method
from ..params import Pattern, Small

Name = Annotated[str, Pattern(r"[a-z][a-zA-Z0-9_.-]{0,63}", "a name of letters, digits, dots and dashes")]
Value = Annotated[object, Small(2048)]


@method("Stats.save")
async def save(call: Call, name: Name, value: Value) -> Any:
    async with call.services.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO stats (member_id, name, value) VALUES (%s, %s, %s)", (call.member.id, name, Jsonb(value))
        )
    return {}
