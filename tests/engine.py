"""A Docker engine for tests: the one that runs, or one that is started for them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import docker
import docker.errors
import pytest


def answers() -> bool:
    if "DOCKER_HOST" not in os.environ:  # docker leaves a socket open when it cannot connect, so look whether it can
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex("/var/run/docker.sock") != 0:
                return False
    try:
        client = docker.from_env(timeout=10)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()


@contextmanager
def docker_engine() -> Iterator[None]:
    """Holds an engine; one that had to be started is ended. Skips the test where there can be none."""
    if answers():
        yield
        return
    program = shutil.which("dockerd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("no Docker engine answers, and this user cannot start one")
    with tempfile.TemporaryFile() as log, subprocess.Popen([program], stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 60
            while not answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.skip(f"the Docker engine does not start: {log.read().decode(errors='replace')[-300:]}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
