"""The same layers as a system container: up, verified, down, with nothing left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from appliance import cli
from appliance.targets import base
from tests.engine import docker_engine

PROJECT = Path(__file__).parents[2]
NAME = "test-docker"


def containers() -> set[str]:
    """Names of the engine's containers of these tests; a run that was killed may have left some."""
    client = docker.from_env()
    try:
        return {one.name for one in client.containers.list(all=True) if NAME in one.name}
    finally:
        client.close()


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A healthy node under the engine, as `up --json` describes it."""
    if shutil.which("docker") is None:
        pytest.skip("the docker command is not installed")
    note = tmp_path_factory.mktemp("docker") / "note"
    note.write_text("hello")
    with docker_engine():
        before = containers()
        try:
            assert (
                cli.main(
                    ["up", "--target", "docker", "--name", NAME, "--credential", f"samepage.note={note}", "--json"]
                )
                == 0
            )
            yield {"instance": base.find(PROJECT, NAME)}
        finally:
            cli.main(["down", "--name", NAME])
            assert not containers() - before
            assert not (base.nodes_folder(PROJECT) / NAME).exists()


def execute(container: dict[str, Any], *words: str) -> str:
    instance = container["instance"]
    done = base.target_of("docker").execute(instance, words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_systemd_runs_it(container: dict[str, Any]) -> None:
    assert execute(container, "cat", "/proc/1/comm").strip() == "systemd"
    assert execute(container, "systemctl", "list-units", "--state=failed", "--plain", "--no-legend") == ""


def test_it_has_few_privileges(container: dict[str, Any]) -> None:
    client = docker.from_env()
    settings = client.containers.get(container["instance"].details["container"]).attrs["HostConfig"]
    client.close()
    assert not settings["Privileged"]
    assert settings["ReadonlyRootfs"]
    assert len(settings["CapAdd"]) <= 8


def test_the_release_is_the_built_one(container: dict[str, Any]) -> None:
    release = json.loads(execute(container, "cat", "/run/samepage/release.json"))
    image = container["instance"].details["image"]
    base_layer = next(layer["digest"] for layer in release["layers"] if layer["kind"] == "base")
    assert f":{base_layer[:16]}-" in image


def test_credentials_arrive(container: dict[str, Any]) -> None:
    assert execute(container, "systemd-creds", "--system", "cat", "samepage.note") == "hello"


def test_the_front_door_answers(container: dict[str, Any]) -> None:
    import ssl
    import urllib.request

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(container["instance"].url + "status", context=context, timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.usefixtures("container")
def test_it_is_verified_through_testinfra_s_own_connection(tmp_path: Path) -> None:
    assert cli.main(["verify", "--name", NAME, "--output-dir", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "results.html").is_file()


def test_status_and_ssh(container: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ssh", "--name", container["instance"].name, "--", "sh", "-c", "exit 7"]) == 7
    cli.main(["status", "--json"])
    nodes = {node["name"]: node for node in json.loads(capfd.readouterr().out)}
    assert nodes[NAME]["summary"] == "healthy"


@pytest.mark.usefixtures("container")
def test_cancelled_up_leaves_nothing(tmp_path: Path) -> None:
    name, before = f"{NAME}-cancelled", containers()
    log = tmp_path / "log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "appliance", "up", "--target", "docker", "--name", name]
        process = subprocess.Popen(command, cwd=PROJECT, stdout=stream, stderr=stream)
        end = time.monotonic() + 120
        while "is healthy ..." not in log.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    assert status == 130, log.read_text()
    assert not containers() - before
    assert not (base.nodes_folder(PROJECT) / name).exists()
