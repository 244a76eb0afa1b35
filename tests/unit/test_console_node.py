"""The console's texts and pages, and its daemon on real sockets and a real terminal."""

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import addresses, console, health, status
from appliance.node.console import Screen, Terminals, answer, passed_descriptors

FACTS: dict[str, object] = {
    "node": "n1", "layout": "private-cloud", "release": "2026.11.0", "mode": "installed", "host_key": "SHA256:abc",
    "addresses": ["10.0.2.15", "fec0::1"], "url": "https://10.0.2.15/", "ssh": "ssh root@10.0.2.15",
}  # fmt: skip


def outcome(name: str, ok: bool, detail: str) -> dict[str, object]:
    return {"name": name, "ok": ok, "detail": detail, "ms": 3.0}


GOOD: dict[str, object] = {
    "healthy": True, "boot_seconds": 21.7, "system": [outcome("no failed unit", True, "none")],
    "recipes": {"nginx": {"healthy": True, "probes": [outcome("https", True, "status 200")]}},
}  # fmt: skip
BAD: dict[str, object] = {
    "healthy": False, "boot_seconds": None, "system": [],
    "recipes": {"nginx": {"healthy": False, "probes": [outcome("https", False, "<no>")]}},
}  # fmt: skip
REAL_ADDRESSES = addresses.addresses
LOGIN = {"user": "admin", "password": "one-time-secret"}


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node whose files all lie in a folder of the test's own."""
    for name in ("RELEASE_FILE", "MODE_FILE", "NODE_FILE", "LOGIN_FILE", "HOST_KEY_FILE", "HEALTH_SOCKET"):
        monkeypatch.setattr(status, name, str(tmp_path / name.lower()))
    monkeypatch.setattr(health, "HEALTH_FILE", str(tmp_path / "health_file"))
    monkeypatch.setattr(addresses, "addresses", lambda: ["192.0.2.7", "2001:db8::7"])
    return tmp_path


# --- texts -----------------------------------------------------------------------------------------------------------


def test_facts(node: Path) -> None:
    (node / "release_file").write_text('{"version": "7.1", "layout": "small"}')
    (node / "mode_file").write_text("live\n")
    (node / "node_file").write_text('{"name": "n7", "layout": "small"}')
    key = "AAAAC3NzaC1lZDI1NTE5AAAAIGQw7J4Y3Q6XlJYb5eSLw0LLc4sH5oJMJ0xBhbdFQnpi"
    (node / "host_key_file").write_text(f"ssh-ed25519 {key} root@n7\n")
    facts = status.node_facts()
    assert (facts["node"], facts["layout"], facts["release"], facts["mode"]) == ("n7", "small", "7.1", "live")
    assert facts["url"] == "https://192.0.2.7/"
    assert facts["ssh"] == "ssh root@192.0.2.7"
    asked = subprocess.run(["ssh-keygen", "-lf", node / "host_key_file"], capture_output=True, text=True, check=True)
    assert str(facts["host_key"]) in asked.stdout.split()


def test_facts_of_a_node_that_knows_nothing(monkeypatch: pytest.MonkeyPatch, node: Path) -> None:
    def none() -> list[str]:
        raise OSError

    monkeypatch.setattr(addresses, "addresses", none)
    (node / "release_file").write_text("not json")
    (node / "node_file").write_text("[1]")
    facts = status.node_facts()
    assert (facts["release"], facts["url"], facts["host_key"]) == ("unknown", "", "")
    assert "no address yet" in status.console_text(facts, {}, {})


def test_an_ipv6_only_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "addresses", lambda: ["2001:db8::7"])
    assert status.node_facts()["url"] == "https://[2001:db8::7]/"


def test_console_text() -> None:
    text = status.console_text(FACTS, GOOD, {})
    for word in ("2026.11.0", "10.0.2.15", "fec0::1", "https://10.0.2.15/", "healthy, 22 s", "ssh root@10.0.2.15"):
        assert word in text
    assert "password" not in text
    assert "admin  password  one-time-secret" in status.console_text(FACTS, GOOD, LOGIN)
    assert "starting" in status.console_text(FACTS, {}, {})
    assert "nginx https: <no>" in status.console_text(FACTS, BAD, {})


@given(st.dictionaries(st.sampled_from(["user", "password"]), st.text()), st.text(), st.text())
def test_console_text_is_safe_to_print(login: dict[str, str], name: str, detail: str) -> None:
    bad = {**BAD, "system": [{"name": "x", "ok": False, "detail": detail, "ms": 0}]}
    text = status.console_text({**FACTS, "node": name}, bad, login)
    assert all(letter == "\n" or letter.isprintable() for letter in text)
    assert max(map(len, text.split("\n"))) <= status.WIDTH


def test_many_complaints_are_cut() -> None:
    many = {"healthy": False, "system": [{"name": str(n), "ok": False, "detail": "bad", "ms": 0} for n in range(20)]}
    lines = status.health_lines(many)
    assert len(lines) == 8
    assert lines[-1] == "and 14 more"


class Balance(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("found", [GOOD, BAD])
def test_page(found: dict[str, object]) -> None:
    page = status.status_page(FACTS, found)
    texts = Balance(page).texts
    assert "healthy" in texts or "not healthy" in texts
    assert "https" in texts
    assert "<no>" not in page


# --- requests --------------------------------------------------------------------------------------------------------


class Cache(status.HealthCache):
    def __init__(self, found: dict[str, object]) -> None:
        super().__init__(lambda: dict(found))


def ask(head: str, found: dict[str, object] | None = None) -> tuple[int, str, str]:
    response = answer(head.encode("latin-1"), Cache(found or GOOD)).decode()
    headers, _, body = response.partition("\r\n\r\n")
    kind = next(line for line in headers.split("\r\n") if line.startswith("Content-Type")).split(" ", 1)[1]
    return int(headers.split(" ")[1]), kind, body


def test_answers(node: Path) -> None:
    (node / "login_file").write_text(json.dumps(LOGIN))
    code, kind, body = ask("GET /status.json HTTP/1.0")
    assert (code, kind) == (200, "application/json; charset=utf-8")
    found = json.loads(body)
    assert found["healthy"]
    assert found["recipes"]["nginx"]["healthy"]
    assert {"release", "addresses", "uptime_seconds", "boot_seconds"} <= set(found)
    assert ask("GET /status HTTP/1.1\r\nAccept: application/json")[1].startswith("application/json")
    code, kind, page = ask("GET /status?x HTTP/1.1\r\nAccept: text/html,application/json;q=0.9")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "one-time-secret" not in page + body
    assert ask("GET /status HTTP/1.0", BAD)[0] == 503
    assert ask("HEAD /status HTTP/1.0")[2] == ""
    assert ask("GET /alive HTTP/1.0")[2] == "alive\n"
    assert ask("GET /etc/passwd HTTP/1.0")[0] == 404
    assert ask("POST /status HTTP/1.0")[0] == 405


@given(st.binary())
def test_any_request_gets_an_answer(data: bytes) -> None:
    assert answer(data, Cache(GOOD)).startswith(b"HTTP/1.1 ")


def test_health_is_probed_once_for_all_who_ask_at_the_same_time() -> None:
    asked = []

    def probe() -> dict[str, object]:
        asked.append(1)
        time.sleep(0.1)
        return dict(GOOD)

    cache = status.HealthCache(probe)
    threads = [threading.Thread(target=cache.get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert cache.seconds >= 0.1
    cache._when -= status.CACHE_SECONDS
    cache.get()
    assert len(asked) == 2


def test_health_comes_from_the_probing_service(node: Path) -> None:
    answers = [json.dumps({**GOOD, "journal": {"secret": []}}).encode(), b"nonsense"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node / "health_socket"))
        listener.listen()

        def serve() -> None:
            for data in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        cache = status.HealthCache(lambda: status.ask_health(str(node / "health_socket")))
        found = cache.get()
        assert found["healthy"]
        assert "journal" not in found
        cache._when = float("-inf")
        assert "answered b'nonsense'" in str(cache.get()["system"])
        thread.join()
    (node / "health_socket").unlink()
    cache._when = float("-inf")
    assert not cache.get()["healthy"]


# --- terminals -------------------------------------------------------------------------------------------------------


def read_all(descriptor: int) -> str:
    data = b""
    os.set_blocking(descriptor, False)
    try:
        while part := os.read(descriptor, 65536):
            data += part
    except BlockingIOError:
        pass
    return data.decode()


def test_terminals_are_written_only_on_change() -> None:
    screen, screen_end = os.pipe()
    serial, serial_end = os.pipe()
    terminals = Terminals(screen_end, serial_end)
    terminals.show("one\n", 0.0)
    terminals.show("one\n", 1.0)
    first = read_all(screen)
    assert first.count("one") == 1
    assert first.startswith(console.CLEAR)
    plain = read_all(serial)
    assert plain.count("one") == 1
    assert "\033" not in plain
    terminals.show("two\n", 2.0)
    terminals.show("three\n", 3.0)
    assert read_all(screen).count("\033[H") == 2
    assert read_all(serial) == ""  # too soon
    terminals.show("three\n", 10.0)
    assert "three" in read_all(serial)
    os.close(screen)
    terminals.show("four\n", 11.0)  # nobody there: no error
    for descriptor in (screen_end, serial, serial_end):
        os.close(descriptor)


def test_screen(node: Path) -> None:
    asked = []

    class Counting(Cache):
        def get(self) -> dict[str, object]:
            asked.append(1)
            found = super().get()
            self.seconds = 1.0
            return found

    screen = Screen(Counting(BAD))
    assert "starting" in screen.text(0)
    (node / "health_file").write_text(json.dumps(GOOD))
    (node / "login_file").write_text(json.dumps(LOGIN))
    text = screen.text(2)
    assert "healthy, 22 s" in text
    assert "one-time-secret" in text
    (node / "login_file").unlink()
    assert "one-time-secret" not in screen.text(4)
    assert asked == []
    assert "NOT HEALTHY" in screen.text(2 + console.PROBE_PAUSE)
    screen.text(40)  # probing takes a second, so the next one may wait half a minute
    assert len(asked) == 1
    screen.text(2 + console.PROBE_PAUSE + console.PROBE_SHARE)
    assert len(asked) == 2


# --- the whole daemon ------------------------------------------------------------------------------------------------


def test_passed_descriptors() -> None:
    environment = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "status:screen"}
    assert passed_descriptors(environment, 7) == {"status": 3, "screen": 4}
    assert passed_descriptors(environment, 8) == {}
    assert passed_descriptors({}, 8) == {}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The daemon as systemd starts it: the socket's path and the master side of its terminal."""
    path = str(tmp_path / "status.sock")
    master, slave = pty.openpty()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # systemd's way: descriptors from 3 on, and the id of the very process that gets them
        code = (
            "import os, sys\n"
            f"os.dup2({listener.fileno()}, 103); os.dup2({slave}, 104); os.dup2(103, 3); os.dup2(104, 4)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='status:screen')\n"
            f"sys.path.insert(0, {str(Path(console.__file__).parent.parent.parent)!r})\n"
            "from appliance.node.console import main\n"
            "sys.exit(main())\n"
        )
        argv = [sys.executable, "-I", "-S", "-c", code]
        with subprocess.Popen(argv, pass_fds=(listener.fileno(), slave)) as process:
            yield path, master
            process.send_signal(signal.SIGTERM)
    os.close(master)
    os.close(slave)


def exchange(path: str, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(request)
        data = b""
        while part := connection.recv(65536):
            data += part
        return data


def test_daemon(daemon: tuple[str, int]) -> None:
    path, master = daemon
    assert exchange(path, b"GET /alive HTTP/1.0\r\n\r\n").endswith(b"alive\n")
    with socket.socket(socket.AF_UNIX) as silent:  # one client that says nothing holds up nobody
        silent.connect(path)
        response = exchange(path, b"GET /status.json HTTP/1.1\r\nHost: x\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 503 ")  # there is no service that probes here
    assert json.loads(response.partition(b"\r\n\r\n")[2])["system"][0]["name"] == "health probes"
    deadline = time.monotonic() + 10
    shown = ""
    while "Log in" not in shown and time.monotonic() < deadline:
        shown += read_all(master)
        time.sleep(0.02)
    assert "Samepage appliance" in shown
    assert "starting" in shown


def test_daemon_must_be_started_by_systemd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert console.main() == 64
    assert "systemd must start this" in capsys.readouterr().err


# --- addresses -------------------------------------------------------------------------------------------------------


def test_addresses_of_this_machine() -> None:
    for address in REAL_ADDRESSES():
        socket.getaddrinfo(address, 1, flags=socket.AI_NUMERICHOST)
        assert not address.startswith(("127.", "fe80"))
    with addresses.watch_addresses() as news:
        assert news.getsockname()[1] == addresses.GROUPS


def message(address: bytes, scope: int = 0, family: int = socket.AF_INET) -> bytes:
    attribute = struct.pack("=HH", 4 + len(address), addresses.IFA_LOCAL) + address
    body = struct.pack("=BBBBI", family, 24, 0, scope, 2) + attribute
    return struct.pack("=IHHII", 16 + len(body), addresses.RTM_NEWADDR, 2, 1, 0) + body


def test_netlink_messages() -> None:
    done = struct.pack("=IHHII", 16, addresses.NLMSG_DONE, 2, 1, 0)
    data = message(b"\x0a\x00\x02\x0f") + message(b"\x7f\x00\x00\x01", scope=254)
    data += message(bytes(15) + b"\x01", family=socket.AF_INET6)
    assert addresses.parse_addresses(data) == (["10.0.2.15", "::1"], False)
    assert addresses.parse_addresses(data + done) == (["10.0.2.15", "::1"], True)
