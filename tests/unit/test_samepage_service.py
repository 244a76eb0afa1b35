"""Talking to the service manager, with this test in its place."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from samepage import service


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            monkeypatch.delenv(name, raising=False)
        yield channel


def received(manager: socket.socket) -> tuple[str, list[int]]:
    descriptors = array.array("i")
    text, ancillary, *_ = manager.recvmsg(4096, socket.CMSG_SPACE(64))
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return text.decode(), list(descriptors)


def test_lines_reach_the_manager(manager: socket.socket) -> None:
    service.notify("READY=1", "STATUS=Serving")
    assert received(manager) == ("READY=1\nSTATUS=Serving", [])


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify("READY=1")


def test_an_abstract_address_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0samepage-test-{os.getpid()}")
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@samepage-test-{os.getpid()}")
        service.notify("READY=1")
        assert channel.recv(100) == b"READY=1"


def test_the_socket_is_given_into_keeping_and_still_accepts(manager: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    (tmp_path / "api.sock").write_text("left by a crash")
    listener = service.listen_unix(path, "api")
    assert received(manager)[0] == "FDSTOREREMOVE=1\nFDNAME=api"
    text, (kept,) = received(manager)
    assert text == "FDSTORE=1\nFDNAME=api"
    assert Path(path).stat().st_mode & 0o777 == 0o666
    listener.close()
    with socket.socket(fileno=kept) as again, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)  # the process is gone, nobody is refused
        again.accept()[0].close()


@pytest.mark.usefixtures("manager")
def test_a_kept_socket_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(path)
        kept.listen()
        passed = os.dup(kept.fileno())
        monkeypatch.setattr(service, "_FIRST_PASSED", passed - 1)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_FDNAMES", "other:api")
        with service.listen_unix(path, "api") as listener:
            assert listener.fileno() == passed
            assert not os.get_inheritable(passed)


@pytest.mark.usefixtures("manager")
def test_a_kept_socket_of_another_address_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(str(tmp_path / "old.sock"))
        kept.listen()
        monkeypatch.setattr(service, "_FIRST_PASSED", os.dup(kept.fileno()))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "api")
        with service.listen_unix(str(tmp_path / "new.sock"), "api") as listener:
            assert listener.getsockname() == str(tmp_path / "new.sock")


@pytest.mark.usefixtures("manager")
def test_sockets_for_another_process_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "api")
    with service.listen_unix(str(tmp_path / "api.sock"), "api") as listener:
        assert listener.getsockname() == str(tmp_path / "api.sock")


def test_a_tcp_port_listens_and_is_kept(manager: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with service.listen_tcp(port, "api-tcp") as listener:
        received(manager)
        text, (kept,) = received(manager)
        os.close(kept)
        assert text == "FDSTORE=1\nFDNAME=api-tcp"
        socket.create_connection(("127.0.0.1", port)).close()
        assert listener.getsockname()[1] == port
