"""The command line: the verbs of `./build.py`, and the only place where errors become messages and exit statuses."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click

import appliance
from appliance.console import Console
from appliance.errors import ApplianceError

PROGRAM = "build.py"
COMPLETION_VARIABLE = "_BUILD_PY_COMPLETE"
CANCELLED, TERMINATED = 130, 143


@dataclass(frozen=True, slots=True)
class Session:
    """What the global options say."""

    project: Path
    layout: str
    debug: bool
    console: Console

    @property
    def state(self) -> Path:
        """Folder of this checkout's own state: its nodes and what it built last."""
        return self.project / ".samepage"


@dataclass
class Settled:
    """What the error boundary needs of the global options, also when they could not all be read."""

    debug: bool = False
    console: Console | None = None


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like Ctrl-C, so that nothing is left behind."""


pass_session = click.make_pass_decorator(Session)


class Verbs(click.Group):
    """The group whose verbs' modules are imported only when they are used."""

    home: dict[str, str] = {  # noqa: RUF012 - never changed
        "check": "model", "render": "model", "lock": "build", "iso": "build", "disk": "build", "sbom": "build",
        "bundle": "upgrades", "channel": "upgrades", "key": "upgrades",
        "up": "nodes", "status": "nodes", "push": "push", "ssh": "nodes", "logs": "nodes", "verify": "nodes",
        "down": "nodes",
        "doctor": "host", "clean": "host", "completion": "host", "test": "host", "bench": "host",
    }  # fmt: skip

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.home)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.home:
            return None
        import importlib

        module = importlib.import_module(f"appliance.verbs.{self.home[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.home:
            from appliance.errors import nearest

            ctx.fail(f"no verb is called {name!r}\n  hint: {nearest(name, self.home)}")
        return super().resolve_command(ctx, args)


def verb(*examples: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a function a verb whose help ends with examples."""
    lines = "\n".join(f"  ./build.py {example}" for example in examples)
    return click.command(epilog=f"\b\nExample{'s' if len(examples) > 1 else ''}:\n{lines}", **settings)


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  ./build.py iso && ./build.py up && ./build.py verify\n  ./build.py up --help",
)
@click.option(
    "-C", "--project", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Work in this folder."
)
@click.option("--layout", default="private-cloud", show_default=True, help="Layout in recipes/layouts/.")
@click.option(
    "--progress", type=click.Choice(["auto", "plain", "rich", "none"]), default="auto", show_default=True,
    help="How to show progress on stderr.",
)  # fmt: skip
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(appliance.__version__, prog_name="samepage-appliance")
@click.pass_context
def cli(
    ctx: click.Context,
    project: Path | None,
    layout: str,
    progress: Literal["auto", "plain", "rich", "none"],
    debug: bool,
) -> None:
    """Build the Samepage appliance from its recipes, run it and prove it."""
    console = Console(style=progress)
    settled = ctx.find_object(Settled) or Settled()
    settled.debug, settled.console = debug, console
    root = (project or Path(appliance.__file__).parent.parent).resolve()
    ctx.obj = Session(root, layout, debug, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. Never raises."""
    settled = Settled(debug="--debug" in (sys.argv[1:] if arguments is None else arguments))
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        # click's own boundary is off: what goes wrong is told here, in one style
        status = cli.main(
            list(arguments) if arguments is not None else None, prog_name=PROGRAM, standalone_mode=False, obj=settled,
            complete_var=COMPLETION_VARIABLE,
        )  # fmt: skip
        return status if isinstance(status, int) else 0
    except BaseException as error:
        return report(error, settled)
    finally:
        signal.signal(signal.SIGTERM, previous)


def report(error: BaseException, settled: Settled) -> int:
    """Tells the user what went wrong; returns the exit status."""
    console = settled.console or Console(style="plain")
    if settled.debug and not isinstance(error, (SystemExit, click.exceptions.Exit)):
        traceback.print_exception(error)
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case click.exceptions.Exit():
            return error.exit_code
        case KeyboardInterrupt() | click.Abort():
            console.error("cancelled")
            return CANCELLED
        case Terminated():
            console.error("terminated")
            return TERMINATED
        case ApplianceError():
            console.error(str(error))
            return error.status
        case click.ClickException():
            where = (
                f"\n  hint: see {error.ctx.command_path} --help"
                if isinstance(error, click.UsageError) and error.ctx
                else ""
            )
            console.error(error.format_message() + ("" if "hint:" in error.format_message() else where))
            return 2
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
            return 1
        case OSError(errno=errno.ENOSPC):
            where = f" at {error.filename}" if error.filename else ""
            console.error(
                f"the disk is full{where}\n  hint: make room, or set SAMEPAGE_CACHE to a folder on another disk"
            )
            return 3
        case OSError():
            where = f": {error.filename}" if error.filename else ""
            console.error(f"{error.strerror or error}{where}\n  hint: run it again with --debug")
            return 1
        case _:
            console.error(
                f"{type(error).__name__}: {error}\n  hint: this is a fault of the builder; run it again with --debug"
            )
            return 1


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
