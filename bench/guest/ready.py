"""Runs inside the untuned Debian VM: waits until every service answers and reports the times on the serial console.

Each probe is one connection and one short exchange, the least that proves that the service does its work.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

INTERVAL = 0.25  # s between rounds
SETTLE = 30.0  # s from the last service's readiness until the memory is read


def talk(address: tuple[str, int] | str, say: bytes, want: bytes) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(address)
        connection.sendall(say)
        return want in connection.recv(256)


def postgresql() -> bool:
    """Any answer but "starting up" (57P03) to a start-up packet means that the server takes connections."""
    body = struct.pack("!I", 196608) + b"user\0postgres\0database\0postgres\0\0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect("/run/postgresql/.s.PGSQL.5432")
        connection.sendall(struct.pack("!I", len(body) + 4) + body)
        answer = connection.recv(512)
    return bool(answer) and b"57P03" not in answer


PROBES: dict[str, Callable[[], bool]] = {
    "nginx": lambda: talk(("127.0.0.1", 80), b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
    "postgresql": postgresql,
    "valkey": lambda: talk(("127.0.0.1", 6379), b"PING\r\n", b"+PONG"),
    "postfix": lambda: talk(("127.0.0.1", 25), b"", b"220 "),
    "ssh": lambda: talk(("127.0.0.1", 22), b"", b"SSH-"),
}


def uptime() -> float:
    """Seconds since the kernel started its clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def say(word: str, value: dict[str, float]) -> None:
    """One line on the serial console, opened anew each time because the login prompt hangs up all who have it open."""
    with Path("/dev/ttyS0").open("w") as console:
        print(f"\n{word} {json.dumps(value)}", file=console, flush=True)


def main() -> None:
    ready: dict[str, float] = {"probing": round(uptime(), 2)}
    waiting = dict(PROBES)
    while waiting:
        for name, probe in list(waiting.items()):
            try:
                if probe():
                    ready[name] = round(uptime(), 2)
                    del waiting[name]
            except OSError:
                pass
        time.sleep(INTERVAL if waiting else 0)
    say("BENCH-READY", {"healthy": round(uptime(), 2), **ready})
    time.sleep(SETTLE)
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    say("BENCH-MEMORY", {"used": (kib["MemTotal"] - kib["MemAvailable"]) * 1024})


main()
