"""The command line: help with examples, exit statuses, one error boundary, completion."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import appliance
from appliance import cli
from appliance.errors import ApplianceError, CommandError, Fault, HostError, InputError

VERBS = list(cli.Verbs.home)


def build(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it, without the bootstrap."""
    command = [sys.executable, "-m", "appliance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    if verb == "bench":
        pytest.importorskip("bench.__main__")
        text = cli.cli.get_command(click.Context(cli.cli), verb).get_help(click.Context(cli.cli))  # type: ignore[union-attr]
    else:
        assert cli.main([verb, "--help"]) == 0
        text = capsys.readouterr().out
    examples = re.findall(r"^\s+(\./build\.py .*)$", text, re.MULTILINE)
    assert examples
    assert all(verb in example for example in examples)


def test_every_verb_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S", text, re.MULTILINE), verb


def test_examples_name_options_that_exist() -> None:
    for verb in VERBS:
        command = cli.cli.get_command(click.Context(cli.cli), verb)
        assert command is not None
        if verb in ("ssh", "test", "bench"):  # what follows belongs to another program
            continue
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for option in re.findall(r"(?<= )--?[a-z][a-z-]*", command.epilog or ""):
            assert option in known, f"{verb} {option}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert appliance.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chekc"], ["no verb is called 'chekc'", "did you mean 'check'?"]),
        (["check", "--jsno"], ["--jsno", "--json"]),
        (["-C", "/no/such/folder", "check"], ["/no/such/folder"]),
        (["up", "--firmware", "coreboot"], ["coreboot", "bios"]),
        (["up", "--target", "docker", "--installed"], ["--target qemu"]),
        (["up", "--credential", "x"], ["'x' is not NAME=FILE"]),
        (["completion", "tcsh"], ["tcsh"]),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_broken_tree_is_status_2_without_traceback(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = project / "recipes" / "web" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\nnonsense: 1\n")
    assert cli.main(["-C", str(project), "--layout", "one", "check"]) == 2
    err = capsys.readouterr().err
    assert "recipes/web/recipe.yaml:" in err
    assert "nothing was built" in err
    assert "Traceback" not in err


def test_unknown_nodes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-C", str(tmp_path), "logs"]) == 1
    assert "./build.py up" in capsys.readouterr().err
    assert cli.main(["-C", str(tmp_path), "status"]) == 0
    assert cli.main(["-C", str(tmp_path), "down", "--all"]) == 0


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ApplianceError("broken", hint="mend it"), 1, "error: broken\n  hint: mend it\n"),
        (CommandError("a command ended with status 1"), 1, "error: a command ended with status 1\n"),
        (HostError("no disk"), 3, "error: no disk\n"),
        (InputError([Fault("a.yaml", 3, "b", "wrong")]), 2, "error: 1 fault; nothing was built\na.yaml:3: b: wrong\n"),
        (KeyboardInterrupt(), 130, "error: cancelled\n"),
        (cli.Terminated(), 143, "error: terminated\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 3, "error: the disk is full at /x\n  hint: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: Permission denied: /x\n"),
        (ValueError("surprise"), 1, "error: ValueError: surprise\n  hint: this is a fault of the builder"),
    ],
)
def test_the_boundary(error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.report(error, cli.Settled()) == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="surprise") as caught:
        raise ValueError("surprise")
    assert cli.report(caught.value, cli.Settled(debug=True)) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_check_tells_the_layout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-C", str(project), "--layout", "one", "check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "one"
    assert cli.main(["-C", str(project), "--layout", "one", "check"]) == 0
    assert "component" in capsys.readouterr().out


def test_render_lists_prints_and_writes(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["-C", str(project), "--layout", "one", "render"]
    assert cli.main(start) == 0
    listing = capsys.readouterr().out
    assert "/etc/samepage/node.json" in listing
    assert cli.main([*start, "/etc/samepage/node.json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main([*start, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)
    assert {"path", "mode", "uid", "source"} <= files[0].keys()
    assert cli.main([*start, "--output-dir", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").rglob("node.json"))
    assert cli.main([*start, "/etc/samepage/nod.json"]) == 2
    assert "/etc/samepage/node.json" in capsys.readouterr().err
    assert cli.main([*start, "--node", "nobody"]) == 2


def test_sigterm_ends_with_143(tmp_path: Path) -> None:
    code = "import os, signal, sys; from appliance import cli; from appliance.verbs import host\n"
    code += "import appliance.doctor as d; d.examine = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (143, "error: terminated\n")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SIGTERM", "SIGINT")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (130, "error: cancelled")


def test_a_closed_pipe_is_no_drama(project: Path) -> None:
    command = f"{sys.executable} -m appliance -C {project} --layout one render | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_parse(shell: str, tmp_path: Path) -> None:
    done = build("completion", shell)
    assert done.returncode == 0
    assert cli.COMPLETION_VARIABLE in done.stdout
    if shutil.which(shell) is None:
        assert "build.py" in done.stdout  # the shell itself is not here to parse it
        return
    script = tmp_path / "script"
    script.write_text(done.stdout)
    subprocess.run([shell, "-n", script], check=True, timeout=20)


def test_bash_completes_verbs_and_options() -> None:
    import os

    def complete(*words: str) -> list[str]:
        environment = os.environ | {
            cli.COMPLETION_VARIABLE: "bash_complete",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return [line.partition(",")[2] for line in build(env=environment).stdout.splitlines()]

    assert complete("build.py", "ver") == ["verify"]
    assert "--firmware" in complete("build.py", "up", "--f")
    assert complete("build.py", "up", "--firmware", "u") == ["uefi"]


def test_signals_are_left_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cli.main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before
