"""A verification that is always green proves nothing: broken nodes must turn it red, and in the right place.

The nodes are system containers of the very layers that the virtual machines boot, since each test needs its own
fault and a whole verification takes seconds there.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from appliance import cli
from appliance.console import Console
from appliance.targets import base
from appliance.verify import Verification, VerifyRequest, verify
from tests.engine import docker_engine

PROJECT = Path(__file__).parent.parent.parent
# What to stop so that a recipe's own service is down; of the console the socket too, which would start it again.
SERVICES = {
    "base": ["ssh.service"],
    "nginx": ["nginx.service"],
    "postgresql": ["postgresql.service"],
    "valkey": ["valkey-server.service"],
    "postfix": ["postfix.service"],
    "samepage": ["samepage.service"],
    "console": ["samepage-console.socket", "samepage-console.service"],
    "node-tools": ["samepage-health.service"],
}
Start = Callable[..., "Node"]

pytestmark = pytest.mark.fault


@dataclass
class Node:
    instance: base.Instance
    output: Path

    def run(self, *words: str) -> str:
        done = base.target_of(self.instance.target).execute(self.instance, words)
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
        return done.stdout.decode()

    def verify(
        self, project: Path = PROJECT, recipes: tuple[str, ...] = (), health: float = 1, check: float = 60
    ) -> Verification:
        host, options = base.target_of(self.instance.target).connection(self.instance)
        request = VerifyRequest(project, host, self.output, options, recipes=recipes, quiet=True)
        return verify(replace(request, health_deadline=health, check_deadline=check), Console(style="none"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts nodes with credentials (name -> content); all are gone afterwards."""
    names = []

    def up(name: str, *options: str, **credentials: str) -> Node:
        folder = tmp_path_factory.mktemp(name)
        words = ["--progress", "none", "up", "--target", "docker", "--name", name, *options]
        for number, (credential, content) in enumerate(credentials.items()):
            file = folder / str(number)
            file.write_text(content)
            words += ["--credential", f"{credential}={file}"]
        names.append(name)
        assert cli.main(words) == 0
        return Node(base.find(PROJECT, name), folder / "out")

    with docker_engine():
        yield up
        for name in names:
            cli.main(["--progress", "none", "down", "--name", name])


@pytest.fixture(scope="module")
def node(start: Start) -> Node:
    return start("faults-verify")


def red(done: Verification) -> dict[str, list[str]]:
    """The red checks per recipe."""
    found: dict[str, list[str]] = {}
    for check in done.results.checks:
        if check.outcome in ("failed", "error"):
            found.setdefault(check.recipe, []).append(check.name)
    return found


def test_green(node: Node) -> None:
    done = node.verify(health=60)
    assert red(done) == {}
    assert done.ok
    assert len(done.results.checks) >= 32
    assert {check.recipe for check in done.results.checks} == set(SERVICES)
    assert cli.main(["verify", "--name", node.instance.name, "--output-dir", str(node.output), "--json", "valkey"]) == 0


@pytest.mark.parametrize("recipe", SERVICES)
def test_a_stopped_service_turns_exactly_its_own_checks_red(node: Node, recipe: str) -> None:
    node.run("systemctl", "stop", *SERVICES[recipe])
    try:
        done = node.verify()
    finally:
        node.run("systemctl", "start", *SERVICES[recipe])
        node.run("samepage-health", "--wait", "60")
    assert set(red(done)) == {recipe}
    reasons = [check.detail for check in done.results.checks if check.outcome == "skipped"]
    left_out = [reason for reason in reasons if reason.startswith("needs ")]
    assert all(reason.startswith(f"needs {recipe}, which is down: ") for reason in left_out)
    assert not done.ok


def test_a_hanging_check_is_cut_at_its_deadline_and_named(node: Node, tmp_path: Path) -> None:
    checks = tmp_path / "recipes" / "valkey" / "checks"
    checks.mkdir(parents=True)
    hangs = "def test_hangs(host):\n    host.run('sleep 300')\n\n"
    (checks / "test_hang.py").write_text(hangs + "def test_next(host):\n    assert host.run('true').rc == 0\n")
    started = time.monotonic()
    done = node.verify(tmp_path, health=60, check=3)
    assert time.monotonic() - started < 150  # of 300
    [hung, following] = done.results.checks
    assert (hung.name, hung.outcome, hung.cut) == ("test_hangs", "failed", True)
    assert hung.detail.startswith("cut at its deadline after 3.")
    assert following.outcome == "passed"


def test_a_failed_unit_ends_the_gate_at_once_with_its_journal(start: Start) -> None:
    broken = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'echo broken on purpose >&2; exit 3'\nRestart=no\n"
    node = start("faults-failed", "--no-wait", **{"systemd.unit-dropin.valkey-server.service": broken})
    done = node.verify(health=300, recipes=("valkey",))
    [step] = [step for step in done.results.steps if step.name == "become healthy"]
    assert not step.ok
    assert step.seconds < 120
    assert "valkey-server.service" in step.detail
    assert "broken on purpose" in step.detail
    assert "broken on purpose" in done.page.read_text()
    assert "broken on purpose" in done.junit.read_text()
    assert set(red(done)) == {"valkey"}


def test_a_node_that_never_becomes_healthy_fails_within_its_deadline(start: Start) -> None:
    stuck = "[Service]\nTimeoutStartSec=infinity\nExecStartPre=/bin/sh -c 'echo stuck on purpose; sleep infinity'\n"
    node = start("faults-stuck", "--no-wait", **{"systemd.unit-dropin.valkey-server.service": stuck})
    done = node.verify(health=25, recipes=("valkey",))
    [step] = [step for step in done.results.steps if step.name == "become healthy"]
    assert not step.ok
    assert 24 < step.seconds < 100
    assert "stuck on purpose" in step.detail
