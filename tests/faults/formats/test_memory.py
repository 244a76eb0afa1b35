"""Memory is bounded, whatever a file claims."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from appliance.node import bundle, channel, signed
from appliance.node.delta import ZERO, put_number
from tests.faults.formats.sample import Sample
from tests.unit.releases import SIGNER

ROOT = Path(__file__).parents[3]

LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from appliance.node import bundle, channel, keys, refusals, release
from appliance.node.upgrade import journal, records
trust = keys.Trust({{ {id!r}: bytes.fromhex({public!r}) }})
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + ({more} << 20),) * 2)
try:
    print({call})
except (refusals.Refusal, ValueError) as error:
    print(type(error).__name__, str(error)[:200])
"""


def sealed(magic: bytes, packed: bytes, size: int | None = None) -> bytes:
    front = signed._FRONT.pack(magic, 1, bytes.fromhex(SIGNER.id), len(packed) if size is None else size)
    return front + SIGNER.sign(front + packed) + packed


def zstd(content: bytes, repeat: int = 1) -> bytes:
    """A frame of the content, again and again, without its size in front."""
    import zstandard

    machine = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return b"".join(machine.compress(content) for _ in range(repeat)) + machine.flush()


def bomb(sample: Sample) -> bytes:
    """A bundle whose manifest is a gigabyte of zeros."""
    out = bytearray()
    put_number(out, (1 << 30) << 3 | ZERO)
    ops = zstd(bytes(out))
    head = bytearray()
    for size in (len(ops), 0, 0, 0, 0):
        put_number(head, size)
    payload = bytes(head) + ops
    header = json.loads(json.dumps(sample.header))
    header["parts"] = [header["parts"][0] | {"packed": len(payload), "size": bundle.MANIFEST_LIMIT}]
    header["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    return signed.seal(bundle.MAGIC, header, SIGNER) + payload


def part_of(size: int) -> Callable[[Sample], bytes]:
    def make(sample: Sample) -> bytes:
        header = json.loads(json.dumps(sample.header))
        header["parts"][0]["packed"] += header["parts"][1]["packed"] - size
        header["parts"][1]["packed"] = size
        return signed.seal(bundle.MAGIC, header, SIGNER) + sample.payload

    return make


OPEN = 'bundle.open_bundle(sys.argv[1], trust).__enter__().manifest(open(sys.argv[2], "rb").read())'
INFO, PARSE = "bundle.read_info(sys.argv[1], trust)", "channel.parse_index(open(sys.argv[1], 'rb').read(), trust)"
MANIFEST = "release.parse(open(sys.argv[1], 'rb').read())"
SMALL, LARGE = 64, 512  # MiB
BOMBS: dict[str, tuple[Callable[[Sample], bytes], str, int, str]] = {
    "a header of 4 GB": (lambda _: sealed(bundle.MAGIC, b"x", (1 << 32) - 1), INFO, SMALL, "Damaged"),
    "a header of zeros": (lambda _: sealed(bundle.MAGIC, zstd(bytes(1 << 20), 300)), INFO, SMALL, "Damaged"),
    "a header that is deep": (lambda _: sealed(bundle.MAGIC, zstd(b"[" * (4 << 20))), INFO, SMALL, "Damaged"),
    "a header with a long number": (lambda _: sealed(bundle.MAGIC, zstd(b"1" * (4 << 20))), INFO, SMALL, "Damaged"),
    "a header of many things": (
        lambda _: sealed(bundle.MAGIC, zstd(b'{"from":[' + b"{}," * 2_700_000 + b"{}]}")), INFO, LARGE, "Damaged"
    ),
    "an index of zeros": (lambda _: sealed(channel.MAGIC, zstd(bytes(1 << 20), 300)), PARSE, SMALL, "Damaged"),
    "an index that is deep": (lambda _: sealed(channel.MAGIC, zstd(b'{"a":' * 800_000)), PARSE, SMALL, "Damaged"),
    "a manifest of zeros": (bomb, OPEN, SMALL, "Damaged"),
    "a part that is larger than the file": (part_of(1 << 40), OPEN, SMALL, "Damaged"),
    "a manifest that is deep": (lambda _: b"[" * (16 << 20), MANIFEST, SMALL, "ReleaseError"),
    "a manifest of many things": (lambda _: b"[" + b"[]," * (5 << 20) + b"[]]", MANIFEST, LARGE, "ReleaseError"),
    "a journal that is large": (
        lambda _: b" " * (64 << 20), "records.read_small(sys.argv[1], 1 << 20)", 16, "None"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded_whatever_is_claimed(sample: Sample, tmp_path: Path, name: str) -> None:
    make, call, more, expected = BOMBS[name]
    (tmp_path / "file").write_bytes(make(sample))
    (tmp_path / "old").write_bytes(sample.old.content)
    script = LIMITED.format(root=str(ROOT), id=SIGNER.id, public=SIGNER.public.hex(), more=more, call=call)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "file", tmp_path / "old"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected), done.stdout
