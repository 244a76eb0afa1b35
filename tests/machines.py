"""Virtual machines for tests: started, spoken to, and gone afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.model import frozen_map
from appliance.targets import base, machinestate
from appliance.targets.qemu import Qemu
from appliance.targets.qmp import Qmp, Serial

DEADLINE = 600.0  # seconds: an emulated machine on a busy host
QEMU = Qemu()


@dataclass
class Machine:
    """One running virtual machine."""

    instance: base.Instance
    health: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.instance.url

    @property
    def sockets(self) -> Path:
        return Path(self.instance.details["sockets"])

    @property
    def console(self) -> str:
        """What it wrote to the serial console so far."""
        return QEMU.console(self.instance)

    def ssh(self, command: str, *, timeout: float = 120, check: bool = True) -> str:
        """Output of a shell command run as root; its failure fails the test unless `check` is false."""
        done = QEMU.execute(self.instance, ["sh", "-c", command], timeout=timeout)
        text = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0 or not check, f"$ {command}\n{text}"
        return text

    def serial(self) -> Serial:
        """A person at the serial console."""
        return Serial(self.sockets / "serial")

    def qmp(self) -> Qmp:
        return Qmp(self.sockets / "qmp")

    def wait_healthy(self, deadline: float = DEADLINE) -> Mapping[str, Any]:
        """Wait as the builder does. Raises NodeError with the reason from the node's journal."""
        self.health = base.wait_healthy(QEMU, self.instance, deadline)
        return self.health

    def reboot(self, deadline: float = DEADLINE) -> None:
        """Restart by the machine's own command and wait until it is healthy again."""
        before = self.ssh("cat /proc/sys/kernel/random/boot_id")
        QEMU.execute(self.instance, ["systemctl", "reboot"], timeout=30)
        self.wait_rebooted(before, deadline)

    def wait_rebooted(self, before: str, deadline: float = DEADLINE) -> None:
        import time

        end = time.monotonic() + deadline
        QEMU.hang_up(self.instance)
        while time.monotonic() < end:
            if QEMU.reachable(self.instance) and self.ssh("cat /proc/sys/kernel/random/boot_id", check=False) not in (before, ""):
                self.wait_healthy(end - time.monotonic())
                return
            QEMU.hang_up(self.instance)
            time.sleep(1)
        raise AssertionError(f"not back within {deadline:.0f} s:\n{self.console[-2000:]}")


class Machines:
    """Starts machines whose state lies below one folder; `end` removes those that are left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count(1)

    def start(self, image: Path, *, wait: bool = True, **settings: Any) -> Machine:
        """A machine from an image; `settings` are those of targets.base.Request. Healthy already unless `wait` is false."""
        settings.setdefault("deadline", DEADLINE)
        if "hardware" in settings:
            settings["hardware"] = frozen_map(settings["hardware"])
        request = base.Request(settings.pop("name", f"m{next(self.numbers)}"), image, **settings)
        machine = Machine(base.bring_up(QEMU, request, self.folder))
        if wait:
            machine.wait_healthy()
        return machine

    def freeze(self, machine: Machine) -> Path:
        """End a machine and keep its whole state; returns what `wake` takes."""
        place = self.folder / f"frozen{next(self.numbers)}"
        machinestate.freeze(machine.instance, place)
        self.end_one(machine)
        return place

    def wake(self, frozen: Path) -> Machine:
        """A copy of a frozen machine, running on from where that one was."""
        return Machine(machinestate.wake(frozen, self.folder, f"m{next(self.numbers)}"))

    @staticmethod
    def end_one(machine: Machine) -> None:
        base.bring_down(machine.instance)

    def end(self) -> None:
        for instance in base.instances(self.folder):
            base.bring_down(instance)
