"""The node's command line: what it takes, what it hands on, what it prints, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.node import refusals
from appliance.node.upgrade import bell, cli, looking, node, services
from appliance.node.upgrade.cli import VERBS, main, parse
from appliance.node.upgrade.journal import JournalError
from appliance.node.upgrade.request import APPLY, STATES, STATUSES, Request, alone, dump_request, parse_request
from appliance.node.upgrade.web import FetchError

FLAGS = {word for action in cli.parser()._actions for word in action.option_strings}
COMMITTED = {
    "status": 0, "outcome": "committed", "class": "live", "from": "1.0", "to": "1.1", "seconds": 3.2,
    "units": {"nginx.service": "reload"}, "schema": [3, 4], "reason": "", "message": "", "hint": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "verb", "source"),
    [
        ("", "install", ""), ("check", "check", ""), ("x.bundle", "install", "x.bundle"),
        ("install x.bundle", "install", "x.bundle"), ("plan https://example.org/x?key=1", "plan",
        "https://example.org/x?key=1"), ("--json status", "status", ""), ("--json plan x --yes", "plan", "x"),
        ("x --json", "install", "x"), ("./status", "install", "./status"), ("install status", "install", "status"),
    ],
)  # fmt: skip
def test_the_verb_may_be_left_out_and_flags_may_stand_anywhere(words: str, verb: str, source: str) -> None:
    found, options = parse(words.split())
    assert (found, options.source) == (verb, source)


def test_flags_have_the_values_that_were_given() -> None:
    switches = ["--allow-downgrade", "--download-only", "--json", "--yes", "--retry", "--unattended", "--dry-run"]
    _, options = parse(["install", "x", "--apply=reboot", "--stop-before", "commit", "--progress-fd", "5", *switches])
    assert (options.apply, options.stop_before, options.progress_fd) == ("reboot", "commit", 5)
    assert all(getattr(options, name[2:].replace("-", "_")) for name in switches)
    _, options = parse(["rollback", "--data", "keep", "--to", "1.0"])
    assert (options.data, options.to) == ("keep", "1.0")
    _, options = parse([])
    assert (options.apply, options.data, options.stop_before, options.progress_fd) == ("auto", "restore", "", -1)


@pytest.mark.parametrize(
    "words",
    [
        "stauts", "/nowhere/x.bundle", "status x.bundle", "install a b", "plan x y z", "--apply=deep", "--data=some",
        "--stop-before=never", "--json=1", "--jso", "--progress-fd x", "--progress-fd 999", "--to 1.0",
        "check --to 1.0", "rollback x.bundle", "--unknown", "--dry-run --nothing",
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_64_and_says_what_is_wrong(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 64
    out, messages = capsys.readouterr()
    assert out == ""
    assert messages.startswith("samepage-upgrade-node: ")
    assert messages.endswith("; see --help\n")
    assert messages.count("\n") == 1


def test_only_root_may_look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["status"]) == 64
    assert "only root" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_help_names_every_verb_flag_state_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb, text in VERBS.items():
        assert f"  {verb:<10}{text}" in shown
    for word in (*FLAGS, *APPLY, *STATES, "restore", "keep"):
        assert word in shown
    for status in (*STATUSES.values(), 6, 64):
        assert f" {status} " in shown


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_is_read_as_it_was_written() -> None:
    full = Request("rollback", "/x", "1.0", "keep", "live", "commit", True, True, True)
    assert parse_request(dump_request(full)) == full
    assert parse_request(dump_request(Request())) == Request()
    for content in (b"", b"[]", b'{"verb": "install", "more": 1}', b"{"):
        with pytest.raises(ValueError, match=r"."):
            parse_request(content)


class Unit:
    """samepage-upgrade.service, played by a thread: does what the test says with the request and the events."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: Callable[[Unit, Request], None] = lambda unit, _request: unit.say(COMMITTED | {"state": "end"})
        self.requests: list[Request] = []
        self.signals = 0
        self.runs = False
        self.events, self.request = folder / "events.jsonl", folder / "request.json"
        self.thread: threading.Thread | None = None
        self.lock = folder / "lock"
        names = {"ASKING": folder / "front.lock", "WORKING": self.lock, "REQUEST": self.request, "EVENTS": self.events}
        for name, path in names.items():
            monkeypatch.setattr(cli, name, str(path))
        monkeypatch.setattr(services, "systemctl", self.systemctl)
        monkeypatch.setattr(bell, "ring", self.ring)

    def systemctl(self, *words: str) -> str:
        if words[0] == "show":
            return "active\n" if self.runs else "inactive\n"
        assert words == ("kill", "--signal=INT", "samepage-upgrade.service")
        self.signals += 1
        return ""

    def ring(self) -> None:
        self.requests.append(parse_request(self.request.read_bytes()))
        self.request.unlink()
        self.runs = True
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.work(self, self.requests[-1])
        self.runs = False

    def say(self, event: Mapping[str, Any]) -> None:
        self.write(json.dumps(event).encode() + b"\n")

    def write(self, content: bytes) -> None:
        with self.events.open("ab", buffering=0) as file:
            file.write(content)

    def join(self) -> None:
        if self.thread:
            self.thread.join(10)


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    made = Unit(tmp_path / "run", monkeypatch)
    yield made
    made.join()


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bundle").write_bytes(b"")
    return tmp_path / "x.bundle"


def test_a_request_is_handed_to_the_unit_and_its_end_is_told(
    unit: Unit, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["x.bundle", "--apply", "live", "--allow-downgrade", "--retry", "--yes"]) == 0
    assert unit.requests == [Request("install", str(bundle), apply="live", allow_downgrade=True, retry=True)]
    out, _ = capsys.readouterr()
    assert out.splitlines() == [
        "release 1.0 -> 1.1: live", "  reload   nginx.service", "  schema   level 3 -> 4", "committed in 3.2 s"
    ]  # fmt: skip
    assert main(["rollback", "--data=keep", "--to", "1.0"]) == 0
    assert unit.requests[-1] == Request("rollback", to="1.0", data="keep")
    assert main(["https://example.org/x?a=1", "--download-only"]) == 0
    assert unit.requests[-1] == Request("install", "https://example.org/x?a=1", download_only=True)


def test_a_run_that_has_said_its_last_word_is_waited_for(unit: Unit) -> None:
    """Its process ends a moment later, and who calls again at once is not told that another upgrade runs."""

    def slow(unit: Unit, _request: Request) -> None:
        unit.say(COMMITTED | {"state": "end"})
        time.sleep(0.3)

    unit.work = slow
    assert [main(["rollback"]), main(["rollback"])] == [0, 0]


@pytest.mark.parametrize("words", [b"", b"{", b"[1]\n", b'{"state": "hold"}\n'])
def test_a_run_in_the_midst_is_not_waited_for(unit: Unit, words: bytes) -> None:
    unit.events.parent.mkdir()
    unit.write(words)
    with alone(str(unit.lock)):
        assert main(["rollback"]) == 6
    assert unit.requests == []
    assert unit.events.read_bytes() == words


def test_json_is_one_object(unit: Unit, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    out, messages = capsys.readouterr()
    assert json.loads(out) == COMMITTED
    assert messages == ""
    assert unit.requests == [Request()]


@pytest.mark.parametrize(("outcome", "status"), [*STATUSES.items(), ("locked", 6)])
def test_the_exit_status_is_what_the_unit_says(
    unit: Unit, outcome: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    end = {"state": "end", "status": status, "outcome": outcome, "message": "a reason", "hint": "a hint"}
    unit.work = lambda unit, _request: unit.say(end)
    assert main([]) == status
    out, messages = capsys.readouterr()
    assert f"{outcome}: a reason\n  hint: a hint" in out + messages
    assert (messages != "") == (status in (1, 3, 5, 6))


def test_progress_is_told_in_words_and_as_lines(
    unit: Unit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(unit: Unit, _request: Request) -> None:
        unit.say({"state": "stage", "done": 1, "total": 2})
        unit.write(b'{"state": "stage", "done": 2')
        time.sleep(0.2)
        unit.write(b', "total": 2}\n{"state": "plan", "done": 0, "total": 0}\n')
        unit.say({"state": "end", **COMMITTED})

    unit.work = work
    with (tmp_path / "progress").open("wb") as file:
        assert main(["--progress-fd", str(file.fileno())]) == 0
    events = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    assert [event["state"] for event in events] == ["stage", "stage", "plan", "end"]
    assert events[1] == {"state": "stage", "done": 2, "total": 2}
    assert capsys.readouterr().err.splitlines() == ["stage", "plan"]


@pytest.mark.usefixtures("unit")
def test_nobody_who_reads_the_progress_is_no_reason_to_stop_showing() -> None:
    read, write = os.pipe()
    os.close(read)
    assert main(["--json", "--progress-fd", str(write)]) == 0
    os.close(write)


def test_an_end_that_never_comes_is_told(unit: Unit, capsys: pytest.CaptureFixture[str]) -> None:
    unit.work = lambda unit, _request: unit.say({"state": "stage", "done": 0, "total": 0})
    assert main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["reason"]) == ("failed", "died")
    assert "status" in found["hint"]


def test_the_last_words_of_a_unit_that_ends_are_not_lost(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come between the last look at the events and the question whether the unit still runs."""
    asked: list[str] = []
    unit.work = lambda _unit, _request: None

    def systemctl(*words: str) -> str:
        asked.append(words[0])
        if "show" in asked:
            unit.say({"state": "open", "done": 0, "total": 0})
            unit.say({"state": "end", **COMMITTED})
        return "inactive\n"

    monkeypatch.setattr(services, "systemctl", systemctl)
    assert main(["--json"]) == 0
    assert asked == ["show"]


def test_the_service_manager_is_not_asked_about_a_unit_that_has_processes(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    found = iter([{7}, {7}, set[int]()])  # in the end it has none, and has said nothing

    def processes(name: str) -> set[int]:
        asked.append(name)
        return next(found)

    unit.work = lambda _unit, _request: None
    monkeypatch.setattr(services, "processes", processes)
    monkeypatch.setattr(services, "systemctl", lambda *words: asked.append(words[0]) or "inactive\n")
    monkeypatch.setattr(cli, "_POLL", 0.001)
    assert main(["--json"]) == 1
    assert asked == ["samepage-upgrade.service"] * 3 + ["show"]


def test_another_upgrade_is_not_disturbed(unit: Unit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(str(unit.lock)):
        assert main(["--json"]) == 6
    assert json.loads(capsys.readouterr().out)["outcome"] == "locked"
    with (tmp_path / "run/front.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["rollback"]) == 6
        assert main(["commit", "--json"]) == 6
    assert "another upgrade" in capsys.readouterr().err
    assert unit.requests == []


def test_nobody_who_listens_is_told(
    unit: Unit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise FileNotFoundError(2, "No such file or directory", bell.BELL)

    monkeypatch.setattr(bell, "ring", fails)
    assert main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "samepage-upgrade.service is not listening" in found["message"]
    assert found["hint"] == "systemctl restart samepage-upgrade.socket"
    assert not unit.request.exists()


def test_unattended_does_nothing_unless_the_settings_say_so(
    unit: Unit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "read_settings", lambda: node.Settings())
    assert main(["--unattended", "--json"]) == 2
    assert "unattended" in json.loads(capsys.readouterr().out)["message"]
    assert unit.requests == []
    monkeypatch.setattr(node, "read_settings", lambda: node.Settings(unattended=True))
    assert main(["--unattended"]) == 0
    assert unit.requests == [Request()]


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "verbs"),
    [("y", ["install", "commit"]), ("n", ["install", "rollback"]), ("", ["install", "rollback"])],
)
def test_people_are_asked_once_it_is_known_what_will_happen(
    unit: Unit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, verbs: list[str]
) -> None:
    def work(unit: Unit, request: Request) -> None:
        stopped = {"outcome": "stopped", "message": "stopped before hold"} if request.stop_before else {}
        unit.say({"state": "end", **COMMITTED, **stopped})

    unit.work = work
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _prompt: typed)
    assert main([]) == (0 if typed == "y" else 1)
    assert [request.verb for request in unit.requests] == verbs
    assert [request.stop_before for request in unit.requests] == ["hold", ""]
    out, messages = capsys.readouterr()
    assert "release 1.0 -> 1.1: live" in out
    assert typed == "y" or "nothing changed" in messages


def test_ctrl_c_asks_the_unit_to_stop(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread() and not pressed:
            pressed.append(seconds)
            raise KeyboardInterrupt
        real(seconds)

    def work(unit: Unit, _request: Request) -> None:
        while not unit.signals:
            time.sleep(0.01)
        unit.say({"state": "end", "status": 1, "outcome": "failed", "message": "cancelled"})

    unit.work = work
    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["--json"]) == 1
    assert unit.signals == 1


def test_ctrl_c_takes_back_what_nobody_has_begun(
    unit: Unit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bell, "ring", lambda: None)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["message"] == "cancelled: nothing changed"
    assert not unit.request.exists()
    assert unit.signals == 0


def test_the_bell_rings_early_only_where_a_request_may_follow(tmp_path: Path) -> None:
    pipe = tmp_path / "bell"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for verb in VERBS:
            bell.ring_early([verb, "--json"], str(pipe))
            rang = os.read(end, 10) != b""
            assert rang == (verb in ("install", "commit", "rollback"))
        for words in (["--help"], ["x.bundle", "--dry-run"]):
            bell.ring_early(words, str(pipe))
            assert os.read(end, 10) == b""
        bell.ring_early([], str(pipe))
        assert os.read(end, 10) == b"\n"
    finally:
        os.close(end)
    bell.ring_early([], str(pipe))  # nobody listens: told when there is a request
    bell.ring_early([], str(tmp_path / "none"))
    for path in (pipe, tmp_path / "none"):
        with pytest.raises(OSError, match="No such"):
            bell.ring(str(path))


# --- looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(looking.VERBS))
def test_every_verb_that_looks_is_refused_on_a_system_that_runs_live(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mode").write_text("live\n")
    monkeypatch.setattr(node, "MODE_FILE", str(tmp_path / "mode"))
    assert main([verb, "--json", "--dry-run"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["reason"]) == ("refused", "not-upgradable")
    assert "this system is live" in found["message"]
    assert "install it on a disk" in found["hint"]


def test_verbs_that_change_nothing_need_no_unit(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def seen(verb: str) -> Callable[..., dict[str, Any]]:
        def answer(*_: object) -> dict[str, Any]:
            asked.append(verb)
            return {"status": 2, "text": ""}

        return answer

    monkeypatch.setattr(looking, "look", lambda: None)
    for verb in looking.VERBS:
        monkeypatch.setitem(looking.VERBS, verb, seen(verb))
    for words in ("status", "check", "history", "verify", "cleanup", "info", "plan", "--dry-run", "rollback --dry-run"):
        assert main([*words.split(), "--json"]) == 2
    assert asked == ["status", "check", "history", "verify", "cleanup", "info", "plan", "plan", "rollback"]
    assert unit.requests == []


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (refusals.NoRoom("full"), 3, "refused"), (refusals.Busy("busy"), 6, "locked"),
        (FetchError("no answer", hint="look"), 1, "failed"), (OSError(5, "broken"), 1, "failed"),
        (services.ServiceError("btrfs failed"), 1, "failed"), (JournalError("torn"), 1, "failed"),
    ],
)  # fmt: skip
def test_what_goes_wrong_while_looking_is_told(
    error: Exception, status: int, outcome: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(looking, "look", fails)
    assert main(["status", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["outcome"]) == (status, outcome)
    assert found["message"]
    assert main(["status"]) == status
    assert found["message"] in capsys.readouterr().err


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_plan_in_words() -> None:
    found = cli.describe(
        {
            "outcome": "planned", "from": "1.0", "to": "1.1", "class": "soft-reboot", "message": "", "hint": "",
            "packages": {"nginx": ["1.26", "1.27"], "fresh": ["", "2"]}, "migrations": [1, 2],
            "units": {"b.service": "restart", "a.service": "stop"},
        }
    )  # fmt: skip
    assert found.splitlines() == [
        "release 1.0 -> 1.1: soft-reboot", "  stop     a.service", "  restart  b.service",
        "  package  nginx 1.26 -> 1.27", "  package  fresh 2", "  schema   level 1 -> 2", "planned",
    ]  # fmt: skip
    assert cli.describe({"outcome": "nothing", "message": "it runs", "from": "1", "to": "1"}) == "nothing: it runs"


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "upgrade.json"
    assert node.read_settings(str(path)) == node.Settings()
    path.write_text('{"channel": "https://example.org/c", "keep": 5, "unattended": true, "of_tomorrow": 1}')
    assert node.read_settings(str(path)) == node.Settings("https://example.org/c", keep=5, unattended=True)
    wrong = ('{"keep": "3"}', '{"keep": true}', '{"channel": null}', '{"unattended": 0}')
    ranges = ('{"trial_seconds": 65536}', '{"hold_seconds": 0}', '{"trial_seconds": 0}', '{"budget": 101}')
    for content in ("", "[]", "{", "[" * 99999, *wrong, *ranges):
        path.write_text(content)
        with pytest.raises(node.NotUpgradable, match=r"upgrade\.json"):
            node.read_settings(str(path))


def test_the_recipe_sets_every_setting() -> None:
    """The template's keys are the program's, with the program's defaults."""
    import yaml

    recipe = Path(__file__).parents[2] / "recipes/node-tools"
    template = (recipe / "templates/etc/samepage/upgrade.json.j2").read_text()
    values = yaml.safe_load((recipe / "recipe.yaml").read_text())["settings"]
    for name, default in node.Settings._field_defaults.items():
        assert f'"{name}": {{{{ settings.{name}' in template
        assert values[name] == default


@pytest.mark.parametrize("program", ["cli", "worker"])
def test_the_programs_start_without_what_is_slow_to_import(program: str) -> None:
    """On an emulated CPU dataclasses alone, with the inspect that it imports, would cost half a second."""
    root = Path(__file__).parents[2]
    words = f"import sys; sys.path.append({str(root)!r}); import appliance.node.upgrade.{program}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-IS", "-c", words], capture_output=True, text=True, check=True)
    assert not {"dataclasses", "inspect", "cryptography", "urllib.request"} & set(done.stdout.split())
