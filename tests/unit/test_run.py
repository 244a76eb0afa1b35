"""Programs are run whole: output, status, signals, deadlines, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance.errors import CommandError, HostError
from appliance.run import describe_failure, find_program, pasteable, run, stream


def test_output_and_input() -> None:
    done = run(["cat"], input=b"hello")
    assert (done.stdout, done.returncode) == (b"hello", 0)


def test_output_to_a_file(tmp_path: Path) -> None:
    done = run(["printf", "x"], output=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"x"
    assert done.stdout == b""


def test_a_missing_program_is_a_fault_of_the_host() -> None:
    with pytest.raises(HostError, match="'no-such-program' is not installed") as caught:
        run(["no-such-program"])
    assert caught.value.status == 3
    assert "doctor" in caught.value.hint


def test_programs_in_sbin_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_program("ldconfig").endswith("sbin/ldconfig")


def test_a_failure_shows_a_command_that_can_be_pasted() -> None:
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo why it failed >&2; exit 7"], hint="do this")
    assert "ended with status 7" in caught.value.message
    assert "$ sh -c 'echo why it failed >&2; exit 7'" in caught.value.message
    assert "| why it failed" in caught.value.message
    assert caught.value.hint == "do this"


def test_a_signal_is_told_from_a_status() -> None:
    with pytest.raises(CommandError, match="was ended by SIGKILL"):
        run(["sh", "-c", "kill -9 $$"])
    assert "signal 64" in describe_failure(["x"], -64, "") or "SIGRTMAX" in describe_failure(["x"], -64, "")


def test_only_the_end_of_long_output_is_shown() -> None:
    text = describe_failure(["x"], 1, "\n".join(map(str, range(100))))
    assert "| 99" in text
    assert "| 74" not in text


def test_a_deadline_ends_the_program_with_all_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(CommandError, match=r"was stopped after 0\.5 s"):
        run(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout=0.5)
    assert time.monotonic() - started < 20
    assert_gone(int(pid_file.read_text()))


def assert_gone(pid: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or ") Z " in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives")


def test_stream_writes_the_log_as_it_comes(tmp_path: Path) -> None:
    lines: list[str] = []
    status = stream(
        ["sh", "-c", "echo one; echo two >&2; exit 3"], log=tmp_path / "log", on_line=lines.append, check=False
    )
    assert status == 3
    assert lines == ["one", "two"]
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_failed_stream_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"whole log: .*/log") as caught:
        stream(["sh", "-c", "echo broken; exit 1"], log=tmp_path / "log")
    assert "| broken" in caught.value.message


def test_a_stream_has_a_deadline() -> None:
    with pytest.raises(CommandError, match="was stopped after"):
        stream(["sleep", "60"], timeout=0.3)


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    """The builder gets SIGINT alone, as from a terminal to which the program's own session does not belong."""
    pid_file = tmp_path / "pid"
    code = f"from appliance.run import run; run(['sh', '-c', 'sleep 60 & echo $! > {pid_file}; wait'])"
    builder = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(builder.pid, signal.SIGINT)
    builder.wait(20)
    assert_gone(int(pid_file.read_text()))


def test_pasteable_quotes() -> None:
    assert pasteable(["a", "b c", Path("/d e")]) == "a 'b c' '/d e'"
