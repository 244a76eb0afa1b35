"""A signed document: the envelope of bundles and channel indexes. Part of the node's own code.

    magic      8 bytes, by kind
    version    1 byte
    key        8 bytes: id of the key that signed it
    size       4 bytes, unsigned, little-endian: size of the header
    signature  64 bytes: ed25519 over all of the above and the header
    header     a zstd frame of a JSON object

Nothing of the header is looked at before its signature is checked.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import zstandard

from appliance.node.keys import SIGNATURE_SIZE, Signer, Trust
from appliance.node.refusals import Damaged, ForeignFile, Truncated, UnknownFormat

VERSION = 1
_FRONT = struct.Struct("<8sB8sI")
FRONT_SIZE = _FRONT.size + SIGNATURE_SIZE
HEADER_LIMIT = 1 << 20  # bytes of the header, packed
_UNPACKED_LIMIT = 8 << 20


def seal(magic: bytes, value: Any, signer: Signer) -> bytes:
    """The signed document of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    header = zstandard.ZstdCompressor(level=19, write_content_size=True).compress(text)
    front = _FRONT.pack(magic, VERSION, bytes.fromhex(signer.id), len(header))
    return front + signer.sign(front + header) + header


def header_size(front: bytes, magic: bytes, what: str) -> int:
    """Size of the header, from the first FRONT_SIZE bytes. Raises ForeignFile, UnknownFormat, Truncated, Damaged."""
    if front[: len(magic)] != magic[: len(front)] or not front:
        raise ForeignFile(f"this is no {what}")
    if len(front) < FRONT_SIZE:
        raise Truncated(f"the {what} ends in its envelope")
    _, version, _, size = _FRONT.unpack_from(front)
    if version != VERSION:
        raise UnknownFormat(f"the {what} has format {version}, this program reads format {VERSION}")
    if size > HEADER_LIMIT:
        raise Damaged(f"the header of the {what} claims {size} bytes, more than any has")
    return int(size)


def unseal(front: bytes, header: bytes, trust: Trust, what: str) -> dict[str, Any]:
    """The JSON object of a document. Raises a Refusal unless a trusted key signed it."""
    _, _, identity, size = _FRONT.unpack_from(front)
    if len(header) < size:
        raise Truncated(f"the {what} ends in its header")
    trust.verify(identity.hex(), front[_FRONT.size :], front[: _FRONT.size] + header)
    try:
        if zstandard.get_frame_parameters(header).content_size > _UNPACKED_LIMIT:
            raise Damaged(f"the header of the {what} is larger than allowed")
        text = zstandard.ZstdDecompressor().decompress(header, max_output_size=_UNPACKED_LIMIT)
        value = json.loads(text)
    except (zstandard.ZstdError, ValueError, RecursionError) as error:
        raise Damaged(f"the header of the {what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"the header of the {what} is no object")
    return value
