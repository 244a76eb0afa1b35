"""The verb push."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import Session, Settled, pass_session, report, verb
from appliance.verbs.nodes import name_option, running
from appliance.verbs.upgrades import key_option

if TYPE_CHECKING:
    from appliance.push import Outcome, Request

WATCHED = ("recipes", "appliance/node")
INSTALL_HINT = "only nodes that are installed on a disk can be upgraded; start one with: ./build.py up --installed"
KEEP_WARM = 200.0  # seconds; ssh gives up its shared connection after 300 without use


@verb("push", "push --watch", "push --name second --dry-run")
@name_option
@click.option("--watch", is_flag=True, help="Go on: push again whenever a file changes, until Ctrl-C.")
@click.option("--dry-run", is_flag=True, help="Only say what the upgrade would do; nothing is sent.")
@click.option(
    "--apply",
    type=click.Choice(["auto", "live", "soft-reboot", "reboot"]),
    default="auto",
    show_default=True,
    help="How deep the upgrade may or shall go.",
)
@click.option("--allow-downgrade", is_flag=True, help="Also where the node runs a newer version than this tree's.")
@click.option(
    "--timeout", type=click.FloatRange(1), default=900.0, show_default=True, help="Seconds for the node's part."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON; one line each with --watch.")
@key_option
@pass_session
def push(session: Session, /, name: str, watch: bool, as_json: bool, timeout: float, **given: Any) -> int:
    """Bring a running node to what the recipes make now. Exit status: that of the node's tool, 0 for nothing to do."""
    from appliance import push as pushing
    from appliance.pipeline import Options

    if watch and given["dry_run"]:
        raise click.UsageError("--watch and --dry-run exclude each other")
    target, instance = running(session, name)
    options = Options(project=session.project, layout=session.layout)
    request = pushing.Request(options, target, instance, deadline=timeout, **given)
    if watch:
        return keep_pushing(session, request, as_json)
    outcome = pushing.push(request, session.console)
    if as_json:
        session.console.result_json(outcome.record())
    else:
        show(session, outcome)
    return 0 if outcome.status == pushing.NOTHING else outcome.status


def keep_pushing(session: Session, request: Request, as_json: bool) -> int:
    """Push now and after every change, until Ctrl-C. What goes wrong is told; only a node that is gone ends it."""
    from appliance.push import push as push_once
    from appliance.watch import snapshot, wait_for_change

    folders = [session.project / folder for folder in WATCHED]
    idle = warm_keeper(request)
    try:
        while True:
            before = snapshot(folders)
            running(session, request.instance.name)
            try:
                outcome = push_once(request, session.console)
            except Exception as error:
                report(error, Settled(session.debug, session.console))
            else:
                if as_json:
                    session.console.result(json.dumps(outcome.record(), sort_keys=True))
                else:
                    show(session, outcome)
            session.console.note(f"watching {' and '.join(WATCHED)}; Ctrl-C ends it")
            for path in wait_for_change(folders, before, idle)[:5]:
                session.console.note(f"changed: {Path(path).relative_to(session.project)}")
    except KeyboardInterrupt:
        session.console.note("stopped watching")
        return 0


def warm_keeper(request: Request) -> Callable[[], None]:
    """Called often, it runs a command on the node now and then, so that the shared connection stays."""
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if time.monotonic() - last > KEEP_WARM:
            request.target.reachable(request.instance)
            last = time.monotonic()

    return keep


def show(session: Session, outcome: Outcome) -> None:
    """What became of the push, for people."""
    console, name = session.console, outcome.node
    if outcome.plan:
        console.result(outcome.plan)
        return
    start, goal = outcome.text("from"), outcome.text("to")
    why = outcome.text("message") or outcome.text("reason")
    hint = INSTALL_HINT if outcome.text("reason") == "not-upgradable" else outcome.text("hint")
    because = (f": {why}" if why else "") + (f"\n  hint: {hint}" if hint else "")
    match outcome.status:
        case 0:
            seconds = outcome.answer.get("seconds")
            there = f", {seconds:.1f} s of it on the node" if isinstance(seconds, int | float) else ""
            depth = f" ({outcome.text('class')})" if outcome.text("class") else ""
            console.result(f"{name} runs {goal}{depth} after {outcome.seconds:.1f} s{there}")
        case 2:
            console.note(f"nothing to do: {name} runs this tree already, as release {start}")
        case 3:
            console.error(f"{name} refuses release {goal}{because}")
        case 4:
            console.note(f"{name} has release {goal} ready and starts it at its next boot{because}")
        case 5:
            console.error(f"{name} tried release {goal} and went back to {start}{because}")
        case 6:
            console.error(f"{name} is in another upgrade{because}")
        case _:
            console.error(f"{name} keeps release {start}{because}")
    units = outcome.answer.get("units")
    for unit, action in sorted(units.items()) if isinstance(units, dict) and outcome.status == 0 else ():
        if action != "none":
            console.result(f"  {action!s:<8} {unit}")
