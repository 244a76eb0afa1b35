"""The identity of database clusters: patching pg_control, and templates that equal each other."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.programs import load_program

PROGRAM = Path(__file__).parents[2] / "recipes/postgresql/files/opt/samepage/libexec/postgresql-cluster"

cluster = load_program(PROGRAM)


def control(filling: bytes = b"") -> bytes:
    """A pg_control of the known version with a right checksum; its 8 KiB are as in PostgreSQL."""
    body = bytearray(filling.ljust(cluster.CRC_AT, b"\x5a")[: cluster.CRC_AT])
    struct.pack_into("<I", body, cluster.VERSION_AT, cluster.CONTROL_VERSION)
    return bytes(body) + struct.pack("<I", cluster.crc32c(bytes(body))) + bytes(8192 - cluster.CRC_AT - 4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],  # RFC 3720, B.4
)
def test_checksum(data: bytes, expected: int) -> None:
    assert cluster.crc32c(data) == expected


@given(
    st.binary(max_size=300),
    st.integers(0, 2**64 - 1),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**40),
)
def test_identity_is_all_that_changes(filling: bytes, identifier: int, nonce: bytes, seconds: int) -> None:
    before = control(filling)
    after = cluster.with_identity(before, identifier, nonce, seconds)
    cluster.check_control(after)
    assert struct.unpack_from("<Q", after)[0] == identifier
    assert after[cluster.NONCE_AT : cluster.NONCE_AT + 32] == nonce
    assert len(after) == len(before)
    own = [(0, 8), (cluster.TIME_AT, 8), (cluster.CHECKPOINT_TIME_AT, 8), (cluster.NONCE_AT, 32), (cluster.CRC_AT, 4)]
    mask = {position for start, size in own for position in range(start, start + size)}
    assert all(a == b for index, (a, b) in enumerate(zip(before, after, strict=True)) if index not in mask)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.binary(min_size=32, max_size=32), st.integers(0, 2**40))
def test_normal_form(filling: bytes, identifier: int, nonce: bytes, seconds: int) -> None:
    """Two clusters that differ in their identity only have the same normal form."""
    one = control(filling)
    other = cluster.with_identity(one, identifier, nonce, seconds)
    assert cluster.with_identity(one, 0, bytes(32), 0) == cluster.with_identity(other, 0, bytes(32), 0)


@given(st.integers(0, cluster.CRC_AT + 3), st.integers(1, 255))
def test_any_wrong_byte_is_found(position: int, change: int) -> None:
    broken = bytearray(control())
    broken[position] ^= change
    with pytest.raises(ValueError, match="pg_control has"):
        cluster.with_identity(bytes(broken), 1, bytes(32), 1)


def test_equal_files_are_shared(tmp_path: Path) -> None:
    for database in ("1", "4", "5"):
        (tmp_path / database).mkdir()
        (tmp_path / database / "same").write_text("same")
        (tmp_path / database / "own").write_text(database)
    (tmp_path / "5" / "only").write_text("only here")
    cluster.share_equal_files(str(tmp_path))
    assert (tmp_path / "1/same").stat().st_nlink == 3
    assert (tmp_path / "5/own").stat().st_nlink == 1
    assert (tmp_path / "5/own").read_text() == "5"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["template"]) == 64
    assert "FOLDER" in capsys.readouterr().err
