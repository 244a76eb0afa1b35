"""What appliance.verify asks of the plugin, across the process boundary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What the plugin is asked to do; seconds for times."""

    events: str  # file to append to
    health_deadline: float
    check_deadline: float
    health_command: str
    node_file: str
    recipes: list[str]  # every recipe of the project that has checks
    only: list[str] = field(default_factory=list)  # of these recipes; empty: of all on the node


def write_plan(plan: Plan, file: Path) -> None:
    file.write_text(json.dumps(asdict(plan)), encoding="utf-8")


def read_plan(file: Path) -> Plan:
    return Plan(**json.loads(file.read_text(encoding="utf-8")))
