"""A machine's state is kept in a folder and goes on in copies; and a machine leaves nothing behind.

The guest is a boot sector of 43 bytes that says "started" on the serial line and then answers each letter with the next
one, so this takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.targets import base, machinestate
from appliance.targets.qemu import Qemu
from appliance.targets.qmp import Serial

CODE = bytes.fromhex(
    "31c0 8ed8 be237c ac 84c0 7406 baf803 ee ebf5"  # print the text
    "bafd03 ec a801 74f8 baf803 ec fec0 ee ebef"  # wait for a letter, answer with the next
)
DISK = (CODE + b"started\0").ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20)
QEMU = Qemu()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk.raw").write_bytes(DISK)
    yield tmp_path
    for instance in base.instances(tmp_path):
        base.bring_down(instance)


def start(project: Path, name: str) -> base.Instance:
    request = base.Request(name, project / "disk.raw", kind="usb", memory=64, hardware={"disk": "ahci"})
    instance = base.bring_up(QEMU, request, project)
    end = time.monotonic() + 120
    while "started" not in QEMU.console(instance):
        assert time.monotonic() < end
        time.sleep(0.1)
    return instance


def answer(instance: base.Instance, letter: str) -> None:
    with Serial(Path(instance.details["sockets"]) / "serial") as serial:
        serial.type(letter)
        assert serial.expect("[a-z]", 30)[0] == chr(ord(letter) + 1)


def test_copies_go_on_where_the_original_stopped(project: Path) -> None:
    original = start(project, "original")
    answer(original, "a")
    machinestate.freeze(original, project / "frozen")
    assert QEMU.state(original) == "stopped"
    assert not Path(original.details["sockets"]).exists()
    copies = [machinestate.wake(project / "frozen", project, name) for name in ("one", "two")]
    for copy in copies:
        answer(copy, "x")
        assert "started" not in QEMU.console(copy)
    assert len({copy.ports["22"] for copy in copies}) == 2  # the original has ended: its port may be taken again


def test_nodes_run_side_by_side_and_leave_nothing(project: Path) -> None:
    nodes = [start(project, name) for name in ("one", "two")]
    assert [QEMU.state(node) for node in nodes] == ["running", "running"]
    sockets = [Path(node.details["sockets"]) for node in nodes]
    base.bring_down(nodes[0])
    assert QEMU.state(nodes[1]) == "running"
    base.bring_down(nodes[1])
    assert [QEMU.state(node) for node in nodes] == ["stopped", "stopped"]
    assert not any(place.exists() for place in (*sockets, project / ".samepage"))


def test_a_killed_machine_is_noticed_and_cleared_away(project: Path) -> None:
    import os
    import signal

    node = start(project, "one")
    os.kill(int((node.folder / "pid").read_text()), signal.SIGKILL)
    end = time.monotonic() + 10
    while QEMU.state(node) == "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    again = start(project, "one")
    assert QEMU.state(again) == "running"
    assert not Path(node.details["sockets"]).exists()
