"""The console's daemon: shows the node's state on tty1 and the serial line, and serves it on a unix socket.

systemd opens the terminals and the socket and hands them over by name, so the process needs no privilege at all.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping

from appliance.node import addresses, health, status

SCREEN, SERIAL, SOCKET = "screen", "serial", "status"
TICK = 2.0  # seconds between looks at the files
PROBE_PAUSE = 15.0  # least seconds between two health probes for the screen
PROBE_SHARE = 30  # and so many times as long as one takes: a slow machine is not kept busy by being watched
SERIAL_PAUSE = 10.0  # least seconds between two blocks on the serial line
REQUEST_BYTES = 8192
REQUEST_SECONDS = 5.0
CONNECTIONS = 16
CLEAR = "\033[0m\033[2J\033[3J\033[H"
RULE = "-" * status.WIDTH


def passed_descriptors(environment: Mapping[str, str], pid: int) -> dict[str, int]:
    """Descriptors that systemd handed over, by name."""
    if environment.get("LISTEN_PID") != str(pid):
        return {}
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    count = int(environment.get("LISTEN_FDS", "0"))
    return {name: 3 + index for index, name in enumerate(names[:count])}


# --- the socket ------------------------------------------------------------------------------------------------------


def parse_request(data: bytes) -> tuple[str, str, str]:
    """Method, path without query, and the Accept header. Raises ValueError."""
    lines = data.decode("latin-1").split("\r\n")
    method, target, version = lines[0].split(" ")
    if not version.startswith("HTTP/1.") or not target.startswith("/"):
        raise ValueError("no HTTP/1 request")
    headers = dict(line.lower().partition(":")[::2] for line in lines[1:] if line)
    return method, target.partition("?")[0], headers.get("accept", "").strip()


def wants_json(path: str, accept: str) -> bool:
    return path == "/status.json" or ("application/json" in accept and "text/html" not in accept)


def response(code: int, kind: str, body: str, *, head: bool = False) -> bytes:
    reason = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}.get(code, "Unavailable")
    data = body.encode()
    lines = [
        f"HTTP/1.1 {code} {reason}", f"Content-Type: {kind}; charset=utf-8", f"Content-Length: {len(data)}",
        "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close", "", "",
    ]
    return "\r\n".join(lines).encode() + (b"" if head else data)


def answer(data: bytes, cache: status.HealthCache) -> bytes:
    """The response to one request. /alive answers without probing anything: it is the console's own probe."""
    try:
        method, path, accept = parse_request(data)
    except ValueError:
        return response(400, "text/plain", "not a request\n")
    if method not in ("GET", "HEAD"):
        return response(405, "text/plain", "GET or HEAD\n")
    head = method == "HEAD"
    if path == "/alive":
        return response(200, "text/plain", "alive\n", head=head)
    if path not in ("/status", "/status/", "/status.json"):
        return response(404, "text/plain", "there are /status and /status.json\n", head=head)
    facts, found = status.node_facts(), cache.get()
    code = 200 if found.get("healthy") else 503
    if wants_json(path, accept):
        body = json.dumps(status.status_json(facts, found), indent=1) + "\n"
        return response(code, "application/json", body, head=head)
    return response(code, "text/html", status.status_page(facts, found), head=head)


def read_request(connection: socket.socket) -> bytes:
    """The head of a request, at most 8 KiB and 5 seconds of it. Raises OSError."""
    deadline = time.monotonic() + REQUEST_SECONDS
    data = b""
    while b"\r\n\r\n" not in data and len(data) < REQUEST_BYTES:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(REQUEST_BYTES - len(data))
        if not part:
            break
        data += part
    return data.partition(b"\r\n\r\n")[0]


def serve(listener: socket.socket, cache: status.HealthCache) -> None:
    """Answer requests for ever, each in a thread, a few at a time."""
    room = threading.BoundedSemaphore(CONNECTIONS)

    def handle(connection: socket.socket) -> None:
        try:
            with connection:
                connection.sendall(answer(read_request(connection), cache))
        except OSError:
            pass  # the client went away or sent nothing
        finally:
            room.release()

    while True:
        room.acquire()
        connection, _ = listener.accept()
        threading.Thread(target=handle, args=(connection,), daemon=True).start()


# --- the terminals ---------------------------------------------------------------------------------------------------


class Terminals:
    """Writes a text where it is shown, and only when it differs from what stands there."""

    def __init__(self, screen: int | None, serial: int | None) -> None:
        self._screen, self._serial = screen, serial
        self._on_screen = self._on_serial = ""
        self._serial_time = float("-inf")

    def show(self, text: str, now: float) -> None:
        """`now` is in seconds of any steady clock; the serial line waits 10 of them between blocks."""
        if self._screen is not None and text != self._on_screen:
            self._on_screen = text
            self._write(self._screen, CLEAR + "\n" + text)
        if self._serial is not None and text != self._on_serial and now - self._serial_time >= SERIAL_PAUSE:
            self._on_serial, self._serial_time = text, now
            self._write(self._serial, f"\n{RULE}\n{text}{RULE}\n".replace("\n", "\r\n"))

    @staticmethod
    def _write(descriptor: int, text: str) -> None:
        data = text.encode(errors="replace")
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            pass  # a serial port without hardware: there is nobody to tell


class Screen:
    """What the terminals show, from files that others write and from probes now and then."""

    def __init__(self, cache: status.HealthCache) -> None:
        self._cache = cache
        self._found: Mapping[str, object] = {}
        self._probed = float("-inf")
        self._stamps: tuple[int, ...] = ()
        self._text = ""

    def text(self, now: float, *, news: bool = False) -> str:
        """The present text; gathered again only when a file has changed, after `news`, or when a probing is due.

        The health is the boot's own result first, then that of a probing every now and then.
        """
        due = bool(self._found) and now - self._probed >= max(PROBE_PAUSE, PROBE_SHARE * self._cache.seconds)
        stamps = tuple(changed(file) for file in (health.HEALTH_FILE, status.LOGIN_FILE))
        if due:
            self._found, self._probed = self._cache.get(), now
        elif not self._found:
            self._found, self._probed = status.read_json(health.HEALTH_FILE), now
        if due or news or stamps != self._stamps or not self._text:
            self._stamps = stamps
            self._text = status.console_text(status.node_facts(), self._found, status.read_json(status.LOGIN_FILE))
        return self._text


def changed(file: str) -> int:
    """When a file was last written, in nanoseconds; 0 when it is not there."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0


def main() -> int:
    """The program; returns the exit status."""
    passed = passed_descriptors(os.environ, os.getpid())
    if SOCKET not in passed:
        print("samepage-console: systemd must start this and hand over its sockets", file=sys.stderr)
        return 64
    cache = status.HealthCache()
    listener = socket.socket(fileno=passed[SOCKET])
    listener.setblocking(True)
    threading.Thread(target=serve, args=(listener, cache), daemon=True).start()
    terminals, screen = Terminals(passed.get(SCREEN), passed.get(SERIAL)), Screen(cache)
    with addresses.watch_addresses() as watch:
        news = False
        while True:
            now = time.monotonic()
            terminals.show(screen.text(now, news=news), now)
            news = bool(select.select([watch], [], [], TICK)[0])
            if news:
                watch.recv(65536)
