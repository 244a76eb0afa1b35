"""The kinds of health probes: unit, http, tcp, unix and command.

Imports are kept few and late, also pathlib's: on an emulated CPU each costs a noticeable part of a second.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

KINDS = ("unit", "http", "tcp", "unix", "command")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAGE_BYTES = 65536


class ProbeError(Exception):
    """A probe is not described as it must be."""


class Probe:
    """One probe of one recipe; `target` is the unit, URL, host:port, socket path or command line, by `kind`."""

    __slots__ = ("expect", "kind", "name", "recipe", "target", "timeout")

    def __init__(self, recipe: str, name: str, kind: str, target: str, expect: str = "", timeout: float = 5.0) -> None:
        if kind not in KINDS:
            raise ProbeError(f"{recipe}: probe {name!r} is of kind {kind!r}; known: {', '.join(KINDS)}")
        self.recipe, self.name, self.kind = recipe, name, kind
        self.target, self.expect, self.timeout = target, expect, float(timeout)


class Outcome:
    """What one probe found; `fatal` means that waiting cannot mend it."""

    __slots__ = ("detail", "fatal", "ms", "name", "ok")

    def __init__(self, name: str, ok: bool, detail: str, ms: float = 0.0, fatal: bool = False) -> None:
        self.name, self.ok, self.detail, self.ms, self.fatal = name, ok, detail, ms, fatal

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "ms": round(self.ms, 1)}


# --- units -----------------------------------------------------------------------------------------------------------


def output_of(argv: Sequence[str], timeout: float = 20.0) -> str:
    """Standard output of a program. Raises OSError when it cannot be run, ends badly or overruns `timeout` seconds."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{argv[0]} took longer than {timeout:g} s") from error
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{argv[0]}: {message[-1] if message else f'status {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def parse_units(listing: str) -> dict[str, tuple[str, str]]:
    """(active state, sub state) per unit from `systemctl list-units --plain --no-legend`."""
    states: dict[str, tuple[str, str]] = {}
    for line in listing.splitlines():
        words = line.lstrip("\N{BLACK CIRCLE}* ").split(None, 4)
        if len(words) >= 4:
            states[words[0]] = (words[2], words[3])
    return states


def unit_states() -> dict[str, tuple[str, str]]:
    """State of every unit that systemd has loaded: one question answers all unit probes."""
    options = ["--all", "--full", "--plain", "--no-legend", "--no-pager"]
    return parse_units(output_of(["systemctl", "list-units", *options]))


def probe_unit(probe: Probe, states: Mapping[str, tuple[str, str]]) -> tuple[bool, str, bool]:
    state = states.get(probe.target)
    if state is None:  # not loaded, or the probe uses an alias of the unit
        words = output_of(["systemctl", "show", "-p", "ActiveState", "-p", "SubState", "--value", probe.target]).split()
        state = (words[0], words[1]) if len(words) == 2 else ("unknown", "unknown")
    active, sub = state
    if active == "inactive" and not_for_this_machine(probe.target):
        return True, "its conditions leave it out here", False
    return active in ("active", "reloading"), f"{active} ({sub})", active == "failed"


def not_for_this_machine(unit: str) -> bool:
    """Whether systemd was asked to start the unit and its own conditions said no, as for the clock in a container."""
    words = output_of(["systemctl", "show", "-p", "ConditionResult", "-p", "ConditionTimestampMonotonic", unit]).split()
    known = dict(word.partition("=")[::2] for word in words)
    return known.get("ConditionResult") == "no" and known.get("ConditionTimestampMonotonic", "0") != "0"


# --- connections -----------------------------------------------------------------------------------------------------


def split_address(text: str, port: int = 0) -> tuple[str, int]:
    """Host and port of `host:port`, `[v6]:port` or, with a default `port`, only `host`. Raises OSError otherwise."""
    host, bracket, rest = text[1:].partition("]") if text.startswith("[") else ("", "", "")
    if not bracket:
        host, colon, number = text.rpartition(":")
        if not colon:
            host, number = text, ""
    else:
        number = rest.removeprefix(":")
    if number.isascii() and number.isdigit() and int(number) < 65536:
        return host, int(number)
    if number or not port or not host:
        raise OSError(f"{text!r} is no host:port")
    return host, port


def connect_unix(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def probe_unix(probe: Probe) -> str:
    connect_unix(probe.target, probe.timeout).close()
    return "accepts"


def probe_tcp(probe: Probe) -> str:
    socket.create_connection(split_address(probe.target), probe.timeout).close()
    return "accepts"


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, place (host[:port] or socket path) and request target of an http, https or http+unix URL."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in ("http", "https", "http+unix"):
        raise OSError(f"{url!r} is no http, https or http+unix URL")
    if scheme == "http+unix":
        place, _, path = rest.partition(":")
        return scheme, place, path or "/"
    end = min((at for at in (rest.find("/"), rest.find("?")) if at >= 0), default=len(rest))
    path = rest[end:]
    return scheme, rest[:end], path if path.startswith("/") else "/" + path


def parse_response(data: bytes) -> tuple[int, str]:
    """Status and body of an HTTP response. Raises OSError when it is none."""
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or len(words[1]) != 3 or not words[1].isdigit():
        raise OSError("no HTTP response" if data else "closed without a response")
    return int(words[1]), body.decode(errors="replace")


def fetch(url: str, timeout: float, accept: str = "*/*") -> tuple[int, str]:
    """Status and the first 64 KiB of the body. A certificate is trusted unseen on the loopback only."""
    deadline = time.monotonic() + timeout
    scheme, place, path = split_url(url)
    if scheme == "http+unix":
        connection, host = connect_unix(place, timeout), "localhost"
    else:
        address = split_address(place, 443 if scheme == "https" else 80)
        connection, host = socket.create_connection(address, timeout), place
        if scheme == "https":
            import ssl  # 13 ms on a fast machine: only where it is used

            if address[0] in LOOPBACK:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            else:
                context = ssl.create_default_context()
            connection = context.wrap_socket(connection, server_hostname=address[0])
    with connection:
        request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: {accept}\r\nUser-Agent: samepage-health\r\n\r\n"
        connection.sendall(request.encode())
        data = bytearray()
        while len(data) < PAGE_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            connection.settimeout(left)
            part = connection.recv(PAGE_BYTES)
            if not part:
                break
            data += part
    return parse_response(bytes(data))


def matches(expect: str, status: int, body: str) -> bool:
    """`expect` is empty (any 2xx), a status, or a status and a text that the body must hold."""
    wanted, _, text = expect.partition(" ")
    return (str(status) == wanted if wanted else 200 <= status < 300) and text in body


def probe_http(probe: Probe) -> str:
    status, body = fetch(probe.target, probe.timeout)
    if not matches(probe.expect, status, body):
        first = body.strip().splitlines()
        raise OSError(f"status {status}{f', {first[0][:120]!r}' if first else ''}; expected {probe.expect or '2xx'}")
    return f"status {status}"


def probe_command(probe: Probe) -> str:
    import signal

    with subprocess.Popen(
        ["/bin/sh", "-c", probe.target], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output = process.communicate(timeout=probe.timeout)[0].decode(errors="replace").strip()
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError("timed out") from error
            raise
    last = output.splitlines()[-1][:200] if output else ""
    if process.returncode != 0:
        raise OSError(f"status {process.returncode}{f': {last}' if last else ''}")
    if probe.expect not in output:
        raise OSError(f"printed {last!r}; expected {probe.expect!r}")
    return last or "done"


# --- one round -------------------------------------------------------------------------------------------------------


def run_probe(probe: Probe, states: Mapping[str, tuple[str, str]]) -> Outcome:
    """Run one probe; whatever goes wrong is its detail."""
    started = time.monotonic()
    ok, detail, fatal = False, "", False
    try:
        if probe.kind == "unit":
            ok, detail, fatal = probe_unit(probe, states)
        else:
            run = {"http": probe_http, "tcp": probe_tcp, "unix": probe_unix, "command": probe_command}[probe.kind]
            ok, detail = True, run(probe)
    except TimeoutError:
        detail = f"no answer within {probe.timeout:g} s"
    except (OSError, ValueError) as error:
        detail = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return Outcome(probe.name, ok, detail, (time.monotonic() - started) * 1000, fatal)


def run_probes(probes: Sequence[Probe], states: Mapping[str, tuple[str, str]]) -> list[Outcome]:
    """All outcomes in the order of `probes`. A probe that outlives its own timeout is given up, and its thread left."""
    found: list[Outcome | None] = [None] * len(probes)

    def work(index: int) -> None:
        found[index] = run_probe(probes[index], states)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(probes))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for probe, thread in zip(probes, threads, strict=True):
        thread.join(max(0.0, started + probe.timeout + 2.0 - time.monotonic()))
    return [
        outcome or Outcome(probe.name, False, f"gave no result within {probe.timeout:g} s", probe.timeout * 1000)
        for probe, outcome in zip(probes, found, strict=True)
    ]
