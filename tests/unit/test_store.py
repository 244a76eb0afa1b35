from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import store as storing
from appliance.errors import HostError
from appliance.store import Store, default_root, digest_of_files, key_of, require_room

INPUTS = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", tmp_path)


def writes(text: str) -> storing.Callable[[Path], None]:
    return lambda folder: [None, (folder / "result").write_text(text)][0]


# --- keys ------------------------------------------------------------------------------------------------------------


@given(INPUTS, INPUTS)
def test_equal_inputs_have_equal_keys_and_no_others(one: dict[str, str], other: dict[str, str]) -> None:
    assert (key_of(one) == key_of(other)) == (one == other)
    assert key_of(dict(reversed(one.items()))) == key_of(one)


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("xy")
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").write_text("y")
    digests = {
        digest_of_files({"n": tmp_path / "a"}),
        digest_of_files({"m": tmp_path / "a"}),
        digest_of_files({"n": tmp_path / "b", "o": tmp_path / "c"}),
        digest_of_files({"n": tmp_path / "c", "o": tmp_path / "b"}),
    }
    assert len(digests) == 4


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_step_runs_once(store: Store) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_text("x")

    first, second = store.step("s", {"a": "1"}, build), store.step("s", {"a": "1"}, build)
    assert first == second
    assert len(calls) == 1
    assert store.step("s", {"a": "2"}, build) != first
    assert store.step("t", {"a": "1"}, build) != first


def test_nothing_to_do_takes_milliseconds_however_big_the_result(store: Store) -> None:
    def build(folder: Path) -> None:
        with (folder / "image").open("wb") as file:
            file.truncate(10**10)

    store.step("s", {"a": "1"}, build)
    started = time.perf_counter()
    store.step("s", {"a": "1"}, build)
    assert time.perf_counter() - started < 0.1


def test_a_failed_step_leaves_nothing(store: Store) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.step("s", {"a": "1"}, fail)
    assert store.results() == []
    assert not store.has("s", {"a": "1"})


@pytest.mark.parametrize("damage", ["truncate", "remove", "record"])
def test_a_torn_result_is_built_again(store: Store, damage: str) -> None:
    place = store.step("s", {"a": "1"}, writes("whole"))
    if damage == "truncate":
        (place / "result").write_text("")
    elif damage == "remove":
        (place / "result").unlink()
    else:
        place.with_name(place.name + ".json").write_text("{")
    assert not store.has("s", {"a": "1"})
    assert (store.step("s", {"a": "1"}, writes("whole")) / "result").read_text() == "whole"


BUILDER = """
import sys, time
from pathlib import Path
from appliance.store import Store

def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "result").write_text("whole")

store = Store(Path(sys.argv[1]), Path("/"), lambda text: print(text, flush=True))
print((store.step("s", {"a": "1"}, build) / "result").read_text(), flush=True)
"""


def builder(root: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, root, str(seconds)], stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_build_leaves_a_usable_store(store: Store) -> None:
    with builder(store.root, 60) as killed:
        assert line(killed) == "building"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not store.has("s", {"a": "1"})
    assert [result.used for result in store.results()] == [0]  # a leftover, which `clean` would remove
    place = store.step("s", {"a": "1"}, writes("whole"))
    assert [file.name for file in place.iterdir()] == ["result"]
    assert len(store.results()) == 1


def test_two_builds_at_once_make_a_result_once_and_say_that_they_wait(store: Store) -> None:
    with builder(store.root, 1) as first:
        assert line(first) == "building"
        with builder(store.root, 1) as second:
            assert line(second) == "another build is making s; waiting for it"
            assert line(first) == "whole"
            assert line(second) == "whole"  # and not "building"


def test_threads_of_one_build_do_not_deadlock(store: Store) -> None:
    places = []
    threads = [
        threading.Thread(target=lambda n=n: places.append(store.step("s", {"n": str(n % 2)}, writes("x"))))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(places) == 6
    assert len(set(places)) == 2


def test_a_result_that_is_made_just_then_is_not_cleaned_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has its name already, and its record, which says when it was used, is not there yet."""
    write, cleaners = storing._write_whole, list[threading.Thread]()

    def slowly(file: Path, text: str) -> None:
        if not cleaners:
            cleaners.append(threading.Thread(target=store.clean, kwargs={"keep_days": 7}))
            cleaners[0].start()
            time.sleep(0.2)  # it has found the folder, and waits for the lock
        write(file, text)

    monkeypatch.setattr(storing, "_write_whole", slowly)
    place = store.step("s", {"n": "1"}, writes("x"))
    cleaners[0].join(60)
    assert (place / "result").read_text() == "x"
    assert store.has("s", {"n": "1"})


def test_an_unwritable_cache_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write the cache") as caught:
        Store(tmp_path / "file", tmp_path).step("s", {}, writes("x"))
    assert "SAMEPAGE_CACHE" in caught.value.hint


# --- explaining ------------------------------------------------------------------------------------------------------


@given(INPUTS, INPUTS)
def test_every_differing_input_is_named(old: dict[str, str], new: dict[str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "cache", Path(folder))
        store.step("s", old, writes("x"))
        text = store.explain("s", new)
    if old == new:
        assert text == ""
    elif old:
        differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        assert all(key in text for key in differing)
    else:
        assert text


def test_explains_in_words(store: Store) -> None:
    assert store.explain("s", {"a": "1"}) == "never built in this checkout"
    store.step("s", {"a": "1", "b": "1", "c": "1"}, writes("x"))
    assert store.explain("s", {"a": "1", "b": "1", "c": "1"}) == ""
    assert store.explain("s", {"a": "1", "b": "2", "d": "1"}) == "changed: b; new: d; gone: c"
    store.clean()
    assert store.explain("s", {"a": "1", "b": "1", "c": "1"}) == "its result is not in the cache any more"


def test_checkouts_that_share_a_cache_are_explained_apart(store: Store, tmp_path: Path) -> None:
    store.step("s", {"a": "1"}, writes("x"))
    other = Store(store.root, tmp_path / "elsewhere")
    assert other.explain("s", {"a": "2"}) == "never built in this checkout"
    assert other.explain("s", {"a": "1"}) == ""


# --- cleaning and room -----------------------------------------------------------------------------------------------


def test_clean_removes_all_or_what_is_old(store: Store) -> None:
    old = store.step("s", {"a": "1"}, writes("x" * 5000))
    store.step("s", {"a": "2"}, writes("y" * 5000))
    month_ago = time.time() - 30 * 86400
    os.utime(old.with_name(old.name + ".json"), (month_ago, month_ago))
    assert store.clean(keep_days=7) >= 5000
    assert not store.has("s", {"a": "1"})
    assert store.has("s", {"a": "2"})
    assert store.clean() >= 5000
    assert store.results() == []
    assert store.clean() == 0


def test_reuse_keeps_a_result_young(store: Store) -> None:
    place = store.step("s", {"a": "1"}, writes("x"))
    record = place.with_name(place.name + ".json")
    os.utime(record, (1, 1))
    store.step("s", {"a": "1"}, writes("x"))
    assert record.stat().st_mtime > time.time() - 60
    assert json.loads(record.read_text())["inputs"] == {"a": "1"}


def test_a_full_disk_is_foreseen_with_the_figures(tmp_path: Path) -> None:
    require_room({tmp_path: 1000, tmp_path / "not/there/yet": 1000})
    with pytest.raises(HostError, match=r"needs about 1000000000 MB at .*, where \d+ MB are free"):
        require_room({tmp_path: 10**15})


def test_needs_on_one_disk_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1500})())
    require_room({tmp_path / "cache": 1000})
    with pytest.raises(HostError):
        require_room({tmp_path / "cache": 1000, tmp_path / "dist": 1000})


def test_where_the_cache_is() -> None:
    assert default_root({"SAMEPAGE_CACHE": "/c"}) == Path("/c")
    assert default_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/samepage-appliance")
    assert default_root({}) == Path.home() / ".cache/samepage-appliance"


def test_a_new_result_lets_long_unused_ones_of_its_step_go(store: Store) -> None:
    old, other = store.step("s", {"a": "1"}, writes("x")), store.step("t", {"a": "1"}, writes("x"))
    recent = store.step("s", {"a": "2"}, writes("x"))
    for place in (old, other):
        os.utime(place.with_name(place.name + ".json"), (1, 1))
    store.step("s", {"a": "3"}, writes("x"))
    assert (old.exists(), other.exists(), recent.exists()) == (False, True, True)
