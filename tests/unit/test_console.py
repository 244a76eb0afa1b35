"""What is printed where: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import time

import pytest

from appliance.console import Console, teamcity_escape


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEAMCITY_VERSION", "GITHUB_ACTIONS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_results_and_messages_are_parted(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.result("answer")
    console.result_json({"b": 1, "a": 2})
    console.note("working")
    console.warn("careful")
    console.error("broken")
    out, err = capsys.readouterr()
    assert out.startswith("answer\n")
    assert json.loads(out.removeprefix("answer\n")) == {"a": 2, "b": 1}
    assert err == "working\nwarning: careful\nerror: broken\n"


def test_none_is_silent_but_for_faults(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(style="none")
    console.note("working")
    with console.stage("core") as progress:
        progress.update(1, 2, "bytes")
    console.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"


def test_stages_tell_their_time_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(style="plain", explain=True)
    with console.stage("core", "changed: clock"):
        pass
    console.reused("tree")
    err = capsys.readouterr().err
    assert "core ...  (changed: clock)\n" in err
    assert "core: done in 0.0 s\n" in err
    assert "tree: unchanged, reused\n" in err
    assert [(stage.name, stage.reason) for stage in console.stages] == [("core", "changed: clock"), ("tree", "")]


def test_a_failed_stage_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), Console(style="plain").stage("core"):
        raise ValueError("no")
    assert "core: failed after" in capsys.readouterr().err


def test_plain_output_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(style="auto")  # no terminal here
    with console.stage("fetch") as progress:
        for done in range(100):
            progress.update(done, 100, "packages")
    assert "\x1b" not in capsys.readouterr().err


def test_rich_redraws_amounts_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(style="rich").stage("fetch") as progress:
        progress.update(5e6, 1e8, "bytes")
        time.sleep(0.15)
        progress.update(3, 0, "packages")
    err = capsys.readouterr().err
    assert "\r\x1b[Kfetch: 5 of 100 MB, 0 s" in err
    assert "fetch: 3 packages, 0 s" in err


def test_time_passes_though_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(style="rich").stage("core"):
        time.sleep(1.2)
    assert "core: 1 s" in capsys.readouterr().err


def test_no_color_means_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Console().live
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Console().live


@pytest.mark.parametrize(
    ("variable", "value", "opening", "closing"),
    [
        ("TEAMCITY_VERSION", "2026", "##teamcity[blockOpened name='a|'b']", "##teamcity[blockClosed name='a|'b']"),
        ("GITHUB_ACTIONS", "true", "::group::a'b", "::endgroup::"),
    ],
)
def test_ci_gets_its_blocks(
    variable: str,
    value: str,
    opening: str,
    closing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    with Console(style="plain").stage("a'b"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == (opening, closing)


def test_teamcity_gets_the_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TEAMCITY_VERSION", "2026")
    Console().error("two\nlines")
    assert "##teamcity[buildProblem description='two|nlines']" in capsys.readouterr().err


def test_teamcity_escapes() -> None:
    assert teamcity_escape("a|b'[c]\n") == "a||b|'|[c|]|n"
