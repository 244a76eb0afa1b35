"""Keys that sign bundles and channels: ed25519. Part of the node's own code.

A public key is a text file `<name>.pub` with one line, a secret key the same with another first word:

    samepage-public-key-1 <32 bytes in base64> <comment>

The id of a key is the first 8 bytes of the sha256 of its public key, in hex. A node trusts every key in its folder of
trusted keys but those whose ids stand in that folder's file `revoked`, one id per line; what follows a '#' is a remark.
A channel's index may revoke more.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from appliance.node.refusals import BadSignature, RevokedKey, UnknownKey

PUBLIC, SECRET = "samepage-public-key-1", "samepage-secret-key-1"
ID_SIZE = 8
SIGNATURE_SIZE = 64
_KEY_SIZE = 32
_FILE_LIMIT = 1 << 16
ID = re.compile(r"[0-9a-f]{16}\Z")


class KeyFileError(ValueError):
    """A key file is not what it should be."""


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).digest()[:ID_SIZE].hex()


def parse_key(content: bytes, word: str) -> bytes:
    """The 32 bytes of a key file that begins with `word`. Raises KeyFileError."""
    words = content[:_FILE_LIMIT].decode("ascii", "replace").split(maxsplit=2)
    if len(words) < 2 or words[0] != word:
        raise KeyFileError(f"a line that begins with {word} was expected")
    try:
        key = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise KeyFileError("the key is not base64") from error
    if len(key) != _KEY_SIZE:
        raise KeyFileError(f"the key has {len(key)} bytes, not {_KEY_SIZE}")
    return key


def dump_key(key: bytes, word: str, comment: str) -> bytes:
    return f"{word} {base64.b64encode(key).decode()} {comment}".rstrip().encode() + b"\n"


def parse_revoked(content: bytes) -> frozenset[str]:
    """Ids of a revocation list. Raises KeyFileError for a line that is none: a list half read would trust too much."""
    lines = (line.partition("#")[0].strip() for line in content.decode("ascii", "replace").splitlines())
    found = frozenset(line for line in lines if line)
    for line in found:
        if not ID.match(line):
            raise KeyFileError(f"{line!r:.40} in the list of revoked keys is no key id")
    return found


class Signer(NamedTuple):
    """A secret key."""

    secret: bytes

    @property
    def public(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return key_id(self.public)

    @property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.secret)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


class Trust(NamedTuple):
    """Public keys by id, and the ids that are revoked."""

    keys: Mapping[str, bytes]
    revoked: frozenset[str] = frozenset()

    def revoking(self, ids: Iterable[str]) -> Trust:
        """The same keys with more of them revoked."""
        return Trust(self.keys, self.revoked | frozenset(ids))

    def verify(self, identity: str, signature: bytes, message: bytes) -> None:
        """Raise RevokedKey, UnknownKey or BadSignature unless the key `identity` signed the message."""
        if identity in self.revoked:
            raise RevokedKey(f"the key {identity} that signed this is revoked")
        public = self.keys.get(identity)
        if public is None:
            raise UnknownKey(f"this is signed by the key {identity}, which is not trusted here")
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except InvalidSignature as error:
            raise BadSignature("the signature does not fit the content") from error


def load_trust(folder: str) -> Trust:
    """The keys of a folder, its `revoked` file obeyed. Raises KeyFileError that names a file it cannot read."""
    keys: dict[str, bytes] = {}
    revoked: frozenset[str] = frozenset()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        try:
            if name.endswith(".pub"):
                with open(path, "rb") as file:
                    public = parse_key(file.read(_FILE_LIMIT), PUBLIC)
                keys[key_id(public)] = public
            elif name == "revoked":
                with open(path, "rb") as file:
                    revoked = parse_revoked(file.read())
        except KeyFileError as error:
            raise KeyFileError(f"{path}: {error}") from error
    return Trust(keys, revoked)
