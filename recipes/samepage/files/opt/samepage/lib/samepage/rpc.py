"""JSON-RPC 2.0: from the bytes of a request to the bytes of its answer.

Nothing here knows of HTTP, the database or the methods, so the whole protocol is tested with plain functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from .clock import timestamp

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
# The product's own codes, from the range that the specification leaves to servers.
NOT_SIGNED_IN = -32001
NOT_ALLOWED = -32002
NOT_FOUND = -32003
CONFLICT = -32004
TOO_MANY_ATTEMPTS = -32005
PASSWORD_CHANGE_NEEDED = -32006
WRONG_CREDENTIALS = -32007
UNAVAILABLE = -32010
TOO_LARGE = -32011

Id = str | int | float | None


class RpcError(Exception):
    """A failure that the client is told: `code` by the list above, one sentence, and optional JSON data."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


@dataclass(frozen=True, slots=True)
class Request:
    """One call. `params` is a mapping (by name) or a sequence (by position)."""

    method: str
    params: Mapping[str, Any] | Sequence[Any]
    id: Id
    notification: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """`body` in bytes, `batch` in calls."""

    body: int = 1024 * 1024
    batch: int = 50


Serve = Callable[[Request], Awaitable[Any]]


async def answer(body: bytes, serve: Serve, limits: Limits) -> bytes | None:
    """The answer to a request body; None when nothing is to be said (only notifications).

    `serve` returns a result or raises RpcError; every other exception must have been turned into one by `serve`.
    The calls of a batch run one after the other, in their order, because later ones may rest on earlier ones.
    """
    try:
        document = decode(body, limits)
    except RpcError as error:
        return encode(failure(None, error))
    if not isinstance(document, list):
        response = await _serve_one(document, serve)
        return None if response is None else encode(response)
    if not document:
        return encode(failure(None, RpcError(INVALID_REQUEST, "a batch must not be empty")))
    if len(document) > limits.batch:
        return encode(failure(None, RpcError(TOO_LARGE, f"a batch holds at most {limits.batch} calls")))
    responses = [response for entry in document if (response := await _serve_one(entry, serve)) is not None]
    return encode(responses) if responses else None


def decode(body: bytes, limits: Limits) -> Any:
    """The JSON document in `body`. Raises RpcError for what is too large or is not JSON (RFC 8259: UTF-8, no NaN)."""
    if len(body) > limits.body:
        raise RpcError(TOO_LARGE, f"a request holds at most {limits.body} bytes")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "the request is not valid JSON") from None


def encode(document: Any) -> bytes:
    """Compact JSON. ASCII only, because a client may echo a lone surrogate through an id."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False, default=_plain).encode("ascii")


def success(request_id: Id, result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": result, "id": request_id}


def failure(request_id: Id, error: RpcError) -> dict[str, Any]:
    described: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.data is not None:
        described["data"] = error.data
    return {"jsonrpc": "2.0", "error": described, "id": request_id}


async def _serve_one(entry: Any, serve: Serve) -> dict[str, Any] | None:
    try:
        request = parse(entry)
    except RpcError as error:
        return failure(_id_of(entry), error)
    try:
        result = await serve(request)
    except RpcError as error:
        return None if request.notification else failure(request.id, error)
    return None if request.notification else success(request.id, result)


def parse(entry: Any) -> Request:
    """One call out of a decoded document. Raises RpcError(INVALID_REQUEST)."""
    if not isinstance(entry, dict):
        raise RpcError(INVALID_REQUEST, "a call is a JSON object")
    if entry.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'the member "jsonrpc" must be "2.0"')
    method = entry.get("method")
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, 'the member "method" must be a string')
    params = entry.get("params", {})
    if not isinstance(params, (dict, list)):
        raise RpcError(INVALID_REQUEST, 'the member "params" must be an object or an array')
    if "id" in entry and not _is_id(entry["id"]):
        raise RpcError(INVALID_REQUEST, 'the member "id" must be a string, a number or null')
    return Request(method, params, entry.get("id"), notification="id" not in entry)


def _id_of(entry: Any) -> Id:
    """The id to answer a broken call with: its own if that much is readable, otherwise null."""
    found = entry.get("id") if isinstance(entry, dict) else None
    return found if _is_id(found) else None


def _is_id(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return timestamp(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
