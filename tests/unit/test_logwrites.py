"""The parts of the power-cut harness that need neither root nor a machine: the log, the disk, the cuts, the judge."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node.upgrade.records import Choice
from tests.faults.power import btrfs
from tests.faults.power.checks import Look, Violation, unpack_tree
from tests.faults.power.cuts import Cut, after_flushes, epochs, reordered, replay
from tests.faults.power.logwrites import DISCARD, FLUSH, FUA, MAGIC, MARK, Entry, LogError, entries
from tests.faults.power.replay import BLOCK, Disk, block_count, pieces
from tests.faults.power.timeline import LIVE, SNAPSHOT, Judge, Mark, Operation, State, index_at

SECTOR = 512
Written = tuple[int, int, bytes]  # flags, start on the disk, content

# --- the log ---------------------------------------------------------------------------------------------------------


def superblock(count: int = 0, sector: int = SECTOR) -> bytes:
    return struct.pack("<QQQI", MAGIC, 1, count, sector).ljust(sector, b"\0")


def packed(flags: int, start: int, length: int, text: bytes = b"", sector: int = SECTOR) -> bytes:
    head = struct.pack("<QQQQ", start // sector, length // sector, flags, len(text))
    return (head + text).ljust(sector, b"\0")


def write(flags: int, start: int, content: bytes) -> bytes:
    return packed(flags, start, len(content)) + content


def log_of(place: Path, *parts: bytes) -> Path:
    place.write_bytes(superblock() + b"".join(parts))
    return place


def test_every_kind_of_entry_is_read(tmp_path: Path) -> None:
    log = log_of(
        tmp_path / "log", write(0, 4096, b"a" * 1024), packed(DISCARD, 8192, 1 << 20), packed(FLUSH, 0, 0),
        write(FUA, 512, b"b" * 512), packed(MARK, 0, 0, b"here"),
    )  # fmt: skip
    first, discard, flush, durable, mark = entries(log)
    assert (first.start, first.length, first.data, first.end) == (4096, 1024, 1024, 2048)
    assert (discard.length, discard.end, discard.discard) == (1 << 20, 2560, True)
    assert (flush.flush, flush.changes, flush.end) == (True, False, 3072)
    assert (durable.durable, durable.flush, durable.end) == (True, False, 4096)
    assert (mark.mark, mark.changes) == (b"here", False)
    assert [entry.index for entry in entries(log)] == [0, 1, 2, 3, 4]


def test_large_sectors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(superblock(sector=4096) + packed(0, 8192, 4096, sector=4096) + b"x" * 4096)
    assert [(entry.start, entry.length, entry.data) for entry in entries(log)] == [(8192, 4096, 8192)]


def test_reading_does_not_trust_the_count_of_entries(tmp_path: Path) -> None:
    """QEMU brings it up to date with the next flush."""
    log = log_of(tmp_path / "log", write(0, 0, b"a" * 512), write(0, 512, b"b" * 512))
    assert len(entries(log)) == 2


@pytest.mark.parametrize("missing", [1, 511, 512, 513, 1024])
def test_what_is_incomplete_at_the_end_is_left_out(tmp_path: Path, missing: int) -> None:
    log = log_of(tmp_path / "log", write(0, 0, b"a" * 512), write(0, 512, b"b" * 512))
    os.truncate(log, log.stat().st_size - missing)
    assert len(entries(log)) == 1


def test_a_hole_ends_the_log(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", write(0, 0, b"a" * 512), bytes(1024), write(0, 512, b"b" * 512))
    assert len(entries(log)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than its superblock"),
        (bytes(512), "magic 0x0"),
        (struct.pack("<QQQI", MAGIC, 2, 0, 512), "version 2"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 513), "513 bytes"),
        (superblock() + packed(0x20, 0, 0), "entry 0 at byte 512 of the log: flags 0x20"),
        (superblock() + struct.pack("<QQQQ", 0, 0, MARK, 4000).ljust(512, b"\0"), "4000 bytes of text"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LogError, match=message):
        entries(tmp_path / "log")


# --- the disk --------------------------------------------------------------------------------------------------------

SIZE = 16 * BLOCK
PLACES = st.integers(0, SIZE // SECTOR - 1)
WRITES = st.lists(
    st.tuples(st.sampled_from([0, 0, DISCARD]), PLACES, st.integers(1, 40), st.integers(1, 255)), max_size=12
)


def made(folder: Path, writes: Iterable[Written]) -> tuple[Disk, list[Entry], bytes]:
    """A disk of noise, the entries of its log, and its content."""
    content = random.Random(5).randbytes(SIZE)
    (folder / "disk").write_bytes(content)
    parts = [
        packed(flags, start, len(data)) if flags & DISCARD or not data else write(flags, start, data)
        for flags, start, data in writes
    ]
    log = log_of(folder / "log", *parts)
    return Disk(folder / "disk", log), entries(log), content


def spelled(raw: list[tuple[int, int, int, int]]) -> list[Written]:
    found = []
    for flags, place, count, letter in raw:
        start = place * SECTOR
        length = min(count * SECTOR, SIZE - start)
        found.append((flags, start, bytes([letter]) * length))
    return found


def model(content: bytes, writes: Iterable[Written]) -> bytes:
    disk = bytearray(content)
    for flags, start, data in writes:
        disk[start : start + len(data)] = bytes(len(data)) if flags & DISCARD else data
    return bytes(disk)


@given(first=WRITES, trial=WRITES)
def test_a_trial_leaves_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[tuple[int, int, int, int]],
    trial: list[tuple[int, int, int, int]],
) -> None:
    durable, tried = spelled(first), spelled(trial)
    disk, log, content = made(tmp_path_factory.mktemp("disk"), [*durable, *tried])
    with disk:
        for entry in log[: len(durable)]:
            disk.apply(entry)
        before, versions = disk.content(0, SIZE), disk.version(0, SIZE)
        assert before == model(content, durable)
        with disk.trial():
            for entry in log[len(durable) :]:
                disk.apply(entry)
            assert disk.content(0, SIZE) == model(content, [*durable, *tried])
        assert (disk.content(0, SIZE), disk.version(0, SIZE)) == (before, versions)


@given(raw=WRITES, orders=st.tuples(st.randoms(use_true_random=False), st.randoms(use_true_random=False)))
def test_equal_versions_mean_equal_content(
    tmp_path_factory: pytest.TempPathFactory, raw: list[tuple[int, int, int, int]], orders: tuple[random.Random, ...]
) -> None:
    disk, log, _content = made(tmp_path_factory.mktemp("disk"), spelled(raw))
    seen: dict[bytes, bytes] = {}
    with disk:
        for dice in orders:
            with disk.trial():
                for entry in dice.sample(log, dice.randint(0, len(log))):
                    disk.apply(entry)
                for block in range(SIZE // BLOCK):
                    key = block.to_bytes(2, "big") + disk.version(block * BLOCK, BLOCK)
                    content = disk.content(block * BLOCK, BLOCK)
                    assert seen.setdefault(key, content) == content


def test_the_same_writes_give_the_same_version_again(tmp_path: Path) -> None:
    disk, log, _content = made(tmp_path, [(0, 0, b"a" * BLOCK), (0, BLOCK, b"b" * BLOCK)])
    with disk:
        found = []
        for order in (log, log[::-1]):
            with disk.trial():
                for entry in order:
                    disk.apply(entry)
                found.append(disk.version(0, 2 * BLOCK))
        assert found[0] == found[1]
        assert found[0] != disk.version(0, 2 * BLOCK)


def test_a_write_can_be_torn_between_blocks(tmp_path: Path) -> None:
    disk, [entry], content = made(tmp_path, [(0, BLOCK - SECTOR, b"x" * (2 * BLOCK))])
    assert block_count(entry) == 3
    assert list(pieces(entry, [0, 1])) == [(BLOCK - SECTOR, BLOCK + SECTOR)]
    assert list(pieces(entry, [2, 0])) == [(BLOCK - SECTOR, SECTOR), (2 * BLOCK, BLOCK - SECTOR)]
    with disk, disk.trial():
        disk.apply(entry, [1])
        assert disk.content(0, 3 * BLOCK) == content[:BLOCK] + b"x" * BLOCK + content[2 * BLOCK : 3 * BLOCK]


def test_a_discard_keeps_holes(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * BLOCK)
    log = log_of(tmp_path / "log", packed(DISCARD, 0, 1 << 30))
    with Disk(tmp_path / "disk", log) as disk, disk.trial():
        disk.apply(entries(log)[0])
        assert disk.content(0, BLOCK) == bytes(BLOCK)
    assert (tmp_path / "disk").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "disk").read_bytes()[:BLOCK] == b"x" * BLOCK


def test_writes_beyond_the_disk_and_trials_within_trials_are_refused(tmp_path: Path) -> None:
    disk, [entry], _content = made(tmp_path, [(0, 0, b"x" * 512)])
    with disk:
        with pytest.raises(ValueError, match="entry 0 of the log ends at byte"):
            disk.apply(replace(entry, start=SIZE))
        with disk.trial(), pytest.raises(RuntimeError), disk.trial():
            pass


# --- cuts ------------------------------------------------------------------------------------------------------------


def numbered(*kinds: str) -> list[Entry]:
    """Entries by letter: w a write of two blocks, s of one, f a flush, d a durable write."""
    flags = {"w": 0, "s": 0, "f": FLUSH, "d": FUA}
    lengths = {"w": 2 * BLOCK, "s": BLOCK, "f": 0, "d": BLOCK}
    return [
        Entry(index, flags[kind], 2 * index * BLOCK, lengths[kind], 0, 1000 * (index + 1))
        for index, kind in enumerate("".join(kinds))
    ]


def test_flushes_end_epochs() -> None:
    log = numbered("wwf", "f", "sd", "f", "w")
    assert [(one.first, one.end, one.writes) for one in epochs(log)] == [
        (0, 2, (0, 1)), (3, 3, ()), (4, 6, (4,)), (7, 8, (7,)),
    ]  # fmt: skip
    assert [cut.position for cut in after_flushes(log)] == [3, 4, 7]
    assert [cut.position for cut in after_flushes(log, 3, 6)] == [4]


def test_other_cuts_lose_something_and_keep_something() -> None:
    log = numbered("wwsf", "s", "f", "swdwsf", "swsswssws")
    found = reordered(log, 200, 3, near=[9])
    assert len(found) > 60
    assert len({(cut.flushed, cut.kept, str(cut.torn)) for cut in found}) == len(found)
    for cut in found:
        unflushed = {entry.index for entry in log[cut.flushed : cut.position] if entry.changes}
        assert cut.kept
        assert set(cut.kept) <= unflushed
        assert set(cut.kept) < unflushed or cut.torn
        assert not any(entry.flush for entry in log[cut.flushed : cut.position])
        assert all(entry.index in cut.kept for entry in log[cut.flushed : cut.position] if entry.durable)
    assert {cut.how for cut in found} == {"every choice", "one lost", "one kept", "shuffled", "torn"}


def test_the_seed_fixes_the_cuts() -> None:
    log = numbered(*["wswsf"] * 20)
    assert reordered(log, 50, 1) == reordered(log, 50, 1)
    assert reordered(log, 50, 1) != reordered(log, 50, 2)
    assert all(20 <= cut.position <= 60 for cut in reordered(log, 50, 1, first=20, last=60))


def test_replay_goes_through_every_cut_in_order(tmp_path: Path) -> None:
    writes: list[Written] = [(0, 0, b"a" * BLOCK), (0, BLOCK, b"b" * BLOCK), (FLUSH, 0, b""), (0, 0, b"c" * BLOCK)]
    disk, log, content = made(tmp_path, writes)
    cuts = [Cut(4, 3, (3,), how="torn"), Cut(2, 0, (1,), how="one kept"), Cut(3, 3), Cut(0, 0)]
    seen = {}
    with disk:
        for cut in replay(disk, log, cuts):
            seen[cut.position] = disk.content(0, 2 * BLOCK)
    old = content[: 2 * BLOCK]
    assert list(seen) == [0, 2, 3, 4]
    assert seen[0] == old
    assert seen[2] == old[:BLOCK] + b"b" * BLOCK
    assert seen[3] == b"a" * BLOCK + b"b" * BLOCK
    assert seen[4] == b"c" * BLOCK + b"b" * BLOCK


def test_an_offset_is_found_among_the_entries() -> None:
    log = numbered("wwf")
    assert [index_at(log, offset) for offset in (0, 999, 1000, 2500, 9000)] == [0, 0, 1, 2, 3]


# --- btrfs -----------------------------------------------------------------------------------------------------------


def btrfs_superblock(generation: int, place: int) -> bytes:
    body = bytearray(4096)
    body[64:72] = b"_BHRfS_M"
    struct.pack_into("<Q", body, 72, generation)
    struct.pack_into("<Q", body, 48, place)
    struct.pack_into("<I", body, 0, btrfs.crc32c(bytes(body[32:])))
    return bytes(body)


def test_checksums() -> None:
    assert btrfs.crc32c(b"123456789") == 0xE3069283


def test_grub_takes_the_newer_superblock() -> None:
    first, same, newer = (btrfs_superblock(*one) for one in ((7, 1 << 16), (7, 64 << 20), (8, 64 << 20)))
    assert btrfs.superblock_of_grub(first, same) is None
    assert btrfs.superblock_of_grub(first, btrfs_superblock(6, 64 << 20)) is None
    assert btrfs.superblock_of_grub(first, bytes(4096)) is None
    assert btrfs.superblock_of_grub(first, newer) == btrfs_superblock(8, 1 << 16)


def test_a_tree_s_content_leaves_out_files_without_a_name() -> None:
    def inode(number: int, links: int) -> btrfs.Item:
        return btrfs.Item(number, btrfs.INODE, 0, bytes(40) + struct.pack("<I", links) + bytes(116))

    def extent(number: int, address: int, length: int) -> btrfs.Item:
        content = struct.pack("<QQBBHBQQQQ", 1, length, 0, 0, 0, 1, address, length, 0, length)
        return btrfs.Item(number, btrfs.EXTENT, 0, content)

    inline = btrfs.Item(257, btrfs.EXTENT, 0, bytes(21) + b"content of a small file, among the metadata of its tree")
    named = [inode(257, 1), inline, inode(258, 1), extent(258, 8192, 4096), inode(259, 2), extent(259, 4096, 4096)]
    tree = unpack_tree(named)
    orphan = btrfs.Item((1 << 64) - 5, btrfs.ORPHAN, 300, b"")
    assert unpack_tree([*named, inode(300, 0), extent(300, 99, 1), orphan]).content == tree.content
    assert unpack_tree(named[:-1]).content != tree.content
    assert tree.files == {258: [btrfs.Extent(8192, 4096)], 259: [btrfs.Extent(4096, 4096)]}
    assert tree.ranges == [btrfs.Extent(4096, 8192)]


# --- the judge -------------------------------------------------------------------------------------------------------

OLD, KEPT, NEW = State("1.0", LIVE), State("1.0", SNAPSHOT), State("1.1", LIVE)
LIVE_DATA, COPY = btrfs.Subvolume(256, b"a", b""), btrfs.Subvolume(257, b"b", b"a")


def look(release: str, data: btrfs.Subvolume = LIVE_DATA, content: str = "same", record: str = "selected") -> Look:
    return Look(Choice(record, release, "k", data.id), data, content)


def judge(*marks: Mark) -> Judge:
    log = numbered("wf" * 10)
    return Judge(Operation("upgrade", 0, len(log), (OLD, KEPT, NEW), marks), log)


def flush(number: int) -> Cut:
    return Cut(2 * number, 2 * number)


def between(number: int) -> Cut:
    return Cut(2 * number + 1, 2 * number, how="torn")


def test_an_operation_passes_its_states_in_order() -> None:
    one = judge(Mark(4000, KEPT), Mark(6000, NEW))
    for cut, found in (
        (flush(0), look("1.0")), (between(0), look("1.0")), (flush(1), look("1.0")), (between(1), look("1.0", COPY)),
        (flush(2), look("1.0", COPY)), (between(2), look("1.1")), (flush(3), look("1.1")),
    ):  # fmt: skip
        one.see(cut, found)
    findings = one.finish()
    assert findings.changes == [(0, OLD), (4, KEPT), (6, NEW)]
    assert (findings.flushes, findings.others) == (4, 3)
    assert str(findings).startswith("4 flushes, 3 other cuts (0 between superblocks, 0 with a trial): 1.0 with live")


def test_a_trial_is_of_the_new_release_and_on_other_data() -> None:
    log = numbered("wf" * 10)
    one = Judge(Operation("upgrade", 0, len(log), (OLD, KEPT, NEW), tried=NEW), log)
    one.see(flush(0), look("1.0"))

    def trial(of: Look, release: str, data: btrfs.Subvolume) -> Look:
        return replace(of, tried=Choice("try", release, "k", data.id), tried_data=data)

    one.see(flush(1), trial(look("1.0", COPY), "1.1", LIVE_DATA))
    assert one.findings.tried == 1
    with pytest.raises(Violation, match=r"1\.2 with live data is tried, instead of 1\.1"):
        one.see(flush(2), trial(look("1.0", COPY), "1.2", LIVE_DATA))
    other = Judge(replace(one.operation, states=(OLD, NEW)), log)
    with pytest.raises(Violation, match="on the very data"):
        other.see(flush(2), trial(look("1.0"), "1.1", LIVE_DATA))


@pytest.mark.parametrize(
    ("cut", "found", "message"),
    [
        (flush(2), look("1.2"), "1.2 with live data boots, which is none of"),
        (flush(2), look("1.1", COPY), "1.1 with snapshot data boots, which is none of"),
        (flush(2), look("1.0", btrfs.Subvolume(9, b"c", b"d")), "1.0 with other data boots"),
        (flush(2), look("1.0"), "boots again, after 1.0 with snapshot data did"),
        (between(1), look("1.0"), "boots again"),
        (flush(3), look("1.0", COPY), "although it had come to 1.1 with live data"),
        (flush(2), look("1.0", COPY, "other"), "the snapshot of the data is not what it was"),
        (flush(2), look("1.0", COPY, record="previous"), "the selected record is broken"),
    ],
)
def test_whatever_else_boots_is_named(cut: Cut, found: Look, message: str) -> None:
    one = judge(Mark(6000, NEW))
    one.see(flush(0), look("1.0"))
    one.see(flush(1), look("1.0", COPY))
    with pytest.raises(Violation, match=message):
        one.see(cut, found)


def test_no_cut_is_further_than_the_flush_behind_it() -> None:
    one = judge()
    one.see(flush(0), look("1.0"))
    one.see(between(0), look("1.1"))
    with pytest.raises(Violation, match=r"1\.1 with live data boots, and 1\.0 with snapshot data after the next flush"):
        one.see(flush(1), look("1.0", COPY))


def test_an_operation_must_come_to_its_end() -> None:
    one = judge()
    one.see(flush(0), look("1.0"))
    with pytest.raises(Violation, match=r"upgrade ended, but 1\.1 with live data does not boot"):
        one.finish()
