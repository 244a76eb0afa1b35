"""The pytest plugin of a verification: passes the gate, runs the checks of the node's recipes, records what happens.

`--verification FILE` names the plan that appliance.verify writes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import testinfra

from appliance.verification import results
from appliance.verification.gate import Gate, failed_probes, pass_gate
from appliance.verification.plan import Plan, read_plan

TIMEOUT_MARK = "from pytest-timeout"
UNREACHED = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verification", help="plan of the verification, a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*recipes): leave the check out while one of these recipes is not healthy")
    config.addinivalue_line("markers", "machine: leave the check out on a node that is a container")
    file = config.getoption("--verification")
    if file:
        config.pluginmanager.register(Verification(read_plan(Path(file))), "samepage-verification")


class Verification:
    """The hooks of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.events = Path(plan.events)
        self.gate: Gate | None = None
        self.names: dict[str, dict[str, str]] = {}
        self.reports: dict[str, list[pytest.TestReport]] = {}

    # --- before the checks ---

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        option = session.config.option
        host = testinfra.get_hosts(
            option.hosts.split(","), ssh_config=option.ssh_config, ssh_identity_file=option.ssh_identity_file,
            connection=option.connection,
        )[0]
        plan = self.plan
        gate = pass_gate(host, plan.health_deadline, command=plan.health_command, node_file=plan.node_file)
        self.gate = gate
        self._record("step", **asdict(results.Step("become healthy", gate.start, gate.finish, gate.ok, gate.detail)))
        if not gate.ok:
            self._say(session.config, gate.detail)
        if not gate.reached:
            self._record("end")
            pytest.exit(gate.detail, returncode=UNREACHED)
        self._record("node", node=dict(gate.node), health=dict(gate.health), release=gate.release)

    @staticmethod
    def _say(config: pytest.Config, text: str) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.write_line(text, red=True)
        if getattr(config, "_teamcityReporting", None):
            from teamcity.messages import TeamcityServiceMessages

            TeamcityServiceMessages().buildProblem(text[:4000], "samepage-health")

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Only the checks of recipes that run on this node."""
        recipe = recipe_of(collection_path)
        if recipe and (recipe not in self.on_node or (self.plan.only and recipe not in self.plan.only)):
            return True
        return None

    @property
    def on_node(self) -> list[str]:
        """The node's recipes in its layout's order."""
        if self.gate is None:
            return []
        recipes = self.gate.node.get("recipes") or self.gate.health["recipes"]
        return list(recipes)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep each recipe's checks together, in the order of the layout, and give each its deadline."""
        order = {name: index for index, name in enumerate(self.on_node)}
        items.sort(key=lambda item: order.get(recipe_of(item.path), len(order)))
        for item in items:
            for mark in item.iter_markers("needs"):
                unknown = [name for name in mark.args if name not in self.plan.recipes and name not in order]
                if unknown or not mark.args:
                    raise pytest.UsageError(f"{item.nodeid}: needs({unknown[0] if unknown else ''}) names no recipe")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(self.plan.check_deadline))
            self.names[item.nodeid] = {
                "id": item.nodeid, "recipe": recipe_of(item.path), "name": shown_name(item), "title": title_of(item),
            }

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._record("collected", checks=[self.names[item.nodeid] for item in session.items])

    # --- each check ---

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("machine") and self.gate and self.gate.container:
            pytest.skip("a container has its host's kernel, disks and clock")
        for mark in item.iter_markers("needs"):
            for name in mark.args:
                reason = self._why_down(name)
                if reason:
                    pytest.skip(reason)

    def _why_down(self, recipe: str) -> str:
        """Why a check that needs the recipe cannot run; empty when it can."""
        if recipe not in self.on_node:
            return f"needs {recipe}, which is not on this node"
        health = self.gate.health["recipes"].get(recipe) if self.gate else None
        if health and not health["healthy"]:
            return f"needs {recipe}, which is down: {failed_probes(health)}"
        return ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._record("begin", id=item.nodeid, start=time.time())
        before = descendants(os.getpid())
        try:
            return (yield)
        finally:
            check = self._finish(item.nodeid)
            if check and check.cut:
                end_all(pid for pid in descendants(os.getpid()) if pid not in before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)

    def _finish(self, nodeid: str) -> results.Check | None:
        reports = self.reports.pop(nodeid, [])
        if not reports:
            return None
        check = as_check(self.names[nodeid], reports)
        self._record("check", **asdict(check))
        return check

    # --- after the checks ---

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._record("end")

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file of checks that cannot be read is one red check."""
        if report.failed:
            now = time.time()
            path, title = Path(report.nodeid), "the file of checks can be read"
            named = (report.nodeid, recipe_of(path), path.name, title)
            self._record("check", **asdict(results.Check(*named, "error", now, now, report.longreprtext)))

    def _record(self, event: str, **values: Any) -> None:
        results.append(self.events, event, **values)


def recipe_of(path: Path) -> str:
    """The recipe whose folder of checks holds `path`; empty for other paths."""
    parts = path.parts
    return parts[parts.index("checks") - 1] if "checks" in parts[1:] else ""


def shown_name(item: pytest.Item) -> str:
    """The check's name with its own parameters, without the host's."""
    name = getattr(item, "originalname", None) or item.name
    specification = getattr(item, "callspec", None)
    host = getattr(specification, "params", {}).get("_testinfra_host")
    ids = [part for part in getattr(specification, "_idlist", []) if not host or part != host.backend.get_pytest_id()]
    return f"{name}[{'-'.join(ids)}]" if ids else str(name)


def title_of(item: pytest.Item) -> str:
    text = (getattr(getattr(item, "function", None), "__doc__", None) or "").strip()
    return text.splitlines()[0].rstrip(".") if text else ""


def as_check(entry: dict[str, str], reports: Sequence[pytest.TestReport]) -> results.Check:
    """One check out of its reports of set-up, call and tear-down; the worst of them counts."""
    outcome: results.Outcome = "passed"
    detail = ""
    for report in reports:
        if report.failed and outcome not in results.RED:
            outcome = "failed" if report.when == "call" else "error"
            detail = report.longreprtext
        elif report.skipped and outcome == "passed":
            outcome, detail = "skipped", skip_reason(report)
    cut = TIMEOUT_MARK in detail
    start, finish = min(report.start for report in reports), max(report.stop for report in reports)
    if cut:
        detail = f"cut at its deadline after {finish - start:.1f} s\n\n{detail}"
    output = "\n".join(f"--- {name} ---\n{text.rstrip()}" for name, text in reports[-1].sections)
    named = (entry["id"], entry["recipe"], entry["name"], entry["title"])
    return results.Check(*named, outcome, start, finish, detail, output, cut)


def skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return report.longreprtext


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, as far as the kernel tells."""
    found: set[int] = set()
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                found |= {int(child), *descendants(int(child))}
    return found


def end_all(processes: Iterable[int]) -> None:
    """What a cut check left running is of no use to anybody."""
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
