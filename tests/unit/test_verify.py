"""Verifications of a made-up node: this machine, with a health command that says what the test wants."""

import html.parser
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from appliance.console import Console
from appliance.steps import record_step
from appliance.verification.gate import pass_gate
from appliance.verification.junit import clean, junit_xml
from appliance.verification.page import duration, html_page
from appliance.verification.results import Check, Results, Step, append, gather, read_steps
from appliance.verify import JUNIT, PAGE, SUMMARY, Verification, VerifyError, VerifyRequest, shared_ssh, verify

CHECKS = {
    "alpha": '''
import pytest

def test_green(host):
    """The shell answers."""
    assert host.run("echo hello").stdout == "hello\\n"

@pytest.mark.parametrize("number", [1, 2])
def test_numbers(host, number):
    assert host.check_output("expr %s + 0", str(number)) == str(number)
''',
    "beta": '''
import pytest

def test_own(host):
    """Beta's own service answers."""
    assert host.run("cat FOLDER/beta").stdout.strip() == "up", "beta is <b>down</b>"

@pytest.mark.needs("alpha")
def test_with_alpha(host):
    assert host.run("true").rc == 0
''',
    "gamma": '''
import pytest

@pytest.mark.needs("beta")
def test_with_beta(host):
    """Gamma talks to beta."""
    assert host.run("cat FOLDER/beta").stdout.strip() == "up"

def test_alone(host):
    print("a word")
    assert host.file("/").is_directory
''',
    "elsewhere": '''
def test_never(host):
    assert False
''',
}


class Project:
    """A project with four recipes, three of them on the node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.health = {name: [] for name in ("alpha", "beta", "gamma")}
        (folder / "beta").write_text("up\n")
        for name, text in CHECKS.items():
            self.check(name, text)
        (folder / "node.json").write_text(json.dumps({"name": "n1", "layout": "test", "recipes": [*self.health]}))

    def check(self, recipe: str, text: str, file: str = "") -> None:
        path = self.folder / "recipes" / recipe / "checks" / (file or f"test_{recipe}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("FOLDER", str(self.folder)))

    def break_recipe(self, name: str, detail: str) -> None:
        self.health[name] = [detail]

    def write_health(self, **extra: object) -> Path:
        recipes = {}
        for name, bad in self.health.items():
            probe = {"name": "p", "ok": not bad, "detail": (bad or ["fine"])[0], "ms": 1.0}
            recipes[name] = {"healthy": not bad, "probes": [probe]}
        healthy = not any(self.health.values())
        value = {"healthy": healthy, "boot_seconds": 4.2, "recipes": recipes, "system": [], "journal": {}, **extra}
        (self.folder / "health.json").write_text(json.dumps(value))
        command = self.folder / "health"
        command.write_text(f"#!/bin/sh\ncat {self.folder}/health.json\n{'exit 0' if healthy else 'exit 1'}\n")
        command.chmod(0o755)
        return command

    def verify(self, **changes: object) -> Verification:
        settings: dict[str, object] = {"health_deadline": 0.0, "check_deadline": 20.0, "quiet": True, **changes}
        settings["health_command"] = str(changes.get("health_command") or self.write_health())
        settings["node_file"] = str(self.folder / "node.json")
        request = VerifyRequest(self.folder, "local://", self.folder / "out", **settings)  # type: ignore[arg-type]
        return verify(request, Console(style="none"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("TEAMCITY_VERSION", raising=False)
    return Project(tmp_path)


def outcomes(done: Verification) -> dict[str, str]:
    return {f"{check.recipe}.{check.name}": check.outcome for check in done.results.checks}


GREEN = {
    "alpha.test_green": "passed", "alpha.test_numbers[1]": "passed", "alpha.test_numbers[2]": "passed",
    "beta.test_own": "passed", "beta.test_with_alpha": "passed", "gamma.test_with_beta": "passed",
    "gamma.test_alone": "passed",
}  # fmt: skip


def test_green(project: Project) -> None:
    done = project.verify()
    assert outcomes(done) == GREEN
    assert done.ok
    assert done.results.node["name"] == "n1"
    assert [step.name for step in done.results.steps] == ["become healthy"]
    assert done.results.checks[0].title == "The shell answers"
    assert all(check.finish >= check.start > 0 for check in done.results.checks)
    assert "a word" in next(check.output for check in done.results.checks if check.name == "test_alone")
    assert not list(project.folder.rglob("__pycache__"))
    assert not list(project.folder.rglob(".pytest_cache"))


def test_a_stopped_service_turns_exactly_its_own_checks_red(project: Project) -> None:
    (project.folder / "beta").write_text("gone\n")
    project.break_recipe("beta", "inactive (dead)")
    done = project.verify()
    assert outcomes(done) == {**GREEN, "beta.test_own": "failed", "gamma.test_with_beta": "skipped"}
    assert not done.ok
    [skipped] = [check for check in done.results.checks if check.outcome == "skipped"]
    assert skipped.detail == "needs beta, which is down: p: inactive (dead)"
    [red] = [check for check in done.results.checks if check.outcome == "failed"]
    assert "beta is <b>down</b>" in red.detail


def test_a_hanging_check_is_cut_and_named_and_the_rest_goes_on(project: Project) -> None:
    project.check("beta", 'def test_hangs(host):\n    host.run("sleep 987 & wait")\n', "test_hang.py")
    started = time.monotonic()
    done = project.verify(check_deadline=1.0)
    assert time.monotonic() - started < 15
    assert outcomes(done) == {**GREEN, "beta.test_hangs": "failed"}
    [red] = done.summary()["red"]
    assert red["cut"]
    assert red["detail"].startswith("cut at its deadline after 1.")
    assert red["id"].endswith("test_hang.py::test_hangs[local]")
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 987" not in listing


def test_a_check_may_set_its_own_deadline(project: Project) -> None:
    text = "import pytest\n@pytest.mark.timeout(30)\ndef test_slow(host):\n    assert host.run('sleep 2').rc == 0\n"
    project.check("beta", text, "test_slow.py")
    assert project.verify(check_deadline=1.0).ok


@pytest.mark.parametrize(("container_file", "expected"), [("/", "skipped"), ("/nowhere", "failed")])
def test_checks_of_a_machine_are_left_out_in_a_container(
    project: Project, monkeypatch: pytest.MonkeyPatch, container_file: str, expected: str
) -> None:
    text = "import pytest\n@pytest.mark.machine\ndef test_disk(host):\n    assert False\n"
    project.check("beta", text, "test_disk.py")
    monkeypatch.setenv("PYTHONPATH", str(project.folder))
    (project.folder / "sitecustomize.py").write_text(
        f"import appliance.verification.gate\nappliance.verification.gate.CONTAINER_FILE = {container_file!r}\n"
    )
    assert outcomes(project.verify()) == {**GREEN, "beta.test_disk": expected}


def test_filters(project: Project) -> None:
    assert set(outcomes(project.verify(recipes=("beta",)))) == {"beta.test_own", "beta.test_with_alpha"}
    assert set(outcomes(project.verify(keyword="numbers"))) == {"alpha.test_numbers[1]", "alpha.test_numbers[2]"}
    with pytest.raises(VerifyError, match="no check matches 'nothing'"):
        project.verify(keyword="nothing")
    with pytest.raises(VerifyError, match="did you mean 'beta'"):
        project.verify(recipes=("betta",))
    with pytest.raises(VerifyError, match="is for a recipe of this node"):
        project.verify(recipes=("elsewhere",))


def test_an_unreadable_file_of_checks_is_red(project: Project) -> None:
    project.check("beta", "import nowhere_to_be_found\n", "test_broken.py")
    done = project.verify()
    assert not done.ok
    [check] = [check for check in done.results.checks if check.outcome == "error"]
    assert check.recipe == "beta"
    assert "nowhere_to_be_found" in check.detail


def test_needs_must_name_a_recipe(project: Project) -> None:
    project.check("beta", "import pytest\n@pytest.mark.needs('bta')\ndef test_x(host):\n    pass\n", "test_x.py")
    done = project.verify()
    assert not done.ok
    assert "needs(bta) names no recipe" in done.log.read_text()


def test_a_check_that_ends_the_process_is_named(project: Project) -> None:
    project.check("beta", "import os\ndef test_a_dies(host):\n    os._exit(3)\n", "test_a_dies.py")
    done = project.verify()
    assert not done.ok
    errors = {check.name: check.detail for check in done.results.checks if check.outcome == "error"}
    assert errors["test_a_dies"] == "the run ended in the middle of this check"
    assert errors["test_alone"] == "the run ended before this check"
    assert len(done.results.checks) == len(GREEN) + 1


# --- the gate --------------------------------------------------------------------------------------------------------


def test_an_unhealthy_node_fails_with_the_journal(project: Project) -> None:
    project.break_recipe("beta", "failed (failed)")
    command = project.write_health(hopeless=True, journal={"beta.service": ["line 1", "beta: no such <file>"]})
    done = project.verify(health_command=command, health_deadline=30.0)
    [step] = done.results.steps
    assert not step.ok
    assert step.seconds < 10  # at once, since the unit has failed
    assert "beta: p: failed (failed)" in step.detail
    assert "beta: no such <file>" in step.detail
    assert "beta: no such &lt;file&gt;" in done.page.read_text()
    assert "beta: no such <file>" in ElementTree.parse(done.junit).findtext(".//testsuite[@name='steps']//failure", "")


def test_a_node_that_never_answers_fails_within_its_deadline(project: Project) -> None:
    started = time.monotonic()
    done = project.verify(health_command=project.folder / "absent", health_deadline=1.5)
    assert time.monotonic() - started < 15
    assert not done.ok
    assert done.results.checks == ()
    [step] = done.results.steps
    assert 1.4 < step.seconds < 5
    assert "could not be asked" in step.detail
    assert "Test results (0 tests)" in done.page.read_text()


class Answer:
    def __init__(self, rc: int, stdout: str, stderr: str = "") -> None:
        self.rc, self.stdout, self.stderr = rc, stdout, stderr


def test_the_gate_keeps_trying_while_the_node_starts() -> None:
    healthy = json.dumps({"healthy": True, "recipes": {}})
    answers = [RuntimeError("connection refused"), Answer(127, "", "not there yet"), Answer(1, ""), Answer(0, healthy)]

    class Starting:
        def run(self, command: str, *args: str) -> Answer:
            if args:
                assert command in ("cat %s", "test -e %s")
                return Answer(0, '{"name": "n", "version": "7"}')
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    gate = pass_gate(Starting(), 20, pause=0.01)
    assert gate.ok
    assert gate.release == "7"
    assert gate.container
    assert answers == []


# --- the connection --------------------------------------------------------------------------------------------------


def test_ssh_shares_one_connection_and_keeps_what_was_configured(tmp_path: Path) -> None:
    given = tmp_path / "given config"
    given.write_text("Host n1\n  HostName 192.0.2.1\n  Port 2222\n  User root\n  BatchMode no\n")
    options = ("--ssh-config=" + str(given), "--sudo")
    request = VerifyRequest(tmp_path, "ssh://n1", tmp_path, options=options)
    with shared_ssh(request, tmp_path) as found:
        assert found[0] == "--sudo"
        file = found[1].removeprefix("--ssh-config=")
        asked = subprocess.run(["ssh", "-G", "-F", file, "n1"], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split(" ", 1) for line in asked.splitlines())
    assert (settings["hostname"], settings["port"], settings["user"]) == ("192.0.2.1", "2222", "root")
    assert (settings["controlmaster"], settings["batchmode"], settings["serveraliveinterval"]) == ("auto", "no", "10")
    assert settings["controlpath"].startswith(f"{tmp_path}/")


def test_other_connections_are_left_alone(tmp_path: Path) -> None:
    with shared_ssh(VerifyRequest(tmp_path, "docker://n1", tmp_path, options=("--x",)), tmp_path) as found:
        assert found == ("--x",)


# --- the reports -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Collects the page's texts and checks that what is opened is closed."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [str(values[name]) for name in ("src", "href") if name in values]
        self.ids += [str(values["id"])] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag and self.open[-1] in ("li",):
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def test_page_and_junit_agree(project: Project) -> None:
    (project.folder / "beta").write_text("gone\n")
    project.break_recipe("beta", "down")
    steps = project.folder / "steps.json"
    with record_step(steps, "boot"):
        pass
    done = project.verify(steps=steps)
    page = Page((project.folder / "out" / PAGE).read_text())
    assert "Test results (7 tests)" in page.texts
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.references)
    text = " ".join(page.texts)
    for word in ("boot", "become healthy", "run 7 checks", "Start", "Finish", "Duration", "beta is <b>down</b>"):
        assert word in text
    root = ElementTree.parse(project.folder / "out" / JUNIT).getroot()
    cases = [case for suite in root for case in suite if suite.get("name") != "steps"]
    assert len(cases) == 7
    assert root.get("failures") == "2"  # the check and the step
    assert root.get("skipped") == "1"
    assert int(root.get("tests", "0")) == len(list(root.iter("testcase"))) == 7 + 2
    assert sum(int(suite.get("tests", "0")) for suite in root) == 9
    summary = json.loads((project.folder / "out" / SUMMARY).read_text())
    assert (summary["tests"], summary["passed"], summary["failed"], summary["skipped"]) == (7, 5, 1, 1)
    assert len(summary["checks"]) == 7
    assert done.summary()["files"]["page"].endswith(PAGE)


def test_teamcity(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAMCITY_VERSION", "2026.1")
    (project.folder / "beta").write_text("gone\n")
    project.break_recipe("beta", "down")
    done = project.verify()
    log = done.log.read_text()
    assert log.count("##teamcity[testFinished") == 7
    assert log.count("##teamcity[testFailed") == 1
    assert log.count("##teamcity[testIgnored") == 1
    assert "##teamcity[buildProblem" in log


def test_teamcity_is_silent_elsewhere(project: Project) -> None:
    assert "##teamcity" not in project.verify().log.read_text()


def test_text_that_xml_and_html_cannot_hold() -> None:
    nasty = 'a\x00b\x1b[31m</pre>&"\ud800\U0001f600'
    results = Results(
        nasty, (Step(nasty, 1, 2, False, nasty),), (Check(nasty, nasty, nasty, nasty, "failed", 2, 3, nasty, nasty),),
    )
    ElementTree.fromstring(junit_xml(results))
    Page(html_page(results))
    assert clean("a\tb\n") == "a\tb\n"


def test_steps_are_recorded_also_when_they_fail(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    with record_step(file, "install"):
        pass
    with pytest.raises(ValueError, match="broken"), record_step(file, "boot"):
        raise ValueError("broken")
    first, second = read_steps(file)
    assert (first.name, first.ok, second.name, second.ok, second.detail) == ("install", True, "boot", False, "broken")
    assert json.loads(file.read_text())[1]["seconds"] == second.seconds
    assert read_steps(tmp_path / "none") == []
    with record_step(file, "verify", since=first.start):  # what came before had ended by then
        pass
    assert read_steps(file)[2].start == second.finish
    with record_step(tmp_path / "gone" / "steps.json", "boot"):
        pass


def test_a_record_that_stops_short(tmp_path: Path) -> None:
    events = tmp_path / "events"
    append(events, "collected", checks=[{"id": "x", "recipe": "r", "name": "x", "title": ""}])
    results = gather("h", [], events, 5.0)
    assert results.checks[0].outcome == "error"
    assert not results.ok
    assert not gather("h", [], tmp_path / "absent", 5.0).ok


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.123, 12.34, 60)] == ["0.12 s", "12.3 s", "1 min 00 s"]
    assert duration(125.4) == "2 min 05 s"


def test_the_plugin_is_quiet_without_a_plan(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_x():\n    pass\n")
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "appliance.verification.plugin"]
    words += ["-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert re.search(r"1 passed", done.stdout), done.stdout + done.stderr
