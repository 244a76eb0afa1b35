"""The journal of an unfinished upgrade: read as it was written, or refused with the key that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.node.upgrade import journal
from appliance.node.upgrade.journal import Journal, JournalError, dump, parse
from appliance.node.upgrade.request import STATES

BEGUN = Journal(
    state="plan", action="upgrade", depth="live", old="1.0", new="1.1+abcdef01", running_data=1, old_data=2, new_data=1,
    started=1_800_000_000, units={"nginx.service": "reload", "getty@tty1.service": "none", r"a\x2db.mount": "start"},
)  # fmt: skip


def test_a_journal_is_read_as_it_was_written() -> None:
    assert parse(dump(BEGUN)) == BEGUN
    full = BEGUN._replace(
        state="open", action="rollback", depth="reboot", spare_data=7, with_data=False, stop_before="open",
        stopped=True, opened=True, failed=True, reason="health", message="not healthy: ü\n", deadline=65535, units={},
    )  # fmt: skip
    assert parse(dump(full)) == full
    assert full.committed
    assert not BEGUN.committed
    assert BEGUN.at("hold") == BEGUN._replace(state="hold")


WRONG: list[tuple[str, Any]] = [
    ("state", "boil"), ("state", 1), ("state", None), ("action", "downgrade"), ("depth", "deep"), ("depth", ["live"]),
    ("old", ""), ("old", "../1.0"), ("old", "1.0/x"), ("old", ".."), ("new", "-1"), ("new", "1 0"), ("new", "x" * 256),
    ("new", "1.0\n"), ("running_data", "1"), ("running_data", True), ("running_data", 1.0), ("old_data", -1),
    ("new_data", 10**9), ("spare_data", None), ("started", "now"), ("deadline", 0), ("deadline", 65536),
    ("stop_before", "never"), ("stopped", 1), ("opened", "yes"), ("failed", None), ("with_data", 0), ("reason", 3),
    ("message", []), ("units", []), ("units", {"a b": "start"}), ("units", {"../x": "start"}),
    ("units", {"a.service": "explode"}), ("units", {"a.service": ["start"]}), ("units", {"": "start"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_is_refused_by_its_key(key: str, value: Any) -> None:
    content = json.dumps(BEGUN._asdict() | {key: value}).encode()
    with pytest.raises(JournalError, match="number" if key in ("old_data", "new_data", "deadline") else key):
        parse(content)


@pytest.mark.parametrize("key", ["state", "action", "depth", "old", "new", "running_data", "new_data", "started"])
def test_a_missing_key_is_named(key: str) -> None:
    values = BEGUN._asdict()
    del values[key]
    with pytest.raises(JournalError, match=key):
        parse(json.dumps(values).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4096, b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 5000, dump(BEGUN)[:-5]],
)
def test_what_is_no_journal_is_refused(content: bytes) -> None:
    with pytest.raises(JournalError):
        parse(content)


def test_a_later_key_is_refused() -> None:
    """The program that knows it would do what this one cannot."""
    with pytest.raises(JournalError, match="moon"):
        parse(json.dumps(BEGUN._asdict() | {"moon": 1}).encode())


@given(st.sampled_from(sorted(BEGUN._fields)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(STATES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
))  # fmt: skip
@settings(max_examples=300)
def test_any_value_makes_a_journal_or_is_refused(key: str, value: Any) -> None:
    try:
        found = parse(json.dumps(BEGUN._asdict() | {key: value}).encode())
    except JournalError:
        return
    assert "/" not in found.old + found.new
    assert parse(dump(found)) == found


# --- on the disk -----------------------------------------------------------------------------------------------------


def test_the_journal_is_there_while_an_upgrade_is_unfinished(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert journal.read(root) is None
    journal.write(root, BEGUN)
    journal.write(root, BEGUN.at("hold"))
    assert journal.read(root) == BEGUN.at("hold")
    journal.remove(root)
    assert journal.read(root) is None
    assert list((tmp_path / "upgrade").iterdir()) == []


def test_a_journal_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "upgrade").mkdir()
    file = tmp_path / journal.JOURNAL
    file.write_bytes(b" " * (2 << 20))
    with pytest.raises(JournalError, match="cannot be read"):
        journal.read(str(tmp_path))
    file.write_bytes(b"")
    with pytest.raises(JournalError, match="JSON"):
        journal.read(str(tmp_path))


# --- history ---------------------------------------------------------------------------------------------------------


def test_history_grows_by_one_entry_and_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    assert journal.read_history(root) == []
    monkeypatch.setattr(journal, "_KEPT", 3)
    for number in range(5):
        journal.add_history(root, {"to": f"1.{number}", "reason": "two\nlines"})
    assert [entry["to"] for entry in journal.read_history(root)] == ["1.2", "1.3", "1.4"]


def test_a_line_of_history_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    root = str(tmp_path)
    journal.add_history(root, {"to": "1.0"})
    with (tmp_path / journal.HISTORY).open("ab") as file:
        file.write(b'[]\n{"to": "1\n\xff\n' + b"[" * 100_000 + b'\n{"to": "1.1"}\n{"to": "1.')
    assert [entry["to"] for entry in journal.read_history(root)] == ["1.0", "1.1"]
    journal.add_history(root, {"to": "1.2"})
    assert [entry["to"] for entry in journal.read_history(root)] == ["1.0", "1.1", "1.2"]


def test_the_last_try_of_a_release_counts(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert journal.failed_before(root, "a") is None
    for digest, outcome in (("a", "rolled-back"), ("b", "failed"), ("b", "committed"), ("c", "committed")):
        journal.add_history(root, {"digest": digest, "outcome": outcome})
    assert journal.failed_before(root, "a") == {"digest": "a", "outcome": "rolled-back"}
    assert journal.failed_before(root, "b") is None
    assert journal.failed_before(root, "c") is None
    assert journal.failed_before(root, "d") is None
