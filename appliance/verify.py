"""Proves a running node: runs the checks of its recipes on it with pytest-testinfra and writes the reports."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.console import Console
from appliance.errors import ApplianceError, nearest
from appliance.run import pasteable, run, stream
from appliance.verification.gate import HEALTH_COMMAND, NODE_FILE
from appliance.verification.junit import junit_xml
from appliance.verification.page import html_page
from appliance.verification.plan import Plan, write_plan
from appliance.verification.results import Results, gather, read_steps

PLUGINS = ("testinfra.plugin", "pytest_timeout", "teamcity.pytest_plugin", "appliance.verification.plugin")
NOTHING_SELECTED = 5  # pytest's exit status
PAGE, JUNIT, SUMMARY, LOG = "results.html", "junit.xml", "results.json", "run.log"


class VerifyError(ApplianceError):
    """The verification cannot be run as asked."""

    status = 2


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to prove. `host` and `options` are testinfra's host specification and pytest options; times in seconds."""

    project: Path
    host: str
    output: Path  # folder of the reports
    options: tuple[str, ...] = ()
    steps: Path | None = None  # steps.json of the node: what happened before
    recipes: tuple[str, ...] = ()  # empty: all of the node's
    keyword: str = ""  # pytest's -k
    health_deadline: float = 180.0
    check_deadline: float = 60.0
    quiet: bool = False  # pytest's own lines go to the log only
    health_command: str = HEALTH_COMMAND
    node_file: str = NODE_FILE


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome and the files that tell it."""

    results: Results
    page: Path
    junit: Path
    summary_file: Path
    log: Path

    @property
    def ok(self) -> bool:
        return self.results.ok

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        files = {"page": str(self.page), "junit": str(self.junit), "log": str(self.log)}
        return {**self.results.summary(), "files": files}


def recipes_with_checks(project: Path) -> list[str]:
    return sorted(folder.parent.name for folder in project.glob("recipes/*/checks") if any(folder.glob("test_*.py")))


def verify(request: VerifyRequest, console: Console) -> Verification:
    """Pass the health gate, run the checks, write the reports.

    A red check or an unhealthy node is an outcome, not an error. Raises VerifyError when there is nothing to run.
    """
    known = recipes_with_checks(request.project)
    if not known:
        raise VerifyError("no recipe has checks", hint="docs/verification.md shows how to write one")
    for name in request.recipes:
        if name not in known:
            raise VerifyError(f"no recipe {name!r} with checks", hint=nearest(name, known))
    request.output.mkdir(parents=True, exist_ok=True)
    log = request.output / LOG
    with tempfile.TemporaryDirectory(prefix="samepage-verify-") as temporary:
        events, plan = Path(temporary) / "events", Path(temporary) / "plan.json"
        write_plan(_plan(request, events, known), plan)
        with shared_ssh(request, Path(temporary)) as options, console.stage(f"verify {request.host}"):
            command = command_line(request, plan, options)
            log.write_text(f"$ {pasteable(command)}\n", encoding="utf-8")
            show = None if request.quiet else console.result
            status = stream(command, log=log, cwd=request.project, env=environment(), check=False, on_line=show)
        results = gather(request.host, read_steps(request.steps), events, time.time())
    if status == NOTHING_SELECTED and not results.checks:
        what = f"matches {request.keyword!r}" if request.keyword else "is for a recipe of this node"
        raise VerifyError(f"no check {what}", hint=f"the node's recipes: {', '.join(results.node.get('recipes', []))}")
    return write_reports(results, request.output, log)


def _plan(request: VerifyRequest, events: Path, known: list[str]) -> Plan:
    return Plan(
        events=str(events), health_deadline=request.health_deadline, check_deadline=request.check_deadline,
        health_command=request.health_command, node_file=request.node_file, recipes=known, only=list(request.recipes),
    )  # fmt: skip


def write_reports(results: Results, output: Path, log: Path) -> Verification:
    """Write page, JUnit XML and JSON into the folder, each whole or not at all."""
    done = Verification(results, output / PAGE, output / JUNIT, output / SUMMARY, log)
    checks = [asdict(check) for check in results.checks]
    contents = {
        done.page: html_page(results).encode(errors="replace"),
        done.junit: junit_xml(results),
        done.summary_file: json.dumps({**done.summary(), "checks": checks}, indent=1).encode() + b"\n",
    }
    for path, content in contents.items():
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(content)
        temporary.replace(path)
    return done


def command_line(request: VerifyRequest, plan: Path, options: Sequence[str]) -> list[str]:
    """The pytest command; it loads the plugins named here and no others."""
    words = [sys.executable, "-m", "pytest", "-c", str(Path(__file__).parent / "verification" / "pytest.ini")]
    words += [f"--rootdir={request.project}", "--import-mode=importlib", "--continue-on-collection-errors"]
    words += ["-p", "no:cacheprovider"]
    for plugin in PLUGINS:
        words += ["-p", plugin]
    words += [f"--verification={plan}", f"--hosts={request.host}", *options]
    if request.keyword:
        words += ["-k", request.keyword]
    return [*words, *(f"recipes/{name}/checks" for name in recipes_with_checks(request.project))]


def environment() -> dict[str, str]:
    """This process's, with nothing that would change how pytest runs or leave files beside the checks."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    path = [str(Path(__file__).parent.parent), *filter(None, [kept.get("PYTHONPATH", "")])]
    changed = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **changed, "PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def shared_ssh(request: VerifyRequest, folder: Path) -> Iterator[tuple[str, ...]]:
    """The connection's options, for ssh with a configuration that shares one connection and notices a dead node."""
    if not request.host.startswith("ssh://"):
        yield request.options
        return
    given = [option.partition("=")[2] for option in request.options if option.startswith("--ssh-config=")]
    included = given or [str(Path.home() / ".ssh" / "config"), "/etc/ssh/ssh_config"]
    lines = [*(f'Include "{file}"' for file in included if Path(file).exists()), "Host *", *SSH_DEFAULTS,
             f'  ControlPath "{folder}/%C"']
    file = folder / "ssh_config"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    others = (option for option in request.options if not option.startswith("--ssh-config="))
    try:
        yield (*others, f"--ssh-config={file}")
    finally:
        for control in folder.glob("[0-9a-f]" * 40):
            run(["ssh", "-F", file, "-o", f"ControlPath={control}", "-O", "exit", "node"], check=False, timeout=10)


SSH_DEFAULTS = (
    "  BatchMode yes", "  ConnectTimeout 10", "  ServerAliveInterval 10", "  ServerAliveCountMax 3",
    "  ControlMaster auto", "  ControlPersist 60",
)  # fmt: skip
