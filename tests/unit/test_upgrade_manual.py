"""The manual page and the completion of samepage-upgrade-node name all that the program takes, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from appliance.node.upgrade.cli import VERBS, parser
from appliance.node.upgrade.request import APPLY, STATES, STATUSES

FILES = Path(__file__).parents[2] / "recipes/node-tools/files"
PAGE = FILES / "opt/samepage/share/man/man8/samepage-upgrade-node.8"
COMPLETION = FILES / "opt/samepage/share/bash-completion/samepage-upgrade-node"
FLAGS = {word for action in parser()._actions for word in action.option_strings if word.startswith("--")}


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    """The sections of the page, without what only the formatter reads."""
    text = re.sub(r"^\.\\\".*\n", "", PAGE.read_text(), flags=re.MULTILINE).replace(r"\-", "-")
    parts = re.split(r"^\.SH (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tags(section: str) -> set[str]:
    """The first words of the section's entries."""
    lines = re.findall(r"^\.TP\n\.(?:B|BI|BR) (.*)", section, flags=re.MULTILINE)
    return {word for line in lines for word in re.findall(r"[\w-]+", line.split("=")[0])}


def test_the_page_has_every_verb_and_no_other(page: dict[str, str]) -> None:
    assert tags(page["VERBS"]) == set(VERBS)


def test_the_page_has_every_flag_and_no_other(page: dict[str, str]) -> None:
    assert {word for word in tags(page["OPTIONS"]) if word.startswith("--")} == FLAGS
    for word in (*APPLY, "restore", "keep"):
        assert re.search(rf"\b{word}\b", page["OPTIONS"]), word


def test_the_page_has_the_states_in_their_order(page: dict[str, str]) -> None:
    found = re.findall(r"^\.TP\n\.B (.*)", page["STATES"], flags=re.MULTILINE)
    assert found == list(STATES)


def test_the_page_has_every_exit_status(page: dict[str, str]) -> None:
    assert {int(status) for status in tags(page["EXIT STATUS"])} == {*STATUSES.values(), 6, 64}


def test_the_pages_examples_are_commands_that_the_program_takes(page: dict[str, str]) -> None:
    from appliance.node.upgrade.cli import parse

    examples = re.findall(r"^samepage-upgrade-node(.*)$", page["EXAMPLES"], flags=re.MULTILINE)
    assert len(examples) >= 6
    for line in examples:
        parse(line.partition("#")[0].split())


@pytest.mark.parametrize(
    "command", [["groff", "-man", "-ww", "-Tutf8", "-rCHECKSTYLE=3"], ["man", "--warnings", "-l"]], ids=["groff", "man"]
)
def test_the_formatters_find_nothing_wrong(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([*command, PAGE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "samepage-upgrade-node" in re.sub(".\b", "", done.stdout)


def complete(line: str) -> list[str]:
    """What bash offers at the end of a command line."""
    words = re.findall(r"=|[^\s=]+", line) + ([""] if line[-1] in " " else [])
    script = f"""
        . {COMPLETION}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        _samepage_upgrade_node samepage-upgrade-node '{words[-1]}' '{words[-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_verbs_flags_and_values() -> None:
    assert set(complete("samepage-upgrade-node ")) == set(VERBS)
    assert complete("samepage-upgrade-node ro") == ["rollback"]
    assert set(complete("samepage-upgrade-node --")) == FLAGS
    assert complete("samepage-upgrade-node install --dr") == ["--dry-run"]
    assert tuple(complete("samepage-upgrade-node --apply=")) == APPLY
    assert complete("samepage-upgrade-node --apply=so") == ["soft-reboot"]
    assert complete("samepage-upgrade-node rollback --data ") == ["restore", "keep"]
    assert tuple(complete("samepage-upgrade-node --stop-before ")) == STATES
    assert complete("samepage-upgrade-node install ./x") == []
    assert complete("samepage-upgrade-node --progress-fd ") == []


def test_completion_is_read_by_bash_only() -> None:
    profile = FILES / "etc/profile.d/samepage-upgrade-node.sh"
    subprocess.run(["sh", "-eu", profile], check=True, env={})
    assert str(COMPLETION.relative_to(FILES)) in profile.read_text()
