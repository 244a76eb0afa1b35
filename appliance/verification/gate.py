"""The gate before the checks: the node must be reached and become healthy within a deadline."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

SLICE = 20.0  # seconds the node waits in one command, so that a lost connection is noticed
HEALTH_COMMAND = "/opt/samepage/bin/samepage-health"
NODE_FILE = "/etc/samepage/node.json"
RELEASE_FILE = "/run/samepage/release.json"
CONTAINER_FILE = "/run/systemd/container"


class CommandResult(Protocol):
    rc: int
    stdout: str
    stderr: str


class Host(Protocol):
    """The part of testinfra's host that the gate uses."""

    def run(self, command: str, *args: str) -> CommandResult: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate found. `health` is empty when the node was not reached."""

    start: float
    finish: float
    ok: bool
    detail: str
    health: Mapping[str, Any] = field(default_factory=dict)
    node: Mapping[str, Any] = field(default_factory=dict)
    release: str = ""
    container: bool = False  # the node has its host's kernel, disks and clock

    @property
    def reached(self) -> bool:
        return bool(self.health)


def pass_gate(host: Host, deadline: float, *, command: str = HEALTH_COMMAND, node_file: str = NODE_FILE,
              pause: float = 1.0) -> Gate:
    """Wait at most `deadline` seconds for the node to be reached and healthy; less when one of its units has failed."""
    start, clock = time.time(), time.monotonic()
    problem = "no answer"
    health: dict[str, Any] = {}
    while True:
        left = deadline - (time.monotonic() - clock)
        try:
            # `timeout` guards against a health command that itself hangs
            wait = max(0.0, min(SLICE, left))
            done = host.run(f"timeout {math.ceil(wait) + 60} {command} --json --wait {wait:.1f}")
            problem = done.stderr.strip() or f"{command} ended with status {done.rc}"
            health = json.loads(done.stdout)
        except (RuntimeError, OSError, AssertionError) as error:
            problem = _reason(error)
        except ValueError:
            pass  # not yet mounted, or not there: told below
        if health.get("healthy") or (health and health.get("hopeless")) or deadline <= time.monotonic() - clock:
            break
        if not health:
            time.sleep(max(0.0, min(pause, left)))
    seconds = time.monotonic() - clock
    if not health:
        return Gate(start, time.time(), False, f"the node could not be asked within {seconds:.0f} s: {problem}")
    ok = bool(health["healthy"])
    detail = "" if ok else describe(health, seconds)
    node, release = _read(host, node_file), _read(host, RELEASE_FILE)
    container = host.run("test -e %s", CONTAINER_FILE).rc == 0
    return Gate(start, time.time(), ok, detail, health, node, str(release.get("version", "")), container)


def _read(host: Host, file: str) -> dict[str, Any]:
    done = host.run("cat %s", file)
    try:
        value = json.loads(done.stdout)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _reason(error: Exception) -> str:
    result = error.args[0] if error.args else error
    stderr = getattr(result, "stderr", "")
    return str(stderr).strip() or str(error)


def failed_probes(entry: Mapping[str, Any]) -> str:
    """`name: detail` of the probes of one recipe that failed."""
    return "; ".join(f"{probe['name']}: {probe['detail']}" for probe in entry.get("probes", []) if not probe["ok"])


def describe(health: Mapping[str, Any], seconds: float) -> str:
    """Why a node is not healthy: each failed probe, then the journal of each unit to blame."""
    lines = [f"the node was not healthy after {seconds:.0f} s"]
    lines += [f"node: {probe['name']}: {probe['detail']}" for probe in health.get("system", []) if not probe["ok"]]
    lines += [f"{name}: {failed_probes(entry)}" for name, entry in health["recipes"].items() if not entry["healthy"]]
    for unit, entries in health.get("journal", {}).items():
        lines += [f"journal of {unit}:", *(f"  | {line}" for line in entries or ["(empty)"])]
    return "\n".join(lines)
