"""Passwords: scrypt hashes that carry their own cost, and one-time passwords that can be typed from a console."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # no letter that looks like a digit


@dataclass(frozen=True, slots=True)
class Cost:
    """scrypt's parameters; one hash takes 128 * n * r bytes and time in proportion to n * r * p."""

    n: int
    r: int
    p: int


CHOSEN = Cost(2**14, 8, 5)  # what people choose can be guessed, so each guess must be dear: 16 MiB, 0.2 s on a server
MADE = Cost(2**10, 8, 1)  # 79 random bits cannot be guessed; the first boot need not wait for more


def make_password() -> str:
    """A one-time password of 16 characters in groups of four, 79 bits."""
    return "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(4))


def make_token() -> str:
    """A secret of 256 bits for a link or a cookie."""
    return secrets.token_urlsafe(32)


def token_key(token: str) -> str:
    """What is stored in place of a token, so that reading the store does not give the secret."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def hash_password(password: str, cost: Cost = CHOSEN) -> str:
    salt = secrets.token_bytes(16)
    fields = ("scrypt", cost.n, cost.r, cost.p, _encode(salt), _encode(_derive(password, salt, cost)))
    return ":".join(map(str, fields))


def verify_password(password: str, stored: str) -> bool:
    """Whether `password` is the one that `stored` was made from; False for a hash that cannot be read."""
    try:
        cost, salt, expected = _parse(stored)
    except ValueError:
        return False
    return hmac.compare_digest(_derive(password, salt, cost), expected)


def _derive(password: str, salt: bytes, cost: Cost) -> bytes:
    memory = 128 * cost.r * (cost.n + cost.p + 2)
    return hashlib.scrypt(password.encode(), salt=salt, n=cost.n, r=cost.r, p=cost.p, maxmem=memory, dklen=32)


def _parse(stored: str) -> tuple[Cost, bytes, bytes]:
    kind, n, r, p, salt, expected = stored.split(":")
    if kind != "scrypt":
        raise ValueError(kind)
    return Cost(int(n), int(r), int(p)), base64.b64decode(salt), base64.b64decode(expected)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# Checked in place of a missing member's hash, so that the time of an answer does not tell who exists.
NOBODY = f"scrypt:{CHOSEN.n}:{CHOSEN.r}:{CHOSEN.p}:{_encode(bytes(16))}:{_encode(bytes(32))}"
