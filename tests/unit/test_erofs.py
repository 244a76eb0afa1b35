"""The reader of EROFS images: what it finds, and that no damage makes it crash."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import cpio, erofs, initrd
from tests.unit.erofs_writer import image

NAMES = st.text("abcXYZ019._-", min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))
TREES = st.dictionaries(st.builds("/{}/{}".format, NAMES, NAMES), st.binary(max_size=9000), max_size=12)


def read_back(content: bytes) -> dict[str, bytes]:
    found = erofs.parse(content)
    return {file.path: erofs.content_of(content, file) for file in found.files if stat.S_ISREG(file.mode)}


@given(TREES, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_finds_every_file_with_its_content(tree: dict[str, bytes], inline: bool, extended: bool) -> None:
    assert read_back(image(tree, inline=inline, extended=extended)) == tree


def test_finds_links_and_folders_and_large_folders() -> None:
    tree = {f"/many/file-{number:04}": b"x" * number for number in range(600)} | {"/link": b"link:/many"}
    content = image(tree)
    by_path = {file.path: file for file in erofs.parse(content).files}
    assert erofs.content_of(content, by_path["/link"]) == b"/many"
    assert stat.S_ISDIR(by_path["/many"].mode)
    assert by_path["/many"].size > erofs.BLOCK
    assert read_back(content) == {path: data for path, data in tree.items() if path != "/link"}


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (1024, b"\0", "no EROFS image"),
        (1024 + 12, b"\x09", "features"),
        (1024 + 36, b"\xff\xff", "cut off"),
        (1024 + 80, b"\x01", "features"),
    ],
)
def test_refuses_what_the_builder_does_not_write(at: int, value: bytes, message: str) -> None:
    content = bytearray(image({"/a/b": b"c"}))
    content[at : at + len(value)] = value
    with pytest.raises(erofs.ErofsError, match=message):
        erofs.parse(bytes(content))


def test_refuses_an_empty_and_a_short_file(tmp_path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(erofs.ErofsError, match="empty"):
        erofs.read(tmp_path / "empty")
    with pytest.raises(erofs.ErofsError, match="cut off"):
        erofs.parse(image({"/a/b": b""})[:1100])


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(image({"/a/b": b"c" * 5000, "/a/d": b"e", "/f/g": b"link:h"}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(1024, 2048))] = data.draw(st.integers(0, 255))
    damaged = bytes(content)
    try:
        found = erofs.parse(damaged)
    except erofs.ErofsError:
        return
    assert all(run.end <= len(damaged) for file in found.files for run in file.data)


def test_reads_what_the_ram_disk_writer_writes() -> None:
    members = [initrd.plain("etc/one", b"1" * 10), initrd.link("two", "etc/one"), initrd.program("init", b"#!")]
    content = initrd.pack(members)
    found = {entry.path: content[entry.data.offset : entry.data.end] for entry in cpio.parse(content)}
    assert found == {"/etc": b"", "/etc/one": b"1" * 10, "/two": b"etc/one", "/init": b"#!"}


@given(st.binary(max_size=200), st.integers(0, 700))
@settings(max_examples=200, deadline=None)
def test_a_damaged_ram_disk_is_refused(junk: bytes, at: int) -> None:
    content = initrd.pack([initrd.plain("etc/one", b"1" * 100)])
    try:
        found = cpio.parse(content[:at] + junk)
    except cpio.CpioError:
        return
    assert found is not None
