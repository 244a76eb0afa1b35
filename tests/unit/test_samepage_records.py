"""The records that API calls leave: their format as documented, and a spool that stays whole and bounded."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from samepage.clock import timestamp
from samepage.records import CURRENT, FORMAT, CallRecord, Spool

PAGE = Path(__file__).parents[2] / "docs" / "api-call-records.md"
START = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


def record(number: int = 1, method: str = "Items.get") -> CallRecord:
    return CallRecord(timestamp(START), f"id{number}", method, "all", "1.0", {}, 0, 1.5, 0.5, 0.25, 2, 1)


class Clock:
    """A clock that moves a second with every look."""

    def __init__(self) -> None:
        self._moment = START

    def __call__(self) -> datetime:
        self._moment += timedelta(seconds=1)
        return self._moment


def spool(folder: Path, file_bytes: int = 1000, files: int = 3) -> Spool:
    return Spool(folder / "calls", file_bytes=file_bytes, files=files, clock=Clock())


def lines(folder: Path) -> list[dict[str, object]]:
    files = [*sorted((folder / "calls").glob("calls-*.jsonl")), folder / "calls" / CURRENT]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_record_is_one_line_of_ascii_json() -> None:
    line = record(method="Items.\ngét").line()
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert json.loads(line) == {
        "v": 1, "at": "2026-05-06T07:08:09.123Z", "id": "id1", "method": "Items.\ngét", "group": "all",
        "release": "1.0", "variants": {}, "outcome": 0,
        "real_ms": 1.5, "cpu_ms": 0.5, "db_ms": 0.25, "statements": 2, "transactions": 1,
    }  # fmt: skip


def test_the_format_is_documented_field_by_field() -> None:
    text = PAGE.read_text()
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert documented == ["v", *(one.name for one in fields(CallRecord))]
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert list(example) == documented
    assert example["v"] == FORMAT


def test_files_rotate_by_size_and_the_oldest_go(tmp_path: Path) -> None:
    kept = spool(tmp_path)
    size = len(record(100).line())
    for number in range(100, 200):
        kept.write(record(number))
    folder = tmp_path / "calls"
    finished = sorted(file.name for file in folder.glob("calls-*.jsonl"))
    assert len(finished) == 3
    assert all(re.fullmatch(r"calls-\d{8}T\d{6}\.\d{6}Z\.jsonl", name) for name in finished)
    assert all(file.stat().st_size <= 1000 for file in folder.iterdir())
    found = [one["id"] for one in lines(tmp_path)]
    assert found == [f"id{number}" for number in range(200 - len(found), 200)]
    assert len(found) >= 3 * (1000 // size)
    assert kept.lost == 0


def test_a_record_larger_than_a_file_is_kept_alone(tmp_path: Path) -> None:
    small = spool(tmp_path, file_bytes=10)
    small.write(record(1))
    small.write(record(2))
    assert [one["id"] for one in lines(tmp_path)] == ["id1", "id2"]


def test_the_folder_is_private(tmp_path: Path) -> None:
    os.umask(0o022)
    spool(tmp_path).write(record())
    assert stat.S_IMODE((tmp_path / "calls").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "calls" / CURRENT).stat().st_mode) == 0o640


def test_a_restart_goes_on_in_the_same_file(tmp_path: Path) -> None:
    first = spool(tmp_path)
    first.write(record(1))
    first.close()
    spool(tmp_path).write(record(2))
    assert [one["id"] for one in lines(tmp_path)] == ["id1", "id2"]


def test_a_line_torn_by_a_power_cut_spoils_no_other(tmp_path: Path) -> None:
    spool(tmp_path).write(record(1))
    with (tmp_path / "calls" / CURRENT).open("ab") as file:
        file.write(b'{"v":1,"at":"20')
    spool(tmp_path).write(record(2))
    good, torn, after = (tmp_path / "calls" / CURRENT).read_text().splitlines()
    assert json.loads(good)["id"] == "id1"
    assert torn == '{"v":1,"at":"20'
    assert json.loads(after)["id"] == "id2"


def test_records_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    def work(start: int) -> None:
        own = spool(tmp_path, file_bytes=10**9)
        for number in range(start, start + 200):
            own.write(record(number))
        own.close()

    (tmp_path / "calls").mkdir(mode=0o700)
    writers = [threading.Thread(target=work, args=(start,)) for start in (0, 1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({one["id"] for one in lines(tmp_path)}) == 600


def test_a_full_disk_costs_records_but_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = spool(tmp_path)
    full.write(record(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        full.write(record(2))
        full.write(record(3))
    full.write(record(4))
    assert full.lost == 2
    assert [one["id"] for one in lines(tmp_path)] == ["id1", "id4"]
    assert [one.getMessage() for one in caplog.records] == ["call records are lost: [Errno 28] No space left on device"]


def test_a_folder_that_cannot_be_made_costs_no_call(tmp_path: Path) -> None:
    blocked = Spool(tmp_path / "no" / "calls", file_bytes=10, files=1)
    blocked.write(record())
    assert blocked.lost == 1
