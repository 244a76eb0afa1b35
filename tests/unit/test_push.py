"""Pushing the working tree: what is built, what is sent in one go, and what is made of the node's answer.

The node is a folder of this host: commands run here, with its paths put in place of the node's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import bundle as making
from appliance import cli, pipeline, push, signing, watch
from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.errors import Fault, InputError
from appliance.model import frozen_map
from appliance.node.bundle import open_bundle
from appliance.node.keys import Trust, load_trust
from appliance.node.release import parse
from appliance.store import Store
from appliance.targets import base
from appliance.targets.base import Instance, NodeError
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


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shop = Workshop(tmp_path)
    monkeypatch.setattr(pipeline, "build_release", shop.build)
    monkeypatch.setattr(making, "files_of", lambda release: release)
    monkeypatch.setattr(base, "target_of", lambda _name: shop.node)
    monkeypatch.setattr(push, "PAUSE", 0.01)
    return shop


# --- the version -----------------------------------------------------------------------------------------------------


def test_the_version_stands_for_the_content(shop: Workshop) -> None:
    one, again = push.dev_release(shop.tree), push.dev_release(shop.maker.release(nginx=b"two"))
    assert one.manifest.version.startswith("1.0+dev.")
    assert len(one.manifest.version) == len("1.0+dev.") + 8
    assert one.content == again.content
    assert parse(one.content) == one.manifest == replace(shop.tree.manifest, version=one.manifest.version)
    kernel = replace(shop.tree.manifest.kernel, cmdline="debug")
    others = [
        shop.running, shop.maker.release("1.1", nginx=b"two"), shop.maker.release(nginx=b"two", nodes=("two",)),
        replace(shop.tree, manifest=replace(shop.tree.manifest, kernel=kernel)),
    ]  # fmt: skip
    versions = [push.dev_release(other).manifest.version for other in others]
    assert len({one.manifest.version, *versions}) == 5


def test_a_version_changes_no_rendered_file(project: Path) -> None:
    first, second = (pipeline.check_project(project, "two", version)[1] for version in ("1.0", "2.0"))
    assert first == second


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_a_push_is_two_round_trips(shop: Workshop) -> None:
    outcome = shop.push()
    assert len(shop.node.commands) == 2
    assert outcome.status == 0
    assert outcome.record().items() >= {**COMMITTED, "node": "samepage"}.items()
    name = shop.words[1]
    assert shop.words == ["install", name, "--yes", "--json", "--apply=auto", "--allow-downgrade"]
    new = push.dev_release(shop.tree)
    assert name == str(shop.file(f"state/upgrade/incoming/samepage-1.0-to-{new.manifest.version}.bundle"))
    assert not list(shop.file("state/upgrade/incoming").iterdir())
    received = shop.file("received")
    assert received.stat().st_size == outcome.bundle == outcome.record()["bundle_bytes"]
    with open_bundle(str(received), load_trust(str(shop.file("state/upgrade/keys")))) as opened:
        assert opened.manifest(shop.running.content) == new.content
        assert [part.kind for part in opened.info.parts] == ["manifest", "config"]


def test_the_same_tree_is_pushed_once(shop: Workshop, tmp_path: Path) -> None:
    shop.node.install(push.dev_release(shop.tree))
    outcome = shop.push()
    assert outcome.status == push.NOTHING
    assert (outcome.bundle, outcome.text("from")) == (0, push.dev_release(shop.tree).manifest.version)
    assert len(shop.node.commands) == 1
    assert not (tmp_path / "config").exists()  # no key was needed
    shop.node.install(shop.tree)  # the same under its own version
    assert shop.push().status == push.NOTHING


def test_the_node_learns_the_key_once(shop: Workshop) -> None:
    shop.push()
    signer = signing.find()
    assert signer
    place = shop.file(f"state/upgrade/keys/{signer.id}.pub")
    assert place.read_bytes() == signing.public_line(signer)
    place.write_text("what stands there stays\n")
    shop.push()
    assert place.read_text() == "what stands there stays\n"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_another_key_signs_where_it_is_named(shop: Workshop, tmp_path: Path) -> None:
    signer, _ = signing.create("other", tmp_path, tmp_path / "other.key")
    shop.push(key=tmp_path / "other.key")
    with open_bundle(str(shop.file("received")), Trust({signer.id: signer.public})):
        pass
    assert signing.find() is None


def test_options_reach_the_node_s_tool(shop: Workshop) -> None:
    shop.push(apply="soft-reboot")
    assert "--apply=soft-reboot" in shop.words


@pytest.mark.parametrize(
    ("version", "allow", "expected"),
    [("1.0", False, True), ("1.0+dev.ffffffff", False, True), ("0.9", False, True), ("1.1", False, False),
     ("1.1+dev.00000000", False, False), ("1.1", True, True)],
)  # fmt: skip
def test_only_an_older_tree_needs_leave(shop: Workshop, version: str, allow: bool, expected: bool) -> None:
    shop.node.install(shop.maker.release(version))
    shop.push(allow_downgrade=allow)
    assert ("--allow-downgrade" in shop.words) is expected


def test_a_dry_run_sends_nothing_and_makes_no_key(shop: Workshop) -> None:
    outcome = shop.push(dry_run=True)
    assert len(shop.node.commands) == 1
    assert not shop.file("state/upgrade").exists()
    assert signing.find() is None
    assert (outcome.status, outcome.text("outcome"), outcome.text("class")) == (0, "planned", "live")
    assert outcome.answer["units"] == {"nginx.service": "reload"}
    assert "class: live" in outcome.plan


def test_what_is_not_at_hand_is_sent_whole(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    config = shop.running.manifest.layers[-1].digest
    wanted = {layer.digest for layer in shop.tree.manifest.layers}
    assert config not in wanted
    shop.tree = replace(shop.tree, files={name: path for name, path in shop.tree.files.items() if name != config})
    outcome = shop.push()
    assert outcome.status == 0
    assert "these layers are sent whole: config" in capsys.readouterr().err
    signer = signing.find()
    assert signer
    with open_bundle(str(shop.file("received")), Trust({signer.id: signer.public})) as opened:
        assert opened.info.from_manifest == shop.running.digest
        assert opened.info.parts[1].sources == ()


# --- what the node answers -------------------------------------------------------------------------------------------


def test_a_stale_connection_gets_a_second_chance(shop: Workshop) -> None:
    shop.node.instead = lambda number: done(255) if number == 1 else None
    assert shop.push().status == 0
    assert shop.node.hung_up == 1
    shop.node.instead = lambda _number: done(255)
    with pytest.raises(NodeError, match=r"which release it runs\n  \| words on stderr"):
        shop.push()


def test_the_answer_may_follow_other_words(shop: Workshop) -> None:
    shop.node.answers(5, "a word before\n" + json.dumps({**COMMITTED, "status": 5}))
    assert shop.push().status == 5


@pytest.mark.parametrize("answer", ["", "[1]", '{"status": "good"}', "Traceback"])
def test_no_answer_is_an_error_with_what_was_said(shop: Workshop, answer: str) -> None:
    shop.node.answers(1, answer)
    with pytest.raises(NodeError, match=r"did not upgrade, status 1\n(  \| .*\n)?  \| something"):
        shop.push()
    assert not list(shop.file("state/upgrade/incoming").iterdir())


def test_a_release_without_the_tool_says_so(shop: Workshop) -> None:
    shop.file("opt/samepage/bin/samepage-upgrade-node").unlink()
    with pytest.raises(NodeError, match="has no /opt/samepage/bin/samepage-upgrade-node"):
        shop.push()


def test_a_full_disk_is_told(shop: Workshop) -> None:
    shop.file("state/upgrade").write_text("in the way")
    with pytest.raises(NodeError, match="status 1"):
        shop.push()
    assert not shop.file("words").exists()


def entry(release: ReleaseFiles, outcome: str, **changes: Any) -> dict[str, Any]:
    """A line of the node's history."""
    return {
        "time": 1_800_000_000, "action": "upgrade", "class": "soft-reboot", "from": "1.0",
        "to": release.manifest.version, "digest": release.digest, "outcome": outcome, "state": "", "reason": "",
        "seconds": 30, "units": {"nginx.service": "restart"}, "data": 1, **changes,
    }  # fmt: skip


def rebooting(shop: Workshop, runs: ReleaseFiles, *history: Mapping[str, Any], status: int = 255) -> push.Outcome:
    """A push whose connection breaks; the node then runs a release and has a history."""

    def instead(number: int) -> Answer | None:
        if number == 2:
            shop.file("run/samepage/release.json").write_bytes(runs.content)
            shop.node.keep_history(entry(shop.maker.release("0.9"), "committed"), *history)
            return done(status)
        return done(1) if number == 3 else None  # not reachable yet

    shop.node.instead = instead
    return shop.push()


@pytest.mark.parametrize("status", push.BROKEN_OFF)
def test_a_node_that_started_anew_is_asked_how_it_ended(shop: Workshop, status: int) -> None:
    new = push.dev_release(shop.tree)
    outcome = rebooting(shop, new, entry(new, "committed"), status=status)
    assert (outcome.status, outcome.text("class"), outcome.text("to")) == (0, "soft-reboot", new.manifest.version)
    assert outcome.answer["units"] == {"nginx.service": "restart"}
    assert shop.node.hung_up == 2


def test_a_restart_that_the_node_announces_is_waited_for(shop: Workshop) -> None:
    new = push.dev_release(shop.tree)
    shop.node.answers(4, {**COMMITTED, "outcome": "restarting", "message": "trying it"})

    def instead(number: int) -> Answer | None:
        if number == 3:
            shop.file("run/samepage/release.json").write_bytes(new.content)
            shop.node.keep_history(entry(new, "committed"))
        return None

    shop.node.instead = instead
    outcome = shop.push()
    assert (outcome.status, outcome.text("outcome"), outcome.text("message")) == (0, "committed", "")
    shop.node.install(shop.running)
    shop.node.commands.clear()
    died = {"outcome": "failed", "reason": "died", "message": "its process was ended"}
    shop.node.answers(1, died)
    assert shop.push().status == 0  # by the restart
    shop.node.install(shop.running)
    shop.node.instead = lambda _number: None
    shop.node.keep_history()
    shop.node.answers(1, died)
    outcome = shop.push()  # by something else
    assert (outcome.status, outcome.text("message")) == (1, "its process was ended")
    assert (outcome.text("from"), outcome.text("to")) == ("1.0", new.manifest.version)
    shop.node.answers(4, {**COMMITTED, "outcome": "staged", "message": "needs a reboot"})
    assert shop.push().status == 4  # that one waits for somebody


def test_a_release_that_was_given_up_says_why(shop: Workshop) -> None:
    past = entry(push.dev_release(shop.tree), "rolled-back", state="health", reason="nginx: refused")
    outcome = rebooting(shop, shop.running, past)
    assert (outcome.status, outcome.text("reason"), outcome.text("message")) == (5, "health", "nginx: refused")


def test_what_runs_decides_not_what_was_written(shop: Workshop) -> None:
    new = push.dev_release(shop.tree)
    assert rebooting(shop, shop.running, entry(new, "committed")).status == 1
    shop.node.commands.clear()
    outcome = rebooting(shop, new, entry(new, "rolled-back", reason="the time before"))
    assert (outcome.status, outcome.text("message")) == (0, "")


def test_a_connection_that_broke_too_early_is_a_failure(shop: Workshop) -> None:
    outcome = rebooting(shop, shop.running)
    assert (outcome.status, outcome.text("reason")) == (1, push.LOST)
    assert outcome.text("to") == push.dev_release(shop.tree).manifest.version


def test_an_upgrade_under_way_is_waited_for(shop: Workshop) -> None:
    new = push.dev_release(shop.tree)
    shop.node.keep_history()
    journal = shop.file("state/upgrade/journal.json")
    journal.write_text("{}")

    def instead(number: int) -> Answer | None:
        if number == 4:
            return done(4)  # as the script ends when its time is over
        if number == 6:
            journal.unlink()
            shop.file("run/samepage/release.json").write_bytes(new.content)
        return None

    shop.node.instead = instead
    shop.node.commands += [[], []]
    request = shop.request()
    assert push.await_end(request, shop.running, new)["status"] == 0
    journal.write_text("{}")
    with pytest.raises(NodeError, match="did not end within 0 s"):
        push.await_end(shop.request(deadline=0.2), shop.running, new)
    shop.node.now = "stopped"
    with pytest.raises(NodeError, match="ended in its upgrade"):
        push.await_end(request, shop.running, new)


# --- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_tells_what_happened(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.run() == 0
    out, err = capsys.readouterr()
    assert out.startswith("samepage runs 1.0+dev.x (live) after ")
    assert out.endswith("1.2 s of it on the node\n  reload   nginx.service\n")
    assert "made a personal signing key" in err
    assert "live, " in err
    shop.node.install(shop.tree)
    assert shop.run() == 0
    assert capsys.readouterr().err.endswith("nothing to do: samepage runs this tree already, as release 1.0\n")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (1, "error: samepage keeps release 1.0: why\n"),
        (3, "error: samepage refuses release 1.0+dev.x: why\n"),
        (4, "samepage has release 1.0+dev.x ready and starts it at its next boot: why\n"),
        (5, "error: samepage tried release 1.0+dev.x and went back to 1.0: why\n"),
        (6, "error: samepage is in another upgrade: why\n"),
    ],
)
def test_the_exit_status_is_the_node_s(
    shop: Workshop, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.node.answers(status, {**COMMITTED, "message": "why"})
    assert shop.run() == status
    out, err = capsys.readouterr()
    assert (out, err.endswith(message)) == ("", True)


def test_hints_of_the_node_are_shown(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.node.answers(3, {**COMMITTED, "message": "why", "hint": "do this"})
    assert shop.run() == 3
    assert capsys.readouterr().err.endswith("refuses release 1.0+dev.x: why\n  hint: do this\n")
    shop.node.answers(3, {**COMMITTED, "message": "why", "reason": "not-upgradable", "hint": "install it"})
    assert shop.run() == 3
    assert capsys.readouterr().err.endswith("start one with: ./build.py up --installed\n")


def test_the_verb_as_json(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.run("--json", "--apply", "live") == 0
    value = json.loads(capsys.readouterr().out)
    assert value.keys() == COMMITTED.keys() | {"node", "bundle_bytes", "total_seconds"}
    assert shop.run("--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "planned"
    assert shop.run("--dry-run") == 0
    assert "class: live" in capsys.readouterr().out


def test_a_node_must_run(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.run("--name", "sampage") == 2
    assert "did you mean 'samepage'?" in capsys.readouterr().err
    assert shop.run("--watch", "--dry-run") == 2
    shop.node.now = "stopped"
    assert shop.run() == shop.run("--watch") == 1


def test_watching_pushes_every_change_and_survives_faults(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = shop.project / "recipes/nginx/nginx.conf.j2"
    steps: list[Callable[[], None]] = []

    def wait(folders: list[Path], before: watch.Snapshot, _idle: Callable[[], None]) -> list[str]:
        assert folders == [shop.project / "recipes", shop.project / "appliance/node"]
        assert before == watch.snapshot(folders)
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()
        return [str(template)]

    def broken() -> None:
        shop.error = InputError([Fault("recipes/nginx/nginx.conf.j2", 12, "", "'wokers' is undefined")])

    def surprising() -> None:
        shop.error = ValueError("surprise")

    def mended() -> None:
        shop.error, shop.tree = None, shop.maker.release(nginx=b"three")

    steps += [broken, surprising, mended]
    monkeypatch.setattr(watch, "wait_for_change", wait)
    assert shop.run("--watch", "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["status"] for line in out.splitlines()] == [0, 0]
    assert "recipes/nginx/nginx.conf.j2:12: 'wokers' is undefined" in err
    assert "ValueError: surprise" in err
    assert "changed: recipes/nginx/nginx.conf.j2" in err
    assert err.endswith("stopped watching\n")


def test_watching_keeps_the_connection(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.verbs import push as verbs

    now = [0.0]
    monkeypatch.setattr(verbs.time, "monotonic", lambda: now[0])
    keep = verbs.warm_keeper(shop.request())
    for seconds in (1, 150, 201, 202, 402):
        now[0] = seconds
        keep()
    assert shop.node.commands == [["true"], ["true"]]


# --- up and status ---------------------------------------------------------------------------------------------------


def test_status_tells_the_release(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    health = shop.file("opt/samepage/bin/samepage-health")
    health.write_text('#!/bin/sh\necho \'{"healthy": true, "recipes": {}}\'\n')
    health.chmod(0o755)
    assert cli.main(["-C", str(shop.project), "status"]) == 0
    title, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert dict(zip(title, row, strict=True))["release"] == "1.0"
    shop.file("run/samepage/release.json").write_text("{")
    assert cli.main(["-C", str(shop.project), "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["release"] == ""
    shop.file("run/samepage/release.json").unlink()
    assert cli.main(["-C", str(shop.project), "status"]) == 0
    assert "-" in capsys.readouterr().out.splitlines()[1].split()


def test_up_hands_the_public_key_to_the_node(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests: list[base.Request] = []

    def bring_up(_target: object, request: base.Request, _project: Path) -> Instance:
        requests.append(request)
        return shop.instance

    monkeypatch.setattr(base, "bring_up", bring_up)
    image = tmp_path / "some.iso"
    image.write_bytes(b"")
    words = ["-C", str(shop.project), "up", "--image", str(image), "--no-wait"]
    assert cli.main(words) == 0
    signer = signing.find()
    assert signer
    assert requests[0].credentials == {base.UPGRADE_KEY: signing.public_line(signer)}
    assert "personal.key" in capsys.readouterr().err
    (tmp_path / "own.pub").write_text("own")
    assert cli.main([*words, "--credential", f"{base.UPGRADE_KEY}={tmp_path / 'own.pub'}"]) == 0
    assert requests[1].credentials == {base.UPGRADE_KEY: b"own"}
    signing.personal_place().chmod(0o644)
    assert cli.main(words) == 0
    assert requests[2].credentials == {}
    assert "the node will not know your key" in capsys.readouterr().err
