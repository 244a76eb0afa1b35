"""A checkout that pushes, and the node that it pushes to: a folder of this host.

Commands run here, with the folder's paths put in place of the node's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import bundle as making
from appliance import cli, pipeline, push, signing
from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.model import frozen_map
from appliance.store import Store
from appliance.targets import base
from appliance.targets.base import Instance
from tests.unit.releases import Maker

COMMITTED = {
    "status": 0, "outcome": "committed", "class": "live", "from": "1.0", "to": "1.0+dev.x", "seconds": 1.25,
    "units": {"app.service": "none", "nginx.service": "reload"}, "reason": "", "message": "",
}  # fmt: skip

# Stands for the node's tool: keeps what it was given, and answers what the test wants.
TOOL = """#!/bin/sh
printf '%s\\n' "$@" >{root}/words
cp "$2" {root}/received
cat {root}/answer
printf '\n'
echo something >&2
exit $(cat {root}/status)
"""

Answer = subprocess.CompletedProcess[bytes]


def done(status: int, output: str = "") -> Answer:
    return subprocess.CompletedProcess([], status, output.encode(), b"words on stderr\n")


@dataclass(eq=False)
class LocalNode(base.Target):
    """A target whose one node is a folder. `instead` may answer in the node's place, by the number of the command."""

    root: Path
    commands: list[Sequence[str]] = field(default_factory=list)
    now: base.State = "running"
    hung_up: int = 0
    instead: Callable[[int], Answer | None] = lambda _number: None
    name = "local"

    def install(self, release: ReleaseFiles) -> None:
        """Have the node run a release."""
        for folder in ("run/samepage", "opt/samepage/bin", "state"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "run/samepage/release.json").write_bytes(release.content)
        tool = self.root / "opt/samepage/bin/samepage-upgrade-node"
        tool.write_text(TOOL.format(root=self.root))
        tool.chmod(0o755)
        self.answers(0, COMMITTED)

    def answers(self, status: int, answer: Mapping[str, Any] | str) -> None:
        text = answer if isinstance(answer, str) else json.dumps({**answer, "status": status}, indent=2)
        (self.root / "answer").write_text(text)
        (self.root / "status").write_text(str(status))

    def keep_history(self, *entries: Mapping[str, Any]) -> None:
        (self.root / "state/upgrade").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (self.root / "state/upgrade/history.jsonl").write_text(lines)

    def command(self, _instance: Instance, words: Sequence[str], *, terminal: bool = False) -> list[str]:
        assert not terminal
        moved = []
        for word in words:
            for path in ("/run/samepage", "/opt/samepage", "/state/"):
                word = word.replace(path, f"{self.root}{path}")
            moved.append(word)
        return moved

    def execute(
        self, instance: Instance, words: Sequence[str], *, input: bytes | None = None, timeout: float = 120
    ) -> Answer:
        self.commands.append(words)
        instead = self.instead(len(self.commands))
        return instead or super().execute(instance, words, input=input, timeout=timeout)

    def hang_up(self, _instance: Instance) -> None:
        self.hung_up += 1

    def state(self, _instance: Instance) -> base.State:
        return self.now

    def how_it_ended(self, _instance: Instance) -> str:
        return "ended"

    def up(self, request: base.Request, folder: Path) -> Instance:
        raise NotImplementedError

    def down(self, instance: Instance) -> None:
        raise NotImplementedError

    def connection(self, instance: Instance) -> tuple[str, tuple[str, ...]]:
        raise NotImplementedError


class Workshop:
    """A checkout whose builds give the releases of a Maker, and the node that is pushed to."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.node = LocalNode(folder / "node")
        (folder / "files").mkdir()
        self.maker = Maker(folder / "files")
        self.store = Store(folder / "cache", self.project)
        self.running = self.maker.release()
        self.tree = self.maker.release(nginx=b"two")
        self.error: Exception | None = None
        record = base.nodes_folder(self.project) / "samepage"
        record.mkdir(parents=True)
        self.instance = Instance("samepage", "local", record, "127.0.0.1", frozen_map(), frozen_map())
        base.save(self.instance)
        self.node.install(self.running)

    def request(self, **changes: Any) -> push.Request:
        return push.Request(pipeline.Options(self.project), self.node, self.instance, **changes)

    def push(self, **changes: Any) -> push.Outcome:
        return push.push(self.request(**changes), Console(style="plain"))

    def build(self, _options: pipeline.Options, _console: Console) -> Any:
        if self.error:
            raise self.error
        return SimpleNamespace(release=self.tree, tools=None, store=self.store)

    def file(self, path: str) -> Path:
        return self.node.root / path

    @property
    def words(self) -> list[str]:
        """What the node's tool was called with."""
        return self.file("words").read_text().splitlines()

    def run(self, *words: str) -> int:
        return cli.main(["-C", str(self.project), "push", *words])


def open_workshop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop that the code under test takes for the real thing."""
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    shop = Workshop(folder)
    monkeypatch.setattr(pipeline, "build_release", shop.build)
    monkeypatch.setattr(making, "files_of", lambda release: release)
    monkeypatch.setattr(base, "target_of", lambda _name: shop.node)
    monkeypatch.setattr(push, "PAUSE", 0.01)
    return shop
