"""Pushing the working tree: what is built, what is sent in one go, and what is made of the node's answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance import pipeline, push, signing
from appliance.bundle import ReleaseFiles
from appliance.node.bundle import open_bundle
from appliance.node.keys import Trust, load_trust
from appliance.node.release import parse
from appliance.targets.base import NodeError
from tests.unit.pushing import COMMITTED, Answer, Workshop, done, open_workshop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return open_workshop(tmp_path, monkeypatch)


# --- the version -----------------------------------------------------------------------------------------------------


def test_the_version_stands_for_the_content(shop: Workshop) -> None:
    one, again = push.dev_release(shop.tree), push.dev_release(shop.maker.release(nginx=b"two"))
    assert one.manifest.version.startswith("1.0+dev.")
    assert len(one.manifest.version) == len("1.0+dev.") + 8
    assert one.content == again.content
    assert parse(one.content) == one.manifest == shop.tree.manifest._replace(version=one.manifest.version)
    kernel = shop.tree.manifest.kernel._replace(cmdline="debug")
    others = [
        shop.running, shop.maker.release("1.1", nginx=b"two"), shop.maker.release(nginx=b"two", nodes=("two",)),
        replace(shop.tree, manifest=shop.tree.manifest._replace(kernel=kernel)),
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
