"""The product's JSON-RPC 2.0, example by example as in the specification, and its own limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samepage import rpc


async def serve(request: rpc.Request) -> Any:
    """The methods of the specification's examples."""
    if request.method == "subtract":
        if isinstance(request.params, Mapping):
            return request.params["minuend"] - request.params["subtrahend"]
        return request.params[0] - request.params[1]
    if request.method == "sum":
        return sum(request.params)
    if request.method in ("update", "notify_sum", "notify_hello"):
        return None
    if request.method == "get_data":
        return ["hello", 5]
    if request.method == "echo":
        return request.params
    raise rpc.RpcError(rpc.METHOD_NOT_FOUND, "there is no such method", {"asked": request.method[:20]})


def ask(body: bytes | str, limits: rpc.Limits | None = None) -> Any:
    raw = body.encode() if isinstance(body, str) else body
    answer = asyncio.run(rpc.answer(raw, serve, limits or rpc.Limits()))
    return None if answer is None else json.loads(answer)


def outline(answer: Any) -> Any:
    """An answer with only the code of an error left."""
    if isinstance(answer, list):
        return [outline(one) for one in answer]
    assert answer.pop("jsonrpc") == "2.0"
    assert ("result" in answer) != ("error" in answer)
    return (answer["id"], answer["result"] if "result" in answer else answer["error"]["code"])


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', (1, 19)),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}', (2, -19)),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}', (3, 19)),
        ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', ("1", -32601)),
        ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', (None, -32700)),
        ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', (None, -32600)),
        ('[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0"', (None, -32700)),
        ("[]", (None, -32600)),
        ("[1]", [(None, -32600)]),
        ("[1,2,3]", [(None, -32600)] * 3),
        (
            '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
            '{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},'
            '{"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},'
            '{"foo": "boo"},'
            '{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},'
            '{"jsonrpc": "2.0", "method": "get_data", "id": "9"}]',
            [("1", 7), ("2", 19), (None, -32600), ("5", -32601), ("9", ["hello", 5])],
        ),
    ],
    ids=["by-position", "by-position-2", "by-name", "no-method", "broken", "invalid", "broken-batch", "empty-batch",
         "invalid-batch", "invalid-batch-of-3", "mixed-batch"],
)  # fmt: skip
def test_examples_of_the_specification(request_: str, expected: Any) -> None:
    assert outline(ask(request_)) == expected


@pytest.mark.parametrize(
    "request_",
    [
        '{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}',
        '{"jsonrpc": "2.0", "method": "foobar"}',
        '[{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]}, {"jsonrpc": "2.0", "method": "no"}]',
    ],
)
def test_notifications_are_never_answered(request_: str) -> None:
    assert ask(request_) is None


@pytest.mark.parametrize("id_", ["", "a", "\ud800", 0, -1, 1.5, 10**30, None])
def test_every_allowed_id_comes_back(id_: Any) -> None:
    assert ask(json.dumps({"jsonrpc": "2.0", "method": "get_data", "id": id_}))["id"] == id_


@pytest.mark.parametrize("id_", ["true", "[]", "{}", "[1]", "1e999"])
def test_other_ids_are_refused_and_answered_with_null(id_: str) -> None:
    assert outline(ask(f'{{"jsonrpc":"2.0","method":"get_data","id":{id_}}}')) == (None, rpc.INVALID_REQUEST)


def test_a_broken_call_is_answered_under_its_own_id() -> None:
    assert outline(ask('{"jsonrpc":"1.0","method":"get_data","id":4}')) == (4, rpc.INVALID_REQUEST)
    assert outline(ask('{"jsonrpc":"2.0","method":"get_data","params":7,"id":4}')) == (4, rpc.INVALID_REQUEST)
    assert outline(ask('{"jsonrpc":"2.0","method":"get_data","params":null,"id":4}')) == (4, rpc.INVALID_REQUEST)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b'{"id": NaN}', b"[" * 200_000, b"1" * 5000, '{"a":1}'.encode("utf-16"), b"{'a': 1}",
     b"\xef\xbb\xbf{}"],
    ids=["empty", "bytes", "nan", "deep", "long-number", "utf-16", "quotes", "byte-order-mark"],
)  # fmt: skip
def test_what_is_not_json_is_a_parse_error(body: bytes) -> None:
    assert outline(ask(body)) == (None, rpc.PARSE_ERROR)


def test_sizes_are_limited() -> None:
    call = {"jsonrpc": "2.0", "method": "get_data", "id": 1}
    limits = rpc.Limits(body=1000, batch=3)
    assert len(ask(json.dumps([call] * 3), limits)) == 3
    assert outline(ask(json.dumps([call] * 4), limits)) == (None, rpc.TOO_LARGE)
    assert outline(ask(json.dumps(call) + " " * 1000, limits)) == (None, rpc.TOO_LARGE)


def test_errors_carry_data_only_if_there_is_some() -> None:
    error = ask('{"jsonrpc":"2.0","method":"none","id":1}')["error"]
    assert error == {"code": -32601, "message": "there is no such method", "data": {"asked": "none"}}
    assert "data" not in ask("[]")["error"]


def test_calls_of_a_batch_run_in_their_order() -> None:
    order: list[int] = []

    async def slow_first(request: rpc.Request) -> None:
        assert isinstance(request.params, list)
        number = request.params[0]
        await asyncio.sleep(0.02 if number == 0 else 0)
        order.append(number)

    batch = [{"jsonrpc": "2.0", "method": "x", "params": [number]} for number in range(4)]
    asyncio.run(rpc.answer(json.dumps(batch).encode(), slow_first, rpc.Limits()))
    assert order == [0, 1, 2, 3]


def test_moments_are_written_in_utc() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    assert rpc.encode(moment) == b'"2026-01-02T01:04:05.678Z"'
    with pytest.raises(TypeError):
        rpc.encode(object())


@given(st.binary(max_size=300))
def test_any_bytes_get_a_proper_answer(body: bytes) -> None:
    answer = ask(body)
    assert answer is None or outline(answer) is not None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.lists(_JSON, max_size=4) | st.dictionaries(st.text(), _JSON, max_size=4), st.none() | st.text() | st.integers()
)
def test_parameters_and_ids_arrive_as_they_were_sent(params: Any, id_: Any) -> None:
    answer = ask(json.dumps({"jsonrpc": "2.0", "method": "echo", "params": params, "id": id_}))
    assert (answer["result"], answer["id"]) == (params, id_)


@given(_JSON)
def test_any_document_is_answered_by_the_rules(document: Any) -> None:
    answer = ask(json.dumps(document))
    if isinstance(document, list) and document:
        assert len(answer) == len(document)
    else:
        assert outline(answer)[0] is None or isinstance(document, dict)
