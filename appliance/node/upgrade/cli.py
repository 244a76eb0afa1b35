"""The command line of samepage-upgrade-node. Part of the node's own code.

What changes the node is done by samepage-upgrade.service (worker.py); this program hands it the request and shows what
it reports, so that a lost connection ends only the showing. What only looks is done here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from appliance.node.refusals import Refusal
from appliance.node.upgrade import bell
from appliance.node.upgrade.request import (
    APPLY,
    ASKING,
    CANCELLED,
    EVENTS,
    FAILED,
    NOTHING,
    REQUEST,
    STATES,
    UNIT,
    USAGE,
    WORKING,
    Request,
    alone,
    dump_request,
)  # fmt: skip

VERBS = {
    "check": "look whether the channel has a newer release; 0: it has, 2: it has not",
    "info": "say what runs here, or what a bundle is",
    "plan": "say what an upgrade would do, and do nothing",
    "install": "upgrade to a bundle's release, or to the channel's newest; the verb may be left out",
    "commit": "go on with an upgrade that --stop-before stopped",
    "rollback": "go back to the release before this one, or call off an upgrade that was stopped",
    "status": "what runs, what is unfinished, and why the last upgrade failed",
    "history": "the upgrades of this node, the newest last",
    "verify": "compare every file of the running release with its digest",
    "cleanup": "remove releases and data that are not kept, and say why",
}
EPILOG = """exit status: 0 committed, 1 failed and the old release kept, 2 nothing to do, 3 refused, 4 staged and a
restart needed (or under way), 5 tried and rolled back, 6 another upgrade runs, 64 wrong usage

examples: samepage-upgrade-node                         the channel's newest release
          samepage-upgrade-node plan https://example.org/samepage-1.0-to-1.1.bundle
          samepage-upgrade-node rollback --data=keep"""
_POLL = 0.04  # seconds


class UsageError(Exception):
    """The command line is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    made = _Parser(
        prog="samepage-upgrade-node", usage="samepage-upgrade-node [VERB] [BUNDLE|URL] [options]",
        description=f"Upgrades this node, or leaves it as it was.\n\n{listing}", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("words", nargs="*", metavar="BUNDLE|URL", help="instead of the channel")
    made.add_argument("--download-only", action="store_true", help="bring the release here and leave it at that")
    made.add_argument("--dry-run", action="store_true", help="only say what would happen")
    made.add_argument("--apply", choices=APPLY, default="auto", help="how deep to go; where that will not do: staged")
    made.add_argument("--allow-downgrade", action="store_true", help="take an older release, too")
    made.add_argument("--data", choices=("restore", "keep"), default="restore", help="rollback: then's, or today's")
    made.add_argument("--to", default="", metavar="RELEASE", help="rollback: to this release instead of the one before")
    made.add_argument("--stop-before", choices=STATES, default="", metavar="STATE", help=f"one of {', '.join(STATES)}")
    made.add_argument("--retry", action="store_true", help="try a release of the channel again that did not stay")
    made.add_argument("--unattended", action="store_true", help="for the timer: only where the settings allow it")
    made.add_argument("--progress-fd", type=int, default=-1, metavar="N", help="write progress as lines of JSON there")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("--yes", action="store_true", help="do not ask")
    return made


def parse(words: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The verb, and the options with `source`. Raises UsageError, and SystemExit once help is printed."""
    options = parser().parse_intermixed_args(list(words))
    verb = options.words.pop(0) if options.words and options.words[0] in VERBS else "install"
    if len(options.words) > 1:
        raise UsageError(f"{options.words[1]!r} is one word too many")
    options.source = options.words[0] if options.words else ""
    return verb, options


def main(words: Sequence[str] | None = None) -> int:
    """The program; `words` default to the process's arguments. Returns the exit status."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        verb, options = parse(given)
        if os.geteuid() != 0:
            raise UsageError("only root can do this")
        check(verb, options)
    except UsageError as error:
        print(f"samepage-upgrade-node: {error}; see --help", file=sys.stderr)
        return USAGE
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _dispatch(verb, options)
    except Refusal as refusal:
        return show(refusal.result(), options)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        return show({"status": FAILED, "outcome": "failed", "message": str(error)}, options)


def check(verb: str, options: argparse.Namespace) -> None:
    """Raise UsageError for what does not go together."""
    if options.source and verb not in ("install", "plan", "info"):
        raise UsageError(f"{verb} takes no bundle")
    if options.source and "://" not in options.source and not os.path.isfile(options.source):
        what = "file" if "/" in options.source else "verb or file"
        raise UsageError(f"there is no {what} {options.source}")
    if options.to and verb != "rollback":
        raise UsageError("--to belongs to rollback")
    if options.progress_fd >= 0:
        try:
            os.fstat(options.progress_fd)
        except OSError as error:
            raise UsageError(f"--progress-fd {options.progress_fd}: {error.strerror}") from error


def _dispatch(verb: str, options: argparse.Namespace) -> int:
    if verb in ("install", "commit", "rollback") and not options.dry_run:
        return _change(verb, options)
    from appliance.node.upgrade import looking

    return show(looking.answer(verb, options), options)


# --- what changes the node -------------------------------------------------------------------------------------------


def _change(verb: str, options: argparse.Namespace) -> int:
    if options.unattended:
        from appliance.node.upgrade.node import read_settings

        if not read_settings().unattended:
            return show({"status": NOTHING, "outcome": "nothing", "message": "unattended upgrades are off"}, options)
    source = os.path.abspath(options.source) if options.source and "://" not in options.source else options.source
    request = Request(
        verb=verb, source=source, to=options.to, data=options.data, apply=options.apply,
        stop_before=options.stop_before, download_only=options.download_only,
        allow_downgrade=options.allow_downgrade, retry=options.retry,
    )  # fmt: skip
    asks = not options.yes and not options.json and sys.stdin.isatty() and verb != "commit"
    with alone(ASKING):
        if not asks or options.stop_before or options.download_only:
            return show(_relay(request, options), options)
        return _ask(request, options)


def _ask(request: Request, options: argparse.Namespace) -> int:
    """Stage and plan, show it, and go on when somebody agrees."""
    found = _relay(request._replace(stop_before="hold"), options)
    if found.get("outcome") != "stopped":
        return show(found, options)
    print(describe(found))
    try:
        agreed = input("Go on? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        agreed = False
    if not agreed:
        _relay(Request(verb="rollback"), options)
        return show({"status": FAILED, "outcome": "failed", "message": "called off; nothing changed"}, options)
    return show(_relay(Request(verb="commit"), options), options)


def _relay(request: Request, options: argparse.Namespace) -> dict[str, Any]:
    """Have the request carried out; what comes at the end. Ctrl-C calls it off as long as nothing has happened."""
    from appliance.node.upgrade.services import ServiceError, systemctl

    with alone(WORKING):  # Busy where an upgrade runs
        pass
    with open(EVENTS, "wb"):
        pass
    with open(REQUEST + ".new", "wb") as file:
        file.write(dump_request(request))
    os.replace(REQUEST + ".new", REQUEST)
    screen = _Screen(options)
    try:
        bell.ring()
    except OSError as error:
        _take_back()
        return {
            "status": FAILED, "outcome": "failed", "reason": "unit", "message": f"{UNIT} is not listening: {error}",
            "hint": "systemctl restart samepage-upgrade.socket",
        }  # fmt: skip
    with open(EVENTS, "rb") as events:
        idle, rest, over = 0, b"", False
        while True:
            try:
                line = events.readline()
                if not line.endswith(b"\n"):
                    rest += line
                    idle = 0 if line else idle + 1
                    if over and not line:
                        break
                    over = idle % 50 == 49 and not _unit_runs()  # and then once more, for its last words
                    time.sleep(_POLL)
                    continue
                idle, line, rest = 0, rest + line, b""
                try:
                    event = json.loads(line)
                except ValueError:  # Ctrl-C came in the midst of reading it
                    continue
                screen.show(event, line)
                if event.get("state") == "end":
                    return {name: value for name, value in event.items() if name != "state"}
            except KeyboardInterrupt:
                if _take_back():
                    return dict(CANCELLED)
                with contextlib.suppress(ServiceError):  # it has ended
                    systemctl("kill", "--signal=INT", UNIT)
    return {
        "status": FAILED, "outcome": "failed", "reason": "died", "message": "the upgrade's process was ended",
        "hint": "samepage-upgrade-node status says what it left; journalctl -u samepage-upgrade says more",
    }  # fmt: skip


def _take_back() -> bool:
    """Whether the request was still where it was handed over, and is no more."""
    try:
        os.unlink(REQUEST)
    except FileNotFoundError:
        return False
    return True


def _unit_runs() -> bool:
    """Raises OSError where there is no answer."""
    from appliance.node.upgrade.services import ServiceError, processes, systemctl

    if processes(UNIT):  # the service manager, which may be busy with the upgrade, need not be asked
        return True
    try:
        state = systemctl("show", "-p", "ActiveState", "--value", UNIT).strip()
    except ServiceError as error:
        raise OSError(str(error)) from error
    return state in ("active", "activating", "deactivating")


class _Screen:
    """Shows progress on standard error, and passes it on where that is wanted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.live = sys.stderr.isatty() and not options.json
        self.state = ""

    def show(self, event: Mapping[str, Any], line: bytes) -> None:
        if self.options.progress_fd >= 0:
            try:
                os.write(self.options.progress_fd, line)
            except OSError:  # nobody reads any more; the upgrade goes on all the same
                self.options.progress_fd = -1
        state = str(event.get("state"))
        if self.options.json or state in ("end", "planned"):
            return
        done, total = event.get("done", 0), event.get("total", 0)
        share = f" {done * 100 // total:3} %" if total else ""
        if self.live:
            print(f"\r\x1b[K{state}{share}", end="", file=sys.stderr, flush=True)
        elif state != self.state:
            print(state, file=sys.stderr, flush=True)
        self.state = state


# --- showing ---------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Print how it ended; the exit status."""
    if sys.stderr.isatty() and not options.json:
        print("\r\x1b[K", end="", file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    elif "text" in result:
        print(result["text"])
    else:
        good = result["status"] in (0, NOTHING) or result.get("outcome") in ("restarting", "staged")
        print(describe(result), file=sys.stdout if good else sys.stderr)
    return int(result["status"])


def describe(result: Mapping[str, Any]) -> str:
    """The result in words."""
    lines = []
    if result.get("class") and result.get("from") != result.get("to"):
        lines.append(f"release {result['from']} -> {result['to']}: {result['class']}")
        lines += [f"  {what:<8} {unit}" for unit, what in sorted(result.get("units", {}).items())]
        moves = result.get("packages", {}).items()
        lines += [f"  package  {name} {' -> '.join(filter(None, versions))}" for name, versions in moves]
        levels = result.get("schema") or result.get("migrations") or []
        if len(levels) == 2 and levels[0] != levels[1]:
            lines.append(f"  schema   level {levels[0]} -> {levels[1]}")
    seconds = f" in {result['seconds']} s" if result.get("outcome") == "committed" and "seconds" in result else ""
    lines.append(f"{result['outcome']}{seconds}" + (f": {result['message']}" if result.get("message") else ""))
    if result.get("hint"):
        lines.append(f"  hint: {result['hint']}")
    return "\n".join(lines)
