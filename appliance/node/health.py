"""`samepage-health`: runs every probe of the node and says whether it is healthy.

The boot, the upgrade's gate, the verification and anything else that waits for a node use this one program. Imports
are kept few and late: on an emulated CPU each costs a noticeable part of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from appliance.node.probes import Outcome, Probe, ProbeError, output_of, run_probes, unit_states

HEALTH_FOLDER = "/etc/samepage/health.d"
HEALTH_FILE = "/run/samepage/health.json"
NODE_FILE = "/etc/samepage/node.json"
SELF_UNIT = "samepage-health.service"
JOURNAL_LINES = 30
DEAR_AFTER = 5.0  # seconds before units are asked for while connections are still refused; then ever less often
USAGE = """usage: samepage-health [--json] [--wait SECONDS] [--boot] [RECIPE...]

Runs the node's health probes, or those of the recipes named.

  --json          print the result as JSON
  --wait SECONDS  try again until everything is healthy, a unit has failed or the time is over
  --boot          also record the result and the length of the boot in /run/samepage/health.json

exit status: 0 healthy, 1 not healthy, 64 wrong usage
example: samepage-health --wait 60 nginx postgresql
"""


class UsageError(Exception):
    """The command line or a file in the health folder is wrong."""


# --- the files of health.d -------------------------------------------------------------------------------------------


def load_recipes(folder: str = HEALTH_FOLDER) -> dict[str, list[Probe]]:
    """The probes of each recipe on this node, sorted by recipe. Raises UsageError when a file cannot be understood."""
    recipes: dict[str, list[Probe]] = {}
    for file in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        try:
            with open(os.path.join(folder, file), encoding="utf-8") as stream:
                content = json.load(stream)
            name = content["recipe"]
            recipes[name] = [
                Probe(name, entry["name"], entry["kind"], entry["target"], entry.get("expect") or "",
                      entry.get("timeout") or 5.0)
                for entry in content["probes"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, ProbeError) as error:
            raise UsageError(f"{folder}/{file} is not a list of probes: {type(error).__name__}: {error}") from error
    return recipes


def in_container() -> bool:
    return os.path.exists("/run/systemd/container")


def failed_units(states: Mapping[str, tuple[str, str]]) -> list[str]:
    return sorted(unit for unit, (active, _) in states.items() if active == "failed" and unit != SELF_UNIT)


def ordering_cycle() -> Outcome:
    """Whether systemd had to drop a job in this boot."""
    started = time.monotonic()
    try:
        warnings = output_of(["journalctl", "-b", "-q", "-p", "warning", "-o", "cat", "--no-pager", "_PID=1"])
        cycles = [line for line in warnings.splitlines() if "ordering cycle" in line]
        ok, detail = not cycles, cycles[0] if cycles else "none"
    except OSError as error:
        ok, detail = False, str(error)
    return Outcome("no ordering cycle", ok, detail, (time.monotonic() - started) * 1000)


def kernel_taint(file: str = "/proc/sys/kernel/tainted") -> Outcome:
    """The flags of the kernel that say it warned, died a little or runs foreign code."""
    with open(file, encoding="ascii") as stream:
        taint = int(stream.read())
    return Outcome("no kernel taint", taint == 0, f"taint {taint}" if taint else "none")


def probe_system(states: Mapping[str, tuple[str, str]], problem: str, cycle: Outcome) -> list[Outcome]:
    """What every node must be, whatever runs on it. `problem` says why the states of the units could not be had."""
    failed = failed_units(states)
    detail = problem or ", ".join(failed) or "none"
    units = Outcome("no failed unit", not failed and not problem, detail, 0.0, bool(failed))
    taint = [] if in_container() else [kernel_taint()]  # a container shows the taint of its host
    return [units, cycle, *taint]


class Health:
    """The outcomes of one round: per recipe, and for the node as a whole unless only some recipes were asked for."""

    def __init__(self, recipes: Mapping[str, Sequence[Outcome]], system: Sequence[Outcome], bad: Sequence[str]) -> None:
        self.recipes, self.system = recipes, system
        self.bad_units = bad  # failed units, then probed units that are not active

    def outcomes(self) -> list[Outcome]:
        return [*self.system, *(outcome for found in self.recipes.values() for outcome in found)]

    @property
    def healthy(self) -> bool:
        return all(outcome.ok for outcome in self.outcomes())

    @property
    def hopeless(self) -> bool:
        """A unit has failed: waiting does not mend that."""
        return any(outcome.fatal for outcome in self.outcomes())

    def as_json(self, boot_seconds: float | None = None) -> dict[str, object]:
        return {
            "healthy": self.healthy,
            "hopeless": self.hopeless,
            "boot_seconds": boot_seconds,
            "recipes": {
                name: {"healthy": all(outcome.ok for outcome in found), "probes": [o.as_json() for o in found]}
                for name, found in self.recipes.items()
            },
            "system": [outcome.as_json() for outcome in self.system],
        }


def examine(
    recipes: Mapping[str, Sequence[Probe]], states: Mapping[str, tuple[str, str]] | None = None,
    known: Mapping[Probe, Outcome] = MappingProxyType({}), *, system: bool = True,
) -> Health:  # fmt: skip
    """One round: every probe of `recipes`, and the node as a whole unless `system` is false, all at the same time.

    `states` of the units and `known` outcomes: what has just been asked for.
    """
    problem = ""
    if not states:
        try:
            states = unit_states()
        except OSError as error:
            states, problem = {}, str(error)
    cycle: list[Outcome] = []
    aside = threading.Thread(target=lambda: cycle.append(ordering_cycle()))
    if system:
        aside.start()
    probes = [probe for group in recipes.values() for probe in group]
    found: dict[str, list[Outcome]] = {name: [] for name in recipes}
    bad = failed_units(states) if system else []
    rest = [probe for probe in probes if probe not in known]
    outcomes = {**known, **dict(zip(rest, run_probes(rest, states), strict=True))}
    for probe in probes:
        outcome = outcomes[probe]
        found[probe.recipe].append(outcome)
        if probe.kind == "unit" and not outcome.ok and probe.target not in bad:
            bad.append(probe.target)
    if system:
        aside.join()
    return Health(found, probe_system(states, problem, cycle[0]) if system else [], bad)


def settle(
    probes: Sequence[Probe], deadline: float
) -> tuple[Mapping[str, tuple[str, str]] | None, Mapping[Probe, Outcome]]:
    """Wait until connections are accepted and then units active.

    Returns the states of the units, None where one has failed or the time is over, and the outcomes of that moment. A
    starting node has better things to do than to answer: accepted connections are not asked for again, units seldom
    before that, and probes that are programs of their own not at all.
    """
    units = [probe for probe in probes if probe.kind == "unit"]
    connections = [probe for probe in probes if probe.kind not in ("unit", "command")]
    pause, dear_pause = 0.25, DEAR_AFTER
    dear_at = time.monotonic() + dear_pause
    while True:
        asked = dict(zip(connections, run_probes(connections, {}), strict=True))
        connections = [probe for probe, outcome in asked.items() if not outcome.ok]
        if not connections or time.monotonic() >= dear_at:
            states: Mapping[str, tuple[str, str]] = {}
            with contextlib.suppress(OSError):  # asked again, and told by the examination that follows
                states = unit_states()
            if failed_units(states):
                return None, {}
            if not connections:
                asked |= zip(units, run_probes(units, states), strict=True)
                if all(outcome.ok for outcome in asked.values()):
                    return states, asked
            dear_pause = min(dear_pause * 1.5, 3 * DEAR_AFTER)
            dear_at = time.monotonic() + dear_pause
        left = deadline - time.monotonic()
        if left <= 0:
            return None, {}
        time.sleep(min(pause, left))
        pause = min(pause * 1.2, 1.0)


def wait_healthy(
    recipes: Mapping[str, Sequence[Probe]], seconds: float, *, system: bool = True
) -> tuple[Health, float | None]:
    """Examine the node, until it is healthy, a unit has failed or `seconds` have passed.

    Also returns how long after the boot's begin it was healthy, where that was waited for.
    """
    deadline, pause = time.monotonic() + seconds, 0.25
    probes = [probe for group in recipes.values() for probe in group]
    while True:
        states, known = settle(probes, deadline) if seconds else (None, {})
        health = examine(recipes, states, known, system=system)
        if health.healthy or health.hopeless or time.monotonic() >= deadline:
            return health, seconds_since_boot() if seconds and health.healthy else None
        probes = [probe for probe in probes if probe.kind == "unit"]  # the others are part of each examination
        time.sleep(pause)
        pause = min(pause * 1.5, 3.0)


def units_to_blame(health: Health, file: str = NODE_FILE) -> list[str]:
    """Units whose journal may say why the node is not healthy: the bad ones, then all of each unhealthy recipe."""
    try:
        with open(file, encoding="utf-8") as stream:
            known = json.load(stream)["units"].items()
        units = [
            name for name, unit in known
            if "@" not in name and any(not outcome.ok for outcome in health.recipes.get(unit["recipe"], ()))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        units = []  # the node's own description is what is broken
    return list(dict.fromkeys([*health.bad_units, *units]))


def journal_of(units: Iterable[str], limit: int = 6) -> dict[str, list[str]]:
    """The last journal lines of this boot of up to `limit` units, or in their place why they cannot be had."""
    lines: dict[str, list[str]] = {}
    for unit in list(units)[:limit]:
        try:
            lines[unit] = output_of([
                "journalctl", "-b", "-q", "--no-pager", "-o", "short-iso", "-n", str(JOURNAL_LINES), "-u", unit,
            ]).splitlines()
        except OSError as error:
            lines[unit] = [str(error)]
    return lines


def seconds_since_boot() -> float:
    """Since the kernel started; in a container, since its first process did."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    if not in_container():
        return now
    with open("/proc/1/stat", encoding="ascii", errors="replace") as stream:
        ticks = int(stream.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# --- the command -----------------------------------------------------------------------------------------------------


def as_text(health: Health, journal: Mapping[str, Sequence[str]]) -> str:
    """For people: a line per probe, then the journal of what failed."""
    groups: list[tuple[str, Sequence[Outcome]]] = [*health.recipes.items()]
    if health.system:
        groups.append(("system", health.system))
    lines = []
    for name, found in groups:
        lines.append(f"{name}: {'healthy' if all(o.ok for o in found) else 'NOT HEALTHY'}")
        lines += [f"  {'ok  ' if o.ok else 'FAIL'} {o.name}: {o.detail} ({o.ms:.0f} ms)" for o in found]
    for unit, entries in journal.items():
        lines += [f"journal of {unit}:", *(f"  | {entry}" for entry in entries)]
    lines.append("healthy" if health.healthy else "NOT HEALTHY")
    return "\n".join(lines)


def write_json(path: str, value: object) -> None:
    """Replace the file as a whole, readable by everyone."""
    beside = f"{path}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), 0o644)
        json.dump(value, stream, indent=1)
        stream.write("\n")
    os.replace(beside, path)


class Arguments:
    """The parsed command line."""

    def __init__(self, words: Sequence[str]) -> None:
        self.json = self.boot = self.help = False
        self.wait = 0.0
        self.recipes: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if name == "--wait":
                if not equals and not rest:
                    raise UsageError("--wait needs a number of seconds")
                self.wait = seconds(value if equals else rest.pop(0))
            elif word == "--json":
                self.json = True
            elif word == "--boot":
                self.boot = True
            elif word in ("--help", "-h"):
                self.help = True
            elif word.startswith("-"):
                raise UsageError(f"unknown option {word}")
            else:
                self.recipes.append(word)


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise UsageError(f"{text!r} is no number of seconds")
    return value


def chosen(recipes: dict[str, list[Probe]], names: Sequence[str]) -> dict[str, list[Probe]]:
    unknown = [name for name in names if name not in recipes]
    if unknown:
        raise UsageError(f"no recipe {unknown[0]!r} on this node; there are: {', '.join(recipes)}")
    return {name: recipes[name] for name in names} if names else recipes


def main(
    words: Sequence[str] | None = None,
    *,
    folder: str = HEALTH_FOLDER,
    file: str = HEALTH_FILE,
    node_file: str = NODE_FILE,
) -> int:
    """The program; `words` default to the process's arguments. Returns the exit status."""
    try:
        arguments = Arguments(sys.argv[1:] if words is None else words)
        if arguments.help:
            print(USAGE, end="")
            return 0
        recipes = chosen(load_recipes(folder), arguments.recipes)
    except (UsageError, OSError) as error:
        print(f"samepage-health: {error}", file=sys.stderr)
        return 64
    health, settled = wait_healthy(recipes, arguments.wait, system=not arguments.recipes)
    boot_seconds = round(settled, 2) if settled and arguments.boot else None
    journal = {} if health.healthy else journal_of(units_to_blame(health, node_file))
    result = {**health.as_json(boot_seconds), "journal": journal}
    if arguments.boot:
        write_json(file, {name: value for name, value in result.items() if name != "journal"})
    print(json.dumps(result, indent=1) if arguments.json else as_text(health, journal), flush=True)
    return 0 if health.healthy else 1
