"""What the command line hands to samepage-upgrade.service, and how runs end. Part of the node's own code.

Nothing here imports much: on an emulated CPU the command line's own start is a noticeable part of a small upgrade.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from appliance.node.refusals import FAILED as FAILED
from appliance.node.refusals import LOCKED as LOCKED
from appliance.node.refusals import REFUSED as REFUSED
from appliance.node.refusals import Busy

FOLDER = "/run/samepage/upgrade"
REQUEST, EVENTS = f"{FOLDER}/request.json", f"{FOLDER}/events.jsonl"
ASKING, WORKING = f"{FOLDER}/front.lock", f"{FOLDER}/lock"  # held by the command line, and by who carries it out
UNIT = "samepage-upgrade.service"
STATES = ("stage", "plan", "hold", "snapshot", "switch", "migrate", "health", "commit", "open")
APPLY = ("auto", "live", "soft-reboot", "reboot")
COMMITTED, NOTHING, RESTART, ROLLED_BACK, USAGE = 0, 2, 4, 5, 64
STATUSES = {
    "committed": COMMITTED, "stopped": COMMITTED, "planned": COMMITTED, "downloaded": COMMITTED, "failed": FAILED,
    "nothing": NOTHING, "refused": REFUSED, "staged": RESTART, "restarting": RESTART, "rolled-back": ROLLED_BACK,
}  # fmt: skip
CANCELLED = {"status": FAILED, "outcome": "failed", "reason": "cancelled", "message": "cancelled: nothing changed"}


class Request(NamedTuple):
    """What the command line asked for. `source`: a path, an address, or empty for the channel."""

    verb: str = "install"  # install, commit, rollback
    source: str = ""
    to: str = ""  # rollback: a release's id; empty for the previous one
    data: str = "restore"  # rollback: restore or keep
    apply: str = "auto"
    stop_before: str = ""
    download_only: bool = False
    allow_downgrade: bool = False
    retry: bool = False


def dump_request(request: Request) -> bytes:
    return json.dumps(request._asdict()).encode()


def parse_request(content: bytes) -> Request:
    """Raises ValueError for what is none."""
    value: Any = json.loads(content)
    if not isinstance(value, dict) or not value.keys() <= set(Request._fields):
        raise ValueError("the request is not one")
    return Request(**value)


@contextmanager
def alone(lock: str, patience: float = 0.0) -> Iterator[None]:
    """Holds a lock file below FOLDER. Raises Busy where another process still does after `patience` seconds."""
    os.makedirs(os.path.dirname(lock), mode=0o700, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise Busy("another upgrade is running") from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
