"""GlobalSettings.*: what holds for the whole site and the browser in use."""

from dataclasses import replace
from typing import Annotated, Any

from ..api import Access, Call, method
from ..params import Text, Whole
from ..timezones import detect

Zone = Annotated[str, Text(64, least=0)]
Offset = Annotated[int, Whole(-14 * 60, 14 * 60)]


@method("GlobalSettings.detectTimezone", Access.EVERYBODY)
async def detect_timezone(call: Call, zone: Zone = "", january: Offset = 0, july: Offset = 0) -> Any:
    """The time zone of a browser, from its own idea or its offsets from UTC in minutes; kept for signed-in members."""
    found = detect(zone, january, july)
    member = call.exchange.member
    if member is not None and member.timezone != found and not member.must_change_password:
        async with call.services.pool.connection() as connection:
            await connection.execute("UPDATE members SET timezone = %s WHERE id = %s", (found, member.id))
        call.exchange.member = replace(member, timezone=found)
    return {"timezone": found}
