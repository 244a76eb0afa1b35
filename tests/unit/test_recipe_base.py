"""The launcher that keeps sockets in the service manager, with a service manager played by the test."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.programs import load_program

RECIPE = Path(__file__).parents[2] / "recipes" / "base"
PROGRAM = RECIPE / "files/opt/samepage/libexec/listen"
# What the launcher starts: tells which descriptors it was given, by name and number.
TELL = """
import os, socket
names = os.environ["LISTEN_FDNAMES"].split(":")
assert os.environ["LISTEN_PID"] == str(os.getpid())
for index, name in enumerate(names):
    assert not os.get_blocking(3 + index)  # nginx would hang in accept()
    print(name, 3 + index, socket.socket(fileno=3 + index).getsockname())
print("variable", os.environ.get("TEST", ""))
"""


@pytest.fixture(scope="module")
def listen() -> ModuleType:
    return load_program(PROGRAM)


class Manager:
    """The side of the service manager: takes notifications, keeps descriptors, hands them over at the next start."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(0.2)
        self.kept: dict[str, socket.socket] = {}
        self.messages: list[str] = []

    def start(self, *arguments: str) -> list[str]:
        """Run the launcher as a service with what is kept, and return the lines of its program."""
        names = list(self.kept)
        # In the child: the kept sockets to descriptors 3 and up, as systemd does before it executes a service.
        script = "".join(
            f"import os; os.dup2({kept.fileno()}, {100 + index})\n" for index, kept in enumerate(self.kept.values())
        )
        script += "".join(f"os.dup2({100 + index}, {3 + index})\n" for index in range(len(names)))
        script += (
            "import os, sys\nos.environ['LISTEN_PID'] = str(os.getpid())\n"
            f"os.execv(sys.executable, [sys.executable, '-IS', {str(PROGRAM)!r}, *sys.argv[1:]])"
        )
        environment = {"NOTIFY_SOCKET": str(self.path), "PATH": os.environ["PATH"]}
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        ended = subprocess.run(
            [sys.executable, "-c", script, *arguments, "--", sys.executable, "-c", TELL],
            env=environment, pass_fds=[kept.fileno() for kept in self.kept.values()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        self._receive()
        return ended.stdout.splitlines()

    def _receive(self) -> None:
        self.messages = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, 8)
            except TimeoutError:
                return
            message = data.decode()
            self.messages.append(message)
            fields = dict(line.split("=", 1) for line in message.splitlines())
            if "FDSTORE" in fields:
                self.kept[fields["FDNAME"]] = socket.socket(fileno=fds[0])
            if "FDSTOREREMOVE" in fields:
                self.kept.pop(fields["FDNAME"]).close()

    def close(self) -> None:
        self.socket.close()
        for kept in self.kept.values():
            kept.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_first_start_binds_and_stores(manager: Manager, tmp_path: Path) -> None:
    port = free_port()
    told = manager.start("--variable", "TEST", f"web=127.0.0.1:{port}", f"local={tmp_path}/s,mode=0620")
    assert told == [f"web 3 ('127.0.0.1', {port})", f"local 4 {tmp_path}/s", "variable 3;4;"]
    assert list(manager.kept) == ["web", "local"]
    assert manager.messages[-1] == "READY=1"
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o620


def test_restart_uses_the_same_sockets_and_clients_wait_in_them(manager: Manager, tmp_path: Path) -> None:
    port = free_port()
    wanted = [f"web=127.0.0.1:{port}", f"local={tmp_path}/s"]
    manager.start(*wanted)
    with socket.create_connection(("127.0.0.1", port)):  # between two runs: nobody accepts, yet it is connected
        told = manager.start(*wanted)
        assert manager.messages == ["READY=1"]
        assert told[0].startswith("web 3 ")
        accepted, _ = manager.kept["web"].accept()
        accepted.close()


def test_changed_address_is_bound_anew(manager: Manager) -> None:
    first, second = free_port(), free_port()
    manager.start(f"web=127.0.0.1:{first}")
    told = manager.start(f"web=127.0.0.1:{second}")
    assert told[0] == f"web 3 ('127.0.0.1', {second})"
    assert manager.messages[0] == "FDSTOREREMOVE=1\nFDNAME=web"
    assert manager.kept["web"].getsockname()[1] == second


def test_sockets_no_longer_wanted_are_given_back(manager: Manager) -> None:
    manager.start(f"old=127.0.0.1:{free_port()}", f"web=127.0.0.1:{free_port()}")
    kept = manager.kept["web"].getsockname()
    told = manager.start(f"web={kept[0]}:{kept[1]}")
    assert list(manager.kept) == ["web"]
    assert told[0] == f"web 3 {kept}"


def test_removed_path_is_made_again(manager: Manager, tmp_path: Path) -> None:
    manager.start(f"local={tmp_path}/s")
    (tmp_path / "s").unlink()
    manager.start(f"local={tmp_path}/s")
    assert (tmp_path / "s").is_socket()


def test_other_order_keeps_names_apart(manager: Manager) -> None:
    one, two = free_port(), free_port()
    manager.start(f"one=127.0.0.1:{one}", f"two=127.0.0.1:{two}")
    told = manager.start(f"two=127.0.0.1:{two}", f"one=127.0.0.1:{one}")
    assert told[:2] == [f"two 3 ('127.0.0.1', {two})", f"one 4 ('127.0.0.1', {one})"]
    assert manager.messages == ["READY=1"]


@pytest.mark.parametrize("text", ["", "--", "web=127.0.0.1:1", "web -- true", "web=127.0.0.1:x -- true", "--variable"])
def test_wrong_arguments(listen: ModuleType, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert listen.main(text.split()) == 64
    assert capsys.readouterr().err.startswith("listen: ")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("web=0.0.0.0:80", ("web", ("0.0.0.0", 80), 0)),
        ("web6=[::]:443", ("web6", ("::", 443), 0)),
        ("api=/run/a/s", ("api", "/run/a/s", 0o660)),
        ("api=/run/a/s,mode=0600", ("api", "/run/a/s", 0o600)),
    ],
)
def test_addresses(listen: ModuleType, text: str, parsed: object) -> None:
    assert listen.parse(text) == parsed


def test_masked_rules_exist_in_debian_only() -> None:
    """Links that switch Debian's files off lead to /dev/null and nowhere else."""
    links = [path for path in (RECIPE / "files/etc").rglob("*") if path.is_symlink()]
    off = [path for path in links if re.search(r"/(rules\.d|system-generators)/", str(path))]
    assert len(off) > 20
    assert {str(path.readlink()) for path in off} == {"/dev/null"}
