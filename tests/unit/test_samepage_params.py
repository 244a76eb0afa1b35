"""The checks of the product's parameters."""

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samepage.params import Invalid, Pattern, Small, Text, Whole, bind, parameters_of
from samepage.rpc import INVALID_PARAMS, RpcError


async def handler(
    call: object,
    id: Annotated[int, Whole(1, 9)],
    title: Annotated[str, Text(5)] = "none",
    note: Annotated[str | None, Text(5)] = None,
) -> None:
    """What a method looks like."""


PARAMETERS = parameters_of(handler)


@pytest.mark.parametrize(
    ("given_", "bound"),
    [
        ({"id": 1}, {"id": 1}),
        ([1], {"id": 1}),
        ([9, " a ", None], {"id": 9, "title": "a"}),
        ({"title": "b", "id": 2, "note": "c"}, {"id": 2, "title": "b", "note": "c"}),
    ],
)
def test_parameters_bind_by_name_and_by_position(given_: Any, bound: dict[str, Any]) -> None:
    assert bind(PARAMETERS, given_) == bound


@pytest.mark.parametrize(
    ("given_", "faults"),
    [
        ({}, {"id": "is missing"}),
        ({"id": 0}, {"id": "must lie between 1 and 9"}),
        ({"id": True}, {"id": "must be a whole number"}),
        ({"id": 1.0}, {"id": "must be a whole number"}),
        ({"id": None}, {"id": "must be a whole number"}),
        ({"id": 1, "title": None}, {"title": "must be a string"}),
        (
            {"id": "x", "title": "123456", "ttle": 1},
            {"ttle": "is not a parameter of this method", "id": "must be a whole number",
             "title": "must have at most 5 characters"},
        ),
    ],
)  # fmt: skip
def test_all_faults_are_named(given_: Any, faults: dict[str, str]) -> None:
    with pytest.raises(RpcError) as caught:
        bind(PARAMETERS, given_)
    assert caught.value.code == INVALID_PARAMS
    assert caught.value.data == {"faults": faults}
    first = next(iter(faults))
    assert caught.value.message == f"{first} {faults[first]}"


def test_too_many_by_position_are_refused() -> None:
    with pytest.raises(RpcError, match="takes at most 3 parameters, 4 were given"):
        bind(PARAMETERS, [1, "a", "b", "c"])


@pytest.mark.parametrize(
    ("check", "value", "result"),
    [
        (Text(9), "  a b ", "a b"),
        (Text(9, lines=True), "a\r\nb\tc", "a\nb\tc"),
        (Text(9, trim=False), " a ", " a "),
        (Text(9, least=0), " ", ""),
        (Pattern("[a-z]+", "letters"), "abc", "abc"),
        (Small(20), {"a": [1, None]}, {"a": [1, None]}),
        (Small(40), "a\\u0000b", "a\\u0000b"),
    ],
)
def test_accepted_values(check: Any, value: Any, result: Any) -> None:
    assert check(value) == result


@pytest.mark.parametrize(
    ("check", "value", "why"),
    [
        (Text(9), "a\x00", "control characters"),
        (Text(9), "a\nb", "control characters"),
        (Text(9, lines=True), "a\x1bb", "control characters"),
        (Text(9), "\udfff", "broken characters"),
        (Text(9), "", "must not be empty"),
        (Text(20, least=12), "short", "at least 12"),
        (Text(9), 7, "must be a string"),
        (Pattern("[a-z]+", "letters"), "abc\n", "must be letters"),
        (Pattern("[a-z]+", "letters", most=2), "abc", "must be letters"),
        (Small(4), "abcd", "at most 4 bytes"),
        (Small(99), float("inf"), "finite"),
        (Small(99), {"a": ["\x00"]}, "control characters"),
        (Small(99), {"\ud800": 1}, "broken characters"),
    ],
)
def test_refused_values(check: Any, value: Any, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        check(value)


@given(st.text())
def test_accepted_text_can_be_stored(value: str) -> None:
    try:
        text = Text(100, lines=True)(value)
    except Invalid:
        return
    assert "\x00" not in text
    assert text.encode()
    assert 1 <= len(text) <= 100
