"""Boots a disk as a power cut left it, and asks the node what has become of it."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CommandError
from appliance.run import run
from appliance.targets import base, qemu
from tests.faults.power.checks import Look
from tests.faults.power.cuts import Cut
from tests.faults.power.timeline import Findings
from tests.upgrade.machines import DEADLINE, TARGET, TOOL, Machine


@dataclass(frozen=True, slots=True)
class Expected:
    """What the node must come to by itself: the rows it must have by the release it may run.

    `again`: words for its tool that then end in the release `goal`.
    """

    rows: Mapping[str, frozenset[str]]
    again: Sequence[str] = ()
    goal: str = ""


def copy_disk(image: Path, target: Path) -> Path:
    """A copy that stays sparse."""
    run(["cp", "--sparse=always", image, target])
    return target


def boot(image: Path, expected: Expected) -> str:
    """Boot a raw disk to health and check what it came to; says what it was. The image is removed at the end.

    One processor: with two, QEMU 7.2's emulation may crash when one of them moves a PCI device's memory while the other
    writes to its interrupt controller, and half of two host cores for each of two boots is one processor anyway.

    Raises AssertionError, or NodeError where the node does not become healthy.
    """
    folder = Path(tempfile.mkdtemp(prefix="samepage-power-boot-"))
    try:
        request = base.Request("power-boot", image, kind="disk", hardware={"cpus": "1"})
        key = TARGET._make_key(folder)
        qemu.prepare_disks(request, folder)
        machine = Machine(qemu.start(request, folder, {"ssh.authorized_keys.root": key}))
        try:
            return _check(machine, expected)
        finally:
            TARGET.down(machine.instance)
    finally:
        image.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _check(machine: Machine, expected: Expected) -> str:
    began = time.monotonic()
    found = settled(machine)  # first: a release that is tried may have failed units, and be left
    machine.wait_healthy()
    seconds = time.monotonic() - began
    assert found["release"] in expected.rows, f"{found['release']} runs, not {' or '.join(expected.rows)}"
    assert found["next_boot"] == {"release": found["release"], "data": found["data"]}
    titles, rows = machine.titles(), expected.rows[found["release"]]
    missing = sorted(rows - titles)
    assert not missing, f"{len(missing)} rows are gone that were acknowledged: {missing[:10]}"
    if expected.again:
        status, answer = machine.tool(*expected.again, "--yes")
        ended = settled(machine)["last"] if answer["outcome"] == "restarting" else answer
        assert ended["outcome"] == "committed", (status, ended)
        assert settled(machine)["release"] == expected.goal
        assert machine.tool("verify")[1]["wrong"] == []
        assert titles <= machine.titles()
    return f"healthy in {seconds:.0f} s with release {found['release']} and {len(rows)} rows"


def settled(machine: Machine, deadline: float = DEADLINE) -> dict[str, Any]:
    """What the node's tool says of it once no upgrade is unfinished, also where the node starts anew meanwhile."""
    end, found = time.monotonic() + deadline, dict[str, Any]()
    while time.monotonic() < end:
        try:
            status, out, _messages = machine.run(f"{TOOL} status --json", timeout=120)
        except CommandError:  # no answer in its time
            status, out = 255, ""
        found = json.loads(out) if status == 0 and out else {}
        if found.get("unfinished", "unknown") is None:
            return found
        TARGET.hang_up(machine.instance)
        time.sleep(1)
    raise AssertionError(f"the upgrade did not end: {found}\n{base.tail(machine.instance.console_log, 40)}")


def is_early(cut: Cut, findings: Findings) -> bool:
    """Whether nothing but preparations had happened."""
    return cut.how == "flush" and all(cut.flushed < flushed for flushed, _state in findings.changes[1:])


def choose(seen: Sequence[tuple[Cut, Look]], findings: Findings, count: int, seed: int) -> list[Cut]:
    """`count` of an operation's cuts that are worth a boot, those around its changes of state first."""
    dice = random.Random(seed)
    changes = [flushed for flushed, _state in findings.changes[1:]]
    by_kind: list[list[Cut]] = [
        [cut for cut, look in seen if look.newer],  # GRUB is ahead of Linux
        [cut for cut, look in seen if look.tried],
        [cut for cut, _look in seen if cut.how == "flush" and cut.flushed in changes],  # right after a change
        [cut for cut, _look in seen if is_early(cut, findings)],
        [cut for cut, _look in seen if cut.how != "flush" and any(0 <= one - cut.position < 40 for one in changes)],
        [cut for cut, _look in seen if cut.how != "flush"],
        [cut for cut, _look in seen if cut.how == "flush"],
    ]
    chosen: list[Cut] = []
    while len(chosen) < count and any(by_kind):
        for cuts in by_kind:
            if cuts and len(chosen) < count:
                cut = cuts.pop(dice.randrange(len(cuts)))
                if cut not in chosen:
                    chosen.append(cut)
    return sorted(chosen, key=lambda cut: (cut.flushed, cut.how != "flush", cut.position))
