"""Bootstrap.*: all that the page needs at its start, in one call."""

from typing import Any

from ..api import Access, Call, method
from .activities import read_stream
from .items import read_list
from .shapes import own


@method("Bootstrap.bootstrap", Access.EVERYBODY)
async def bootstrap(call: Call) -> Any:
    """The release and the member; the first page of items and of the stream for those who may see them."""
    member = call.exchange.member
    answer: dict[str, Any] = {"release": call.services.release, "node": call.services.settings.node, "user": None}
    if member is None:
        return answer
    answer["user"] = own(member)
    if not member.must_change_password:
        async with call.services.pool.connection() as connection:
            answer["list"] = await read_list(connection, "", 30, 0)
            answer["stream"] = await read_stream(connection, None, None, 30)
    return answer
