"""The whole verification of an installed virtual machine over ssh."""

from pathlib import Path

from appliance.console import Console
from appliance.steps import record_step
from appliance.verify import VerifyRequest, verify
from tests.boot.conftest import PROJECT, TARGET, Node


def test_every_check_is_green(node: Node, tmp_path: Path) -> None:
    steps = tmp_path / "steps.json"
    with record_step(steps, "wait"):
        node.wait()
    host, options = TARGET.connection(node.instance)
    request = VerifyRequest(PROJECT, host, tmp_path / "out", options, steps=steps, quiet=True)
    done = verify(request, Console("none"))
    assert [(check.id, check.detail) for check in done.results.checks if check.outcome in ("failed", "error")] == []
    assert [(step.name, step.detail) for step in done.results.steps] == [("wait", ""), ("become healthy", "")]
    assert done.ok
    assert len(done.results.checks) >= 32
    page = done.page.read_text()
    assert f"Test results ({len(done.results.checks)} tests)" in page
    assert done.results.release in page
