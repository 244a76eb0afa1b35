"""The product's passwords and one-time passwords."""

from __future__ import annotations

import re

import pytest
from samepage.passwords import (
    CHOSEN,
    MADE,
    NOBODY,
    Cost,
    hash_password,
    make_password,
    make_token,
    token_key,
    verify_password,
)

CHEAP = Cost(16, 1, 1)


def test_a_hash_fits_its_password_only() -> None:
    stored = hash_password("correct horse 好", CHEAP)
    assert verify_password("correct horse 好", stored)
    assert not verify_password("correct horse 好 ", stored)
    assert not verify_password("", stored)


def test_equal_passwords_have_different_hashes() -> None:
    assert hash_password("same", CHEAP) != hash_password("same", CHEAP)


def test_a_hash_keeps_its_cost_when_the_default_changes() -> None:
    assert hash_password("x", CHEAP).startswith("scrypt:16:1:1:")
    assert verify_password("x", hash_password("x", Cost(32, 2, 1)))


def test_chosen_passwords_cost_much_and_made_ones_little() -> None:
    assert hash_password("x").startswith("scrypt:16384:8:5:")
    assert CHOSEN.n * CHOSEN.p >= 50 * MADE.n * MADE.p
    assert verify_password("x", hash_password("x", MADE))


@pytest.mark.parametrize("stored", ["", "x", "scrypt:16:1:1:AA==", "bcrypt:16:1:1:AA==:AA==", "scrypt:a:1:1:AA==:AA=="])
def test_an_unreadable_hash_fits_nothing(stored: str) -> None:
    assert not verify_password("", stored)
    assert not verify_password("x", stored)


def test_nobody_has_a_password_but_costs_as_much_as_somebody() -> None:
    assert not verify_password("", NOBODY)
    assert NOBODY.split(":")[1:4] == hash_password("x").split(":")[1:4]


def test_made_passwords_can_be_typed_and_do_not_repeat() -> None:
    made = {make_password() for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(r"([a-km-np-z2-9]{4}-){3}[a-km-np-z2-9]{4}", one) for one in made)
    assert not any(set(one) & set("il1o0") for one in made)


def test_tokens_are_stored_under_another_name() -> None:
    token = make_token()
    assert len(token) == 43
    assert token not in token_key(token)
    assert token_key(token) == token_key(token) != token_key(make_token())
    assert len(token_key("\ud800")) == 64
