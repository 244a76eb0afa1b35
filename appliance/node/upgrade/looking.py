"""The verbs that only look: check, info, plan, status, history, verify; and cleanup. Part of the node's own code."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from appliance.node.upgrade import cleaning, journal, obtain, records, staging
from appliance.node.upgrade.node import Node, look
from appliance.node.upgrade.obtain import trust
from appliance.node.upgrade.request import FAILED, NOTHING, WORKING, alone
from appliance.node.upgrade.services import ServiceError
from appliance.node.upgrade.web import FetchError
from appliance.node.upgrade.worker import previous
from appliance.node.versions import order

Answer = dict[str, Any]


def answer(verb: str, options: argparse.Namespace) -> Answer:
    """What a verb has to say: `status` is the exit status, `text` what people read. Raises a Refusal or OSError."""
    verb = {"install": "plan", "commit": "status"}.get(verb, verb)  # with --dry-run
    try:
        return VERBS[verb](look(), options)
    except FetchError as error:
        return error.result()
    except ServiceError as error:
        return {"status": FAILED, "outcome": "failed", "reason": "failed", "message": str(error)}
    except journal.JournalError as error:
        return {"status": FAILED, "outcome": "failed", "reason": "journal", "message": str(error)}


def _silent(_state: str, _done: int, _total: int) -> None:
    pass


def _told(options: argparse.Namespace) -> obtain.Report:
    """Shows how far something is, where people look."""

    def told(state: str, done: int, total: int) -> None:
        if total:
            print(f"\r\x1b[K{state} {done * 100 // total:3} %", end="", file=sys.stderr, flush=True)

    return told if sys.stderr.isatty() and not options.json else _silent


def _fetching(source: str) -> AbstractContextManager[None]:
    """Only one fetches at a time: nobody, for a file that is here. Raises Busy."""
    return nullcontext() if source and "://" not in source else alone(WORKING)


def check(node: Node, _options: argparse.Namespace) -> Answer:
    index = obtain.newest(node, trust())
    facts = {"running": node.running.id, "newest": index.newest.version, "channel": node.settings.channel}
    if index.newest.manifest == node.running.digest:
        return {"status": NOTHING, "text": f"release {node.running.id} is the newest of the channel", **facts}
    if order(index.newest.version) < order(node.running.manifest.version):
        text = f"release {node.running.id} is newer than the channel's newest, {index.newest.version}"
        return {"status": NOTHING, "text": text, **facts}
    failed = journal.failed_before(node.root, index.newest.manifest)
    text = f"release {index.newest.version} is there; release {node.running.id} runs"
    if failed:
        text += f"\nit was tried before: {failed.get('outcome')}, {failed.get('reason', '')}"
    return {"status": 0, "text": text, "failed_before": failed, **facts}


def info(node: Node, options: argparse.Namespace) -> Answer:
    if not options.source:
        return status(node, options)
    from appliance.node.bundle import read_info

    with _fetching(options.source):
        path = obtain.local(node, options.source, _told(options))
    found = read_info(path, trust())
    start = f"release {found.from_version}" if found.from_version else "any release"
    lines = [
        f"{start} -> release {found.version} ({found.layout}, {found.architecture})",
        f"class: {found.summary.get('class', 'unknown')}",
        *(f"  {part.kind:<9} {part.packed:>12,} of {part.size:>13,} bytes" for part in found.parts_for(node.name)),
    ]
    return {"status": 0, "text": "\n".join(lines), **found.facts()}


def plan(node: Node, options: argparse.Namespace) -> Answer:
    """What is fetched for it stays for the upgrade itself; a bundle's file is only read."""
    with _fetching(options.source):
        wanted = obtain.chain(node, options.source, trust(), _told(options), allow_downgrade=options.allow_downgrade)
        if wanted.goal == node.running.digest:
            message = f"release {node.running.id} is the newest" if not options.source else f"{node.running.id} runs"
            return {"status": NOTHING, "outcome": "nothing", "message": message}
        return obtain.describe(node, wanted, _told(options), allow_downgrade=options.allow_downgrade)


def status(node: Node, _options: argparse.Namespace) -> Answer:
    begun = journal.read(node.root)
    past = journal.read_history(node.root)
    choice = records.choose(node.root)
    last = past[-1] if past else None
    before = previous(node)
    facts = {
        "release": node.running.id, "version": node.running.manifest.version, "digest": node.running.digest,
        "layout": node.running.manifest.layout, "data": node.data, "previous": before,
        "layers": node.layers(node.running),
        "kernel": node.running.manifest.kernel.id, "unfinished": begun.facts() if begun else None, "last": last,
        "releases": {one.id: {"digest": one.digest, "data": one.data} for one in node.held.values()},
        "next_boot": {"release": choice.release, "data": choice.data} if choice else None,
    }  # fmt: skip
    lines = [f"release   {node.running.id} ({node.running.manifest.layout}), data {node.data}"]
    lines.append(f"previous  {before or 'none'}")
    if choice and (choice.release, choice.data) != (node.running.id, node.data):
        lines.append(f"power-on  release {choice.release}, data {choice.data}")
    if begun:
        state = f"stopped before {begun.stop_before}" if begun.stopped else f"in state {begun.state}"
        lines.append(f"upgrade   to {begun.new}, {state}" + (f": {begun.message}" if begun.message else ""))
    if last:
        lines.append(f"last      {_entry(last)}")
        if last.get("outcome") != "committed" and last.get("reason"):
            lines += [f"          {line}" for line in str(last["reason"]).splitlines()]
    return {"status": 0, "text": "\n".join(lines), **facts}


def history(node: Node, _options: argparse.Namespace) -> Answer:
    past = journal.read_history(node.root)
    return {"status": 0, "text": "\n".join(map(_entry, past)) or "no upgrade yet", "history": past}


def _entry(entry: Mapping[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.get("time", 0)))
    way = f"{entry.get('from', '?')} -> {entry.get('to', '?')}"
    where = f" at {entry['state']}" if entry.get("state") else ""
    kind = f" ({entry['class']}, {entry.get('seconds', 0)} s)" if entry.get("class") else ""
    return f"{when}  {entry.get('action', 'upgrade')} {way}: {entry.get('outcome')}{where}{kind}"


def verify(node: Node, options: argparse.Namespace) -> Answer:
    told = _told(options)
    wrong = staging.verify(
        node.root, node.running.manifest, node.name, lambda done, total: told("verify", done, total)
    )  # fmt: skip
    text = "\n".join(wrong) or f"every file of release {node.running.id} is as it was made"
    return {"status": FAILED if wrong else 0, "text": text, "release": node.running.id, "wrong": wrong}


def cleanup(node: Node, options: argparse.Namespace) -> Answer:
    with alone(WORKING):
        begun = journal.read(node.root) is not None
        done = cleaning.decide(node) if options.dry_run or begun else cleaning.clean(node, _silent)
    what = {"remove": [name for name, _ in done.remove], "files": len(done.files), "data": [n for n, _ in done.data]}
    lines = [*done.lines(), *(["nothing is removed while an upgrade is unfinished"] if begun else [])]
    return {"status": 0, "text": "\n".join(lines), "frees": done.frees, "dry_run": options.dry_run or begun, **what}


def rollback(node: Node, options: argparse.Namespace) -> Answer:
    """With --dry-run: where it would lead."""
    name = options.to or previous(node)
    if not name:
        return {"status": NOTHING, "outcome": "nothing", "message": "there is no release before this one"}
    left = node.held[name].data if name in node.held else None
    which = f"data {left}" if left is not None and options.data == "restore" else "the data of today"
    return {"status": 0, "text": f"back to release {name} with {which}", "to": name, "data": left}


VERBS: Mapping[str, Callable[[Node, argparse.Namespace], Answer]] = {
    "check": check, "info": info, "plan": plan, "status": status, "history": history, "verify": verify,
    "cleanup": cleanup, "rollback": rollback,
}  # fmt: skip
