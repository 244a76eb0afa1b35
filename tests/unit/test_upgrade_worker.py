"""The processes that upgrade: the judge of a trial, and whoever comes after one that was killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.node.upgrade import journal, resume, services, trial, worker
from appliance.node.upgrade.engine import Outcome
from appliance.node.upgrade.journal import Journal

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
        asked.append(worker.answer(worker.Reporter(lambda _event: None)))

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
