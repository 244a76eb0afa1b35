"""Verbs about running nodes: up, status, ssh, logs, verify, down."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from appliance.cli import Session, pass_session, verb
from appliance.errors import ApplianceError
from appliance.steps import STEPS_FILE, record_step
from appliance.targets import base

FIRST_LOGIN = "/run/samepage-app/first-login.json"
DEFAULT_NAME = "samepage"

name_option = click.option("--name", default=DEFAULT_NAME, show_default=True, help="The node's name on this host.")


def read_credentials(_ctx: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, bytes]:
    """NAME=FILE pairs as credentials."""
    found = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and Path(file).is_file()):
            raise click.BadParameter(f"{value!r} is not NAME=FILE with an existing file")
        found[name] = Path(file).read_bytes()
    return found


@verb("up", "up --installed --firmware uefi --name second", "up --target docker")
@name_option
@click.option(
    "--target",
    "target_name",
    type=click.Choice(["qemu", "docker"]),
    default="qemu",
    show_default=True,
    help="Where to run it.",
)
@click.option("--installed", is_flag=True, help="Install the ISO on a fresh disk and boot that.")
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Boot this .iso, .raw or .qcow2 instead.",
)
@click.option("--memory", type=click.IntRange(256), help="Memory in MiB; the layout's by default.")
@click.option(
    "--firmware",
    type=click.Choice(["bios", "uefi"]),
    default="bios",
    show_default=True,
    help="Firmware of the machine.",
)
@click.option(
    "--credential",
    "credentials",
    multiple=True,
    callback=read_credentials,
    help="NAME=FILE, a systemd credential for the node.",
)
@click.option(
    "--timeout", type=click.FloatRange(1), default=900.0, show_default=True, help="Seconds until it must be healthy."
)
@click.option("--no-wait", is_flag=True, help="Return as soon as it is started.")
@click.option("--keep-on-error", is_flag=True, help="Leave a node that did not become healthy for inspection.")
@click.option("--json", "as_json", is_flag=True, help="Print the node as JSON.")
@pass_session
def up(session: Session, /, **given: Any) -> None:
    """Start a node in the background, wait until it is healthy, and say how to reach it."""
    wanted = Wanted(**given)
    if wanted.target_name == "docker" and (wanted.installed or wanted.image):
        raise click.UsageError("--installed and --image belong to --target qemu")
    request = make_request(session, wanted)
    request = replace(request, credentials={**trusted_key(session), **request.credentials})
    target = base.target_of(wanted.target_name)
    started = time.time()
    with session.console.stage(f"{'install and start' if wanted.installed else 'start'} {wanted.name}"):
        instance = base.bring_up(target, request, session.project)
    try:
        health: Any = {} if wanted.no_wait else await_health(session, target, instance, wanted.timeout, started)
    except BaseException:
        if not wanted.keep_on_error:
            base.bring_down(instance)
        raise
    show(session, target, instance, health, wanted.as_json)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options of `up` say."""

    name: str
    target_name: str
    installed: bool
    image: Path | None
    memory: int | None
    firmware: base.Firmware
    credentials: dict[str, bytes]
    timeout: float
    no_wait: bool
    keep_on_error: bool
    as_json: bool

    @property
    def kind(self) -> base.Kind:
        if self.target_name == "docker":
            return "layers"
        if self.image and self.image.suffix in (".raw", ".qcow2", ".img"):
            return "disk"
        return "install" if self.installed else "iso"


def make_request(session: Session, wanted: Wanted) -> base.Request:
    """What to start; builds the ISO or the container first where no image is named."""
    from appliance import pipeline

    options = pipeline.Options(project=session.project, layout=session.layout)
    image, memory = wanted.image, wanted.memory
    if image is None:
        if wanted.kind == "layers":
            built, image = pipeline.build_container(options, session.console)
        else:
            output = pipeline.build_iso(options, session.console)
            built, image = output.built, output.artifact.path
        memory = memory or built.model.nodes[0].memory
    return base.Request(
        name=wanted.name,
        image=image,
        kind=wanted.kind,
        memory=memory or base.DEFAULT_MEMORY,
        firmware=wanted.firmware,
        credentials=wanted.credentials,
        deadline=wanted.timeout,
    )


def trusted_key(session: Session) -> dict[str, bytes]:
    """The credential that makes a node take what this user pushes; none, with a warning, where the key is unusable."""
    from appliance import signing

    try:
        return {base.UPGRADE_KEY: signing.public_line(signing.ensure(session.console.note))}
    except ApplianceError as error:
        session.console.warn(f"{error.message}; the node will not know your key")
        return {}


def await_health(session: Session, target: base.Target, instance: base.Instance, timeout: float, started: float) -> Any:
    """Wait with progress and keep the time of the boot for the test report."""
    with (
        session.console.stage(f"wait until {instance.name} is healthy") as progress,
        record_step(instance.folder / STEPS_FILE, "boot", since=started),
    ):
        return base.wait_healthy(target, instance, timeout, lambda passed: progress.update(passed, timeout, "s"))


def show(session: Session, target: base.Target, instance: base.Instance, health: Any, as_json: bool) -> None:
    """Says how to reach the node. The one-time password is asked of the node itself and kept nowhere."""
    login: dict[str, str] = {}
    if health:
        done = target.execute(instance, ["cat", FIRST_LOGIN])
        login = json.loads(done.stdout) if done.returncode == 0 else {}
    if as_json:
        session.console.result_json(record(instance) | {"health": health, "login": login})
        return
    seconds = f" after {health['boot_seconds']:.0f} s" if health.get("boot_seconds") else ""
    session.console.result(f"{instance.name} is {'healthy' + seconds if health else 'started'}")
    ssh_port = f", ssh on port {instance.ports['22']}" if "22" in instance.ports else ""
    session.console.result(f"  address  {instance.address}{ssh_port}")
    session.console.result(f"  URL      {instance.url}  (its certificate is its own)")
    option = "" if instance.name == DEFAULT_NAME else f" --name {instance.name}"
    session.console.result(f"  log in   ./build.py ssh{option}")
    if login:
        session.console.result(f"  sign in  {login.get('user')} with the one-time password {login.get('password')}")
    session.console.result(f"  end it   ./build.py down{option}")


def record(instance: base.Instance) -> dict[str, Any]:
    """The node as plain values."""
    return {
        "name": instance.name, "target": instance.target, "address": instance.address, "url": instance.url,
        "ports": dict(instance.ports),
    }  # fmt: skip


@verb("status", "status --json")
@click.option("--json", "as_json", is_flag=True, help="Print the nodes as JSON.")
@pass_session
def status(session: Session, as_json: bool) -> int:
    """Show the nodes of this checkout, what they run and their health; exit status 1 when one is not healthy."""
    nodes = [look(instance) for instance in base.instances(session.project)]
    if as_json:
        session.console.result_json(nodes)
    elif not nodes:
        session.console.note("no node was started here; start one with: ./build.py up")
    else:
        from appliance.verbs.model import table

        rows: list[tuple[str, ...]] = [("node", "target", "release", "state", "health", "URL")]
        columns = ("name", "target", "release", "state", "summary", "url")
        rows += [tuple(node[column] or "-" for column in columns) for node in nodes]
        for line in table(rows):
            session.console.result(line.removeprefix("  "))
    return 1 if any(node["summary"] != "healthy" for node in nodes) else 0


def look(instance: base.Instance) -> dict[str, Any]:
    """One node with its state, and the release it runs and the health it reports now."""
    target = base.target_of(instance.target)
    state = target.state(instance)
    health: dict[str, Any] = {}
    summary, release = "-", ""
    if state == "running":
        summary = "starting"
        if target.reachable(instance):
            done = target.execute(instance, ["/opt/samepage/bin/samepage-health", "--json"])
            if done.stdout.strip():
                health = json.loads(done.stdout)
                bad = [name for name, entry in sorted(health.get("recipes", {}).items()) if not entry["healthy"]]
                summary = "healthy" if health.get("healthy") else f"not healthy: {', '.join(bad)}"
            release = running_version(target, instance)
    return record(instance) | {"release": release, "state": state, "summary": summary, "health": health}


def running_version(target: base.Target, instance: base.Instance) -> str:
    """The version of the release that the node runs; empty where it cannot tell."""
    try:
        return str(json.loads(base.read_release(target, instance))["version"])
    except (base.NodeError, ValueError, KeyError, TypeError):
        return ""


@verb("ssh", "ssh -- journalctl -b -u nginx", context_settings={"ignore_unknown_options": True})
@name_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@pass_session
def ssh(session: Session, name: str, command: tuple[str, ...]) -> int:
    """Open a shell on the node, or run COMMAND there and return its exit status."""
    import sys

    from appliance.run import attached

    target, instance = running(session, name)
    return attached(target.command(instance, command, terminal=sys.stdin.isatty()))


@verb("logs", "logs --unit nginx --follow", "logs --console")
@name_option
@click.option("--unit", "-u", help="Only this unit.")
@click.option("--follow", "-f", is_flag=True, help="Go on as it grows, until Ctrl-C.")
@click.option(
    "--console", "console_log", is_flag=True, help="What the node wrote to its console, also when it does not answer."
)
@pass_session
def logs(session: Session, name: str, unit: str | None, follow: bool, console_log: bool) -> int:
    """Print the node's journal of this boot."""
    from appliance.run import attached

    instance = base.find(session.project, name)
    target = base.target_of(instance.target)
    if console_log or not target.reachable(instance):
        session.console.note(f"the console of {name}:")
        session.console.result(target.console(instance))
        return 0
    words = ["journalctl", "-b", "--no-pager", *(["-u", unit] if unit else []), *(["-f"] if follow else [])]
    return attached(target.command(instance, words))


@verb("down", "down --name second", "down --all")
@name_option
@click.option("--all", "everything", is_flag=True, help="All nodes of this checkout.")
@pass_session
def down(session: Session, name: str, everything: bool) -> None:
    """End a node and remove everything of it."""
    chosen = base.instances(session.project) if everything else [base.find(session.project, name)]
    for instance in chosen:
        base.bring_down(instance)
        session.console.note(f"{instance.name} is gone")
    if not chosen:
        session.console.note("no node was started here")


def running(session: Session, name: str) -> tuple[base.Target, base.Instance]:
    """The node of that name, which must run."""
    instance = base.find(session.project, name)
    target = base.target_of(instance.target)
    if target.state(instance) != "running":
        raise base.NodeError(
            f"the node {name!r} does not run any more", hint=f"remove it with: ./build.py down --name {name}"
        )
    return target, instance


@verb("verify", "verify nginx postgresql", "verify --host ssh://root@10.0.0.5 -k certificate")
@name_option
@click.option("--host", help="Verify this host instead, in testinfra's notation, e.g. ssh://root@10.0.0.5.")
@click.option("-k", "keyword", default="", help="Only checks whose name matches, in pytest's notation.")
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the reports; dist/verify by default.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=180.0,
    show_default=True,
    help="Seconds until the node must be healthy.",
)
@click.option(
    "--check-timeout", type=click.FloatRange(1), default=60.0, show_default=True, help="Seconds each check may take."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.argument("recipes", nargs=-1)
@pass_session
def verify(session: Session, /, name: str, host: str | None, as_json: bool, **given: Any) -> int:
    """Run the recipes' checks on a node and write the reports; exit status 1 when one is red."""
    from appliance.verify import VerifyRequest
    from appliance.verify import verify as run_checks

    options: tuple[str, ...] = ()
    steps = None
    if host is None:
        target, instance = running(session, name)
        host, options = target.connection(instance)
        steps = instance.folder / STEPS_FILE
    request = VerifyRequest(
        project=session.project,
        host=host,
        options=options,
        steps=steps,
        output=given["output_dir"] or session.project / "dist" / "verify",
        recipes=given["recipes"],
        keyword=given["keyword"],
        health_deadline=given["timeout"],
        check_deadline=given["check_timeout"],
        quiet=as_json,
    )
    done = run_checks(request, session.console)
    if as_json:
        session.console.result_json(done.summary())
    else:
        session.console.note(f"report: {done.page}")
    return 0 if done.ok else 1
