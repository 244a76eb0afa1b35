"""The health probes against real sockets, servers and programs of this machine."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import health, probes
from appliance.node.probes import Probe, run_probe, run_probes

UP = {"up.service": ("active", "running"), "bad.service": ("failed", "failed"), "slow.service": ("activating", "start")}


def probe(kind: str, target: str, expect: str = "", timeout: float = 2.0) -> Probe:
    return Probe("r", "p", kind, target, expect, timeout)


def outcome(kind: str, target: str, expect: str = "", timeout: float = 2.0) -> tuple[bool, str]:
    found = run_probe(probe(kind, target, expect, timeout), UP)
    assert found.ms >= 0
    return found.ok, found.detail


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = int(self.path.strip("/") or "200")
        body = b"all is well\n"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def web() -> Iterator[int]:
    with served(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "self-signed.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
         "/CN=else", "-days", "2", "-keyout", file, "-out", file.with_suffix(".crt")], check=True, capture_output=True,
    )  # fmt: skip
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_http(web: int) -> None:
    url = f"http://127.0.0.1:{web}"
    assert outcome("http", f"{url}/") == (True, "status 200")
    assert outcome("http", f"{url}/204", "204") == (True, "status 204")
    assert outcome("http", f"{url}/200", "200 is well") == (True, "status 200")
    assert outcome("http", f"{url}/301", "301") == (True, "status 301")
    assert outcome("http", f"{url}/500") == (False, "status 500, 'all is well'; expected 2xx")
    assert outcome("http", f"{url}/200", "200 is ill")[0] is False
    assert outcome("http", f"http://127.0.0.1:{unused_port()}/") == (False, "Connection refused")
    assert outcome("http", "ftp://127.0.0.1/")[0] is False


def test_https_trusts_any_certificate_on_the_loopback_only(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with served(server) as port:
        assert outcome("http", f"https://localhost:{port}/") == (True, "status 200")
        monkeypatch.setattr(probes, "LOOPBACK", ())
        monkeypatch.setattr(server, "handle_error", lambda *_: None)
        ok, detail = outcome("http", f"https://127.0.0.1:{port}/")
        assert not ok
        assert "certificate verify failed" in detail.lower() or "CERTIFICATE_VERIFY_FAILED" in detail


def test_http_over_a_unix_socket(tmp_path: Path) -> None:
    class Unix(ThreadingHTTPServer):
        address_family = socket.AF_UNIX

        def server_bind(self) -> None:
            self.socket.bind(self.server_address)

        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            return self.socket.accept()[0], ("local", 0)

    path = str(tmp_path / "s")
    with served(Unix(path, Handler)):
        assert outcome("http", f"http+unix://{path}:/200", "200") == (True, "status 200")
        assert outcome("http", f"http+unix://{path}") == (True, "status 200")
        assert outcome("unix", path) == (True, "accepts")
    assert outcome("unix", path) == (False, "Connection refused")
    assert outcome("unix", str(tmp_path / "none")) == (False, "No such file or directory")


@contextmanager
def answering(reply: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server that does with each connection what `reply` does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                with suppress(OSError):
                    reply(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        connection.sendall(b".")
        time.sleep(0.05)


def test_a_server_that_misbehaves() -> None:
    with answering(lambda connection: connection.recv(10000)) as port:
        assert outcome("http", f"http://127.0.0.1:{port}/") == (False, "closed without a response")
    with answering(lambda connection: connection.sendall(b"220 mail here\r\n\r\n")) as port:
        assert outcome("http", f"http://127.0.0.1:{port}/")[0] is False
    for reply in (drip, lambda connection: connection.recv(10000) and time.sleep(2)):
        with answering(reply) as port:
            started = time.monotonic()
            assert outcome("http", f"http://127.0.0.1:{port}/", timeout=0.3) == (False, "no answer within 0.3 s")
            assert time.monotonic() - started < 1.5


def test_tcp(web: int) -> None:
    assert outcome("tcp", f"127.0.0.1:{web}") == (True, "accepts")
    assert outcome("tcp", f"localhost:{unused_port()}") == (False, "Connection refused")
    assert outcome("tcp", "127.0.0.1") == (False, "'127.0.0.1' is no host:port")
    assert outcome("tcp", "127.0.0.1:99999")[0] is False


def test_command(tmp_path: Path) -> None:
    assert outcome("command", "echo one; echo two") == (True, "two")
    assert outcome("command", "true") == (True, "done")
    assert outcome("command", "echo ready", "ready") == (True, "ready")
    assert outcome("command", "echo no", "ready") == (False, "printed 'no'; expected 'ready'")
    assert outcome("command", "echo broken >&2; exit 3") == (False, "status 3: broken")
    mark = tmp_path / "mark"
    started = time.monotonic()
    assert outcome("command", f"(sleep 1; touch {mark}) & sleep 30", timeout=0.2) == (False, "no answer within 0.2 s")
    assert time.monotonic() - started < 0.9
    time.sleep(1.2)
    assert not mark.exists()  # the whole group was ended


def test_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome("unit", "up.service") == (True, "active (running)")
    assert outcome("unit", "slow.service") == (False, "activating (start)")
    failed = run_probe(probe("unit", "bad.service"), UP)
    assert (failed.ok, failed.fatal) == (False, True)
    monkeypatch.setattr(probes, "output_of", lambda _argv: "active\nexited\n")
    assert outcome("unit", "alias.service") == (True, "active (exited)")


@pytest.mark.parametrize(
    ("answer", "ok"),
    [
        ("ConditionResult=no\nConditionTimestampMonotonic=81234\n", True),  # asked for, and left out
        ("ConditionResult=no\nConditionTimestampMonotonic=0\n", False),  # never asked for
        ("ConditionResult=yes\nConditionTimestampMonotonic=81234\n", False),  # ran, and stopped
    ],
)
def test_unit_left_out_by_its_own_conditions(monkeypatch: pytest.MonkeyPatch, answer: str, ok: bool) -> None:
    monkeypatch.setattr(probes, "output_of", lambda _argv: answer)
    found = run_probe(probe("unit", "clock.service"), {"clock.service": ("inactive", "dead")})
    assert (found.ok, found.fatal) == (ok, False)


def test_list_of_units() -> None:
    listing = "\N{BLACK CIRCLE} bad.service loaded failed failed Some thing\n"
    listing += "  up.service loaded active running Words here\nx\n\n"
    assert probes.parse_units(listing) == {"bad.service": ("failed", "failed"), "up.service": ("active", "running")}
    assert health.failed_units({**UP, health.SELF_UNIT: ("failed", "failed")}) == ["bad.service"]


def test_probes_run_at_the_same_time() -> None:
    group = [probe("command", "sleep 0.5") for _ in range(8)]
    started = time.monotonic()
    assert all(found.ok for found in run_probes(group, {}))
    assert time.monotonic() - started < 2


# --- parsing ---------------------------------------------------------------------------------------------------------


@given(st.binary())
def test_any_response_is_understood_or_refused(data: bytes) -> None:
    try:
        status, _ = probes.parse_response(data)
    except OSError:
        return
    assert 0 <= status <= 999


@given(st.integers(100, 599), st.text())
def test_responses(status: int, body: str) -> None:
    data = f"HTTP/1.1 {status} Some Reason\r\nX: y\r\n\r\n".encode() + body.encode(errors="replace")
    assert probes.parse_response(data) == (status, body.encode(errors="replace").decode())


@given(st.text())
def test_any_address_is_understood_or_refused(text: str) -> None:
    try:
        _, port = probes.split_address(text)
    except OSError:
        return
    assert 0 <= port < 65536


@pytest.mark.parametrize(
    ("text", "expected"),
    [("localhost:80", ("localhost", 80)), ("[::1]:443", ("::1", 443)), ("[::1]", ("::1", 80)), ("host", ("host", 80))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert probes.split_address(text, 80) == expected


@given(st.text())
def test_any_url_is_understood_or_refused(url: str) -> None:
    try:
        scheme, _, path = probes.split_url(url)
    except OSError:
        return
    assert scheme in ("http", "https", "http+unix")
    assert path.startswith("/") or scheme == "http+unix"


def test_urls() -> None:
    assert probes.split_url("https://h:1/a?b=/c") == ("https", "h:1", "/a?b=/c")
    assert probes.split_url("http://h?b") == ("http", "h", "/?b")
    assert probes.split_url("http+unix:///run/x.sock:/a") == ("http+unix", "/run/x.sock", "/a")


@given(st.lists(st.sampled_from(["--json", "--wait", "5", "-1", "nan", "inf", "--boot", "nginx", "--wait=2", ""])))
def test_any_command_line_is_understood_or_refused(words: list[str]) -> None:
    try:
        arguments = health.Arguments(words)
    except health.UsageError:
        return
    assert 0 <= arguments.wait < 1e9


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "health.d").mkdir()
    return tmp_path / "health.d"


def write(folder: Path, recipe: str, *entries: dict[str, object]) -> None:
    content = {"recipe": recipe, "probes": list(entries), "needs": []}
    (folder / f"{recipe}.json").write_text(json.dumps(content))


def command(name: str, target: str) -> dict[str, object]:
    return {"name": name, "kind": "command", "target": target, "expect": "", "timeout": 2}


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[str, str]]:
    """The states of a made-up service manager; journalctl gives one line per unit."""
    states = {"up.service": ("active", "running")}

    def output_of(argv: list[str], timeout: float = 1.0) -> str:
        assert timeout
        return "" if "_PID=1" in argv else f"line of {argv[-1]}\n"

    monkeypatch.setattr(health, "unit_states", lambda: dict(states))
    monkeypatch.setattr(health, "output_of", output_of)
    monkeypatch.setattr(health, "in_container", lambda: False)
    taint = tmp_path / "tainted"
    taint.write_text("0\n")
    monkeypatch.setattr(health.kernel_taint, "__defaults__", (str(taint),))
    return states


def run(folder: Path, *words: str) -> int:
    above = folder.parent
    return health.main(words, folder=str(folder), file=str(above / "health.json"), node_file=str(above / "node.json"))


def test_healthy(folder: Path, manager: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert manager
    write(folder, "a", command("one", "true"), {"name": "two", "kind": "unit", "target": "up.service"})
    write(folder, "b")
    assert run(folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    assert found["boot_seconds"] is None
    assert found["recipes"]["b"] == {"healthy": True, "probes": []}
    assert [entry["ok"] for entry in found["recipes"]["a"]["probes"]] == [True, True]
    assert [entry["name"] for entry in found["system"]] == ["no failed unit", "no ordering cycle", "no kernel taint"]
    assert run(folder) == 0
    assert capsys.readouterr().out.endswith("\nhealthy\n")


def test_not_healthy(folder: Path, manager: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    manager["bad.service"] = ("failed", "failed")
    manager["off.service"] = ("inactive", "dead")
    write(folder, "a", command("one", "exit 7"), {"name": "two", "kind": "unit", "target": "off.service"})
    write(folder, "b", command("one", "true"))
    units = {"worker.service": {"recipe": "a"}, "off.service": {"recipe": "a"}, "fine.service": {"recipe": "b"}}
    (folder.parent / "node.json").write_text(json.dumps({"units": units}))
    assert run(folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"]
    assert found["hopeless"]
    assert found["recipes"]["b"]["healthy"]
    assert found["recipes"]["a"]["probes"][0]["detail"] == "status 7"
    blamed = ["bad.service", "off.service", "worker.service"]
    assert found["journal"] == {unit: [f"line of {unit}"] for unit in blamed}
    assert run(folder, "b") == 0  # the node as a whole is not asked for then
    assert run(folder) == 1
    assert "  | line of bad.service" in capsys.readouterr().out


def test_waits_until_healthy(folder: Path, manager: dict[str, tuple[str, str]]) -> None:
    manager["late.service"] = ("activating", "start")
    mark = folder.parent / "mark"
    write(folder, "a", command("one", f"test -e {mark}"), {"name": "two", "kind": "unit", "target": "late.service"})

    def begin() -> None:
        mark.touch()
        manager["late.service"] = ("active", "running")

    timer = threading.Timer(0.5, begin)
    timer.start()
    started = time.monotonic()
    assert run(folder, "--wait", "20", "--boot") == 0
    assert 0.4 < time.monotonic() - started < 5
    timer.join()
    record = json.loads((folder.parent / "health.json").read_text())
    assert record["healthy"]
    assert 0 < record["boot_seconds"] <= time.clock_gettime(time.CLOCK_MONOTONIC) + 0.01
    assert (folder.parent / "health.json").stat().st_mode & 0o777 == 0o644


def test_waits_no_longer_than_told(folder: Path, manager: dict[str, tuple[str, str]]) -> None:
    assert manager
    write(folder, "a", command("one", "false"))
    started = time.monotonic()
    assert run(folder, "--wait=0.5", "--boot") == 1
    assert 0.5 <= time.monotonic() - started < 3
    assert json.loads((folder.parent / "health.json").read_text())["boot_seconds"] is None


@pytest.mark.parametrize(("late", "connections"), [(False, 1), (True, 2)])
def test_what_was_asked_for_just_now_is_not_asked_again(
    folder: Path, manager: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, late: bool, connections: int
) -> None:
    """A node that is found ready is asked once; what accepted before the rest was ready, again with all the others."""
    states = [("activating", "start")] if late else []

    def unit_states() -> dict[str, tuple[str, str]]:
        return {**manager, "late.service": states.pop() if states else ("active", "running")}

    monkeypatch.setattr(health, "unit_states", unit_states)
    late_unit = {"name": "two", "kind": "unit", "target": "late.service"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = f"127.0.0.1:{server.getsockname()[1]}"
        write(folder, "a", {"name": "one", "kind": "tcp", "target": target}, late_unit)
        assert run(folder, "--wait", "20") == 0
        for _ in range(connections):
            server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_failed_unit_ends_the_wait(folder: Path, manager: dict[str, tuple[str, str]]) -> None:
    manager["bad.service"] = ("activating", "start")
    write(folder, "a", {"name": "two", "kind": "unit", "target": "bad.service"})
    timer = threading.Timer(0.3, lambda: manager.update({"bad.service": ("failed", "failed")}))
    timer.start()
    started = time.monotonic()
    assert run(folder, "--wait", "60") == 1
    assert time.monotonic() - started < 10
    timer.join()


def test_ordering_cycle_and_taint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cycle = "x.service: Found ordering cycle on y.service/start"
    monkeypatch.setattr(health, "output_of", lambda _argv: f"a warning\n{cycle}\n")
    found = health.ordering_cycle()
    assert (found.ok, found.detail) == (False, cycle)
    (tmp_path / "tainted").write_text("4096\n")
    found = health.kernel_taint(str(tmp_path / "tainted"))
    assert (found.ok, found.detail) == (False, "taint 4096")


def test_without_a_service_manager(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_manager() -> dict[str, tuple[str, str]]:
        raise OSError("systemctl: no bus")

    monkeypatch.setattr(health, "unit_states", no_manager)
    write(folder, "a", command("one", "true"))
    assert run(folder, "--json") == 1
    assert json.loads(capsys.readouterr().out)["system"][0]["detail"] == "systemctl: no bus"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wait"], "needs a number"), (["--wait", "soon"], "'soon' is no number"), (["--wait=-1"], "no number"),
        (["--verbose"], "unknown option --verbose"), (["nginy"], "no recipe 'nginy' on this node; there are: a"),
    ],
)  # fmt: skip
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    write(folder, "a", command("one", "true"))
    assert run(folder, *words) == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"recipe": "a"}', '{"recipe": "a", "probes": [{}]}', '{"recipe": "a", "probes": ["x"]}',
     '{"recipe": "a", "probes": [{"name": "n", "kind": "smell", "target": "t"}]}',
     '{"recipe": "a", "probes": [{"name": "n", "kind": "tcp", "target": "t", "timeout": "x"}]}'],
)  # fmt: skip
def test_a_broken_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "a.json").write_text(text)
    assert run(folder) == 64
    assert "a.json is not a list of probes" in capsys.readouterr().err


def test_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--help") == 0
    assert "example: samepage-health" in capsys.readouterr().out


def test_programs(tmp_path: Path) -> None:
    assert probes.output_of(["echo", "x"]) == "x\n"
    for argv in (["false"], [str(tmp_path / "none")], ["sh", "-c", "echo bad >&2; exit 1"]):
        with pytest.raises(OSError, match=r"status 1|No such file|bad"):
            probes.output_of(argv)
    with pytest.raises(OSError, match=r"longer than 0\.1 s"):
        probes.output_of(["sleep", "5"], timeout=0.1)


def test_seconds_since_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "in_container", lambda: True)
    assert 0 < health.seconds_since_boot() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_starts_without_slow_imports() -> None:
    """What takes long to import on an emulated CPU must not come back unnoticed."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import appliance.node.health; print(*sys.modules)"
    root = str(Path(health.__file__).parent.parent.parent)
    argv = ["python3", "-I", "-S", "-c", code, root]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    slow = {"asyncio", "ssl", "argparse", "pathlib", "http.client", "email", "typing", "dataclasses", "logging"}
    assert not slow & set(loaded)


