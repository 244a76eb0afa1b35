"""Verbs about this host and this checkout: doctor, clean, completion, test, bench."""

from __future__ import annotations

import sys
from contextlib import suppress

import click

from appliance.cli import COMPLETION_VARIABLE, PROGRAM, Session, cli, pass_session, verb

MARKS = {"ok": "ok      ", "missing": "MISSING ", "optional": "optional"}


@verb("doctor", "doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@pass_session
def doctor(session: Session, as_json: bool) -> int:
    """Say what this host lacks, with the command that mends it."""
    from dataclasses import asdict

    from appliance.doctor import examine
    from appliance.store import default_root

    findings = examine(session.project, default_root())
    if as_json:
        session.console.result_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            session.console.result(f"{MARKS[finding.level]}  {finding.topic}: {finding.detail}")
            if finding.fix:
                session.console.result(f"          mend: {finding.fix}")
    return 3 if any(finding.level == "missing" for finding in findings) else 0


@verb("clean", "clean --cache")
@click.option("--cache", is_flag=True, help="Also empty the cache, which all checkouts share.")
@pass_session
def clean(session: Session, cache: bool) -> None:
    """Remove what was built here: dist/ and this checkout's records. Running nodes must be down."""
    from appliance.errors import HostError
    from appliance.store import Store, default_root, remove
    from appliance.targets import base

    running = base.instances(session.project)
    if running:
        names = ", ".join(instance.name for instance in running)
        raise base.NodeError(
            f"nodes of this checkout exist: {names}", hint="end them first with: ./build.py down --all"
        )
    for folder in (session.project / "dist", session.state):
        if folder.exists():
            remove(folder)
            session.console.note(f"removed {folder}")
    if cache:
        freed = Store(default_root(), session.project, session.console.note).clean()
        session.console.note(f"emptied the cache {default_root()}: {freed / 1e6:.0f} MB")
        with suppress(HostError):  # without an engine there is nothing to forget
            from appliance.targets.docker import forget_images

            session.console.note(f"removed {forget_images()} container images")


@verb("completion bash >> ~/.bashrc", "completion zsh", "completion fish")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_session
def completion(session: Session, shell: str) -> None:
    """Print the script that completes verbs and options in the shell."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    session.console.result(found(cli, {}, PROGRAM, COMPLETION_VARIABLE).source())


@verb("test", "test tests/unit -k lock", context_settings={"ignore_unknown_options": True})
@click.option("--lint", is_flag=True, help="Lint and check types first; always done where no ARGUMENTS are given.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@pass_session
def test(session: Session, lint: bool, arguments: tuple[str, ...]) -> int:
    """Run the project's tests, on all cores; ARGUMENTS go to pytest. Also writes JUnit XML: dist/test-results.xml."""
    from appliance.run import attached

    checks = [["ruff", "check", "."], ["mypy"]] if lint or not arguments else []
    tests = [*(arguments or ["-n", "auto", "-v"]), "--junitxml", str(session.project / "dist" / "test-results.xml")]
    for words in (*checks, ["pytest", *tests]):
        session.console.note(f"running {words[0]}")
        status = attached([sys.executable, "-m", *words], cwd=session.project)
        if status:
            return status
    return 0


@verb("bench", "bench --help", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@pass_session
def bench(session: Session, arguments: tuple[str, ...]) -> int:
    """Measure the promises about speed and size, and print the table."""
    from appliance.run import attached

    return attached([sys.executable, "-m", "bench", *arguments], cwd=session.project)
