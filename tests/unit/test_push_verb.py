"""The verb `push`, alone and watching, and what `up` and `status` say of releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import cli, signing, watch
from appliance.errors import Fault, InputError
from appliance.targets import base
from appliance.targets.base import Instance
from tests.unit.pushing import COMMITTED, Workshop, open_workshop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return open_workshop(tmp_path, monkeypatch)


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
