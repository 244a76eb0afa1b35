"""The processes that upgrade: the judge of a trial, and whoever comes after one that was killed."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.node.upgrade import journal, resume, services, trial, worker
from appliance.node.upgrade.engine import Outcome
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.request import Request, dump_request

BEGUN = Journal(
    state="health", action="upgrade", depth="soft-reboot", old="1.0", new="1.1", running_data=1, old_data=2,
    new_data=1, started=1, stopped=True, stop_before="commit",
)  # fmt: skip


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the process does to the machine."""
    told: list[str] = []
    monkeypatch.setattr(worker, "WORKING", str(tmp_path / "lock"))
    monkeypatch.setattr(worker, "EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setattr(worker, "REQUEST", str(tmp_path / "request.json"))
    monkeypatch.setattr(worker, "FOLDER", str(tmp_path))
    monkeypatch.setattr(worker, "_MOMENT", 0.0)
    monkeypatch.setattr(trial, "MARK", str(tmp_path / "trial"))
    monkeypatch.setattr(services, "notify", told.append)
    monkeypatch.setattr(services, "restarting", lambda: False)
    monkeypatch.setattr(trial, "reboot", lambda: told.append("reboot"))
    monkeypatch.setattr(worker, "_clean", lambda: told.append("clean"))
    return told


def judge(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(resume, "after_boot", lambda _report: Outcome(name, BEGUN) if name else None)


@pytest.mark.parametrize(("name", "does"), [("", ["READY=1"]), ("committed", ["clean", "READY=1"])])
def test_door_opens_when_the_judge_is_done(
    done: list[str], monkeypatch: pytest.MonkeyPatch, name: str, does: list[str]
) -> None:
    judge(monkeypatch, name)
    assert worker.main("gate") == 0
    assert done == does


@pytest.mark.parametrize(("in_trial", "does"), [(True, ["reboot"]), (False, ["READY=1"])])
def test_judge_that_fails(done: list[str], monkeypatch: pytest.MonkeyPatch, in_trial: bool, does: list[str]) -> None:
    """In a trial the old release comes back; otherwise the release that runs goes on serving."""

    def fail(_report: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(resume, "after_boot", fail)
    if in_trial:
        Path(trial.MARK).touch()
    with pytest.raises(KeyError):
        worker.main("gate")
    assert done == does


@pytest.mark.parametrize("last", [BEGUN._replace(stopped=False, opened=True), None])
def test_door_of_a_stopped_trial_waits_for_somebody(
    done: list[str], monkeypatch: pytest.MonkeyPatch, last: Journal | None
) -> None:
    found = [BEGUN, BEGUN, BEGUN._replace(stopped=False), last]
    judge(monkeypatch, "stopped")
    monkeypatch.setattr(journal, "read", lambda _root: found.pop(0))
    monkeypatch.setattr(time, "sleep", lambda _seconds: done.append("sleep"))
    assert worker.main("gate") == 0
    assert done == ["sleep", "sleep", "sleep", "READY=1"]


def test_only_one_of_them_at_a_time(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade that somebody asks for while a trial is judged must not end the trial."""
    asked: list[dict[str, Any]] = []

    def after_boot(_report: object) -> None:
        asked.append(worker.answer(b"{}", worker.Reporter(lambda _event: None)))

    monkeypatch.setattr(resume, "after_boot", after_boot)
    assert worker.main("gate") == 0
    assert [(one["status"], one["outcome"]) for one in asked] == [(6, "locked")]
    assert done == ["READY=1"]


@pytest.mark.parametrize(
    ("outcome", "end"), [(Outcome("rolled-back", BEGUN), (5, "rolled-back")), (None, (1, "failed"))]
)
def test_recovery_tells_how_it_ended(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome | None, end: tuple[int, str]
) -> None:
    monkeypatch.setattr(resume, "after_end", lambda _report: outcome)
    monkeypatch.setattr(resume, "drop_unfinished_files", lambda: done.append("drop"))
    assert worker.main("recover") == 0
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["state"], event["status"], event["outcome"]) == ("end", *end)
    assert done == ["drop"]


@pytest.mark.parametrize(("death", "does"), [("killed", ["ring"]), ("exited", [])])
def test_recovery_leaves_a_request_that_nobody_had_taken_to_another_process(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, does: list[str]
) -> None:
    """Unless the process failed by itself: the next one would, too."""
    monkeypatch.setattr(resume, "after_end", lambda _report: None)
    monkeypatch.setattr(resume, "drop_unfinished_files", lambda: None)
    monkeypatch.setattr(worker, "ring", lambda: done.append("ring"))
    monkeypatch.setenv("EXIT_CODE", death)  # see systemd.exec(5)
    Path(worker.REQUEST).touch()
    assert worker.main("recover") == 0
    assert done == does
    assert (tmp_path / "events.jsonl").exists() == (death == "exited")


# --- the bell --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bell() -> Iterator[tuple[int, int]]:
    """Both ends of the pipe; handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def carried_out(done: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    assert done == []
    asked: list[Request] = []

    def carry_out(request: Request, _reporter: worker.Reporter) -> dict[str, Any]:
        asked.append(request)
        return {"status": 0, "outcome": "committed"}

    monkeypatch.setattr(worker, "carry_out", carry_out)
    return asked


def test_a_request_is_carried_out_once(carried_out: list[Request], bell: tuple[int, int], tmp_path: Path) -> None:
    Path(worker.REQUEST).write_bytes(dump_request(Request("rollback")))
    os.write(bell[1], b"\n\n")
    assert worker.work(bell[0]) == 0
    assert carried_out == [Request("rollback")]
    assert not Path(worker.REQUEST).exists()
    assert select.select([bell[0]], [], [], 0)[0] == []  # nothing is left that would start it again
    assert json.loads((tmp_path / "events.jsonl").read_text())["outcome"] == "committed"


def test_a_request_that_comes_at_the_end_of_another_is_not_forgotten(
    done: list[str], bell: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry_out(_request: Request, _reporter: worker.Reporter) -> dict[str, Any]:
        Path(worker.REQUEST).write_bytes(dump_request(Request("commit")))
        os.write(bell[1], b"\n")
        return {"status": 0, "outcome": "committed"}

    monkeypatch.setattr(worker, "carry_out", carry_out)
    monkeypatch.setattr(worker, "ring", lambda: done.append("ring"))
    Path(worker.REQUEST).write_bytes(dump_request(Request("rollback")))
    assert worker.work(bell[0]) == 0
    assert done == ["ring"]
    assert Path(worker.REQUEST).exists()


def test_the_first_ring_is_not_yet_the_request(carried_out: list[Request], bell: tuple[int, int]) -> None:
    os.write(bell[1], b"\n")

    def ask() -> None:
        time.sleep(0.2)
        Path(worker.REQUEST).write_bytes(dump_request(Request("commit")))
        os.write(bell[1], b"\n")

    thread = threading.Thread(target=ask)
    thread.start()
    assert worker.work(bell[0]) == 0
    thread.join()
    assert carried_out == [Request("commit")]


def test_no_request_is_the_end_of_waiting(
    carried_out: list[Request], bell: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "_PATIENCE", 0.2)
    os.write(bell[1], b"\n")
    assert worker.work(bell[0]) == 0
    assert carried_out == []
    assert (tmp_path / "events.jsonl").read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_only_waits_goes_at_once(
    carried_out: list[Request], bell: tuple[int, int], number: int, tmp_path: Path
) -> None:
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), number))
    timer.start()
    with pytest.raises(SystemExit) as stop:
        worker.work(bell[0])
    timer.join()
    assert stop.value.code == 0
    assert carried_out == []
    assert (tmp_path / "events.jsonl").read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"{", b'{"verb": 1, "more": 2}'])
def test_a_request_that_is_none_is_told(
    carried_out: list[Request], bell: tuple[int, int], content: bytes, tmp_path: Path
) -> None:
    Path(worker.REQUEST).write_bytes(content)
    assert worker.work(bell[0]) == 0
    assert json.loads((tmp_path / "events.jsonl").read_text())["status"] == 1
    assert carried_out == []


# --- files -----------------------------------------------------------------------------------------------------------


def test_unfinished_files_go_and_whole_ones_stay(tmp_path: Path) -> None:
    stay = ["layers/app-1.erofs", "kernels/6.12/vmlinuz", "releases/1.0/layers", "upgrade/incoming/x.bundle.partial"]
    go = ["layers/app-2.erofs.partial", "kernels/6.13/vmlinuz.partial", "releases/1.1.partial/layers"]
    for name in (*stay, *go):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    resume.drop_unfinished_files(str(tmp_path))
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()) == sorted(stay)
    assert sorted(one.name for one in (tmp_path / "kernels").iterdir()) == ["6.12"]
    assert sorted(one.name for one in (tmp_path / "releases").iterdir()) == ["1.0"]
