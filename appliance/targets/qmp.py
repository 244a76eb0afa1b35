"""A small client of QEMU's machine protocol and of a serial console, both over unix sockets."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appliance.targets.base import NodeError


class EndedError(NodeError):
    """The virtual machine ended while it was talked to."""


class Qmp:
    """One connection to a running QEMU; use it as a context manager. Waits at most `timeout` seconds for an answer."""

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise NodeError(f"the virtual machine does not answer at {path}: {error.strerror}") from error
        self._received = b""
        self.events: list[dict[str, Any]] = []
        try:
            self._read()  # greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                raise NodeError("the virtual machine does not answer its control socket") from error
            if not data:
                raise EndedError("the virtual machine ended")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command and return its result. Raises NodeError with QEMU's own words when it fails."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise NodeError(f"the virtual machine refused {command}: {answer['error']['desc']}")
            else:
                return answer.get("return")

    def human(self, line: str) -> str:
        """Run a command of the human monitor; returns what it printed."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def next_event(self, name: str, timeout: float) -> dict[str, Any] | None:
        """The next event of that name, also one that came during earlier commands; None after `timeout` seconds."""
        for event in self.events:
            if event["event"] == name:
                self.events.remove(event)
                return event
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if b"\n" not in self._received and not select.select([self._socket], [], [], left)[0]:
                break
            message = self._read()
            if message.get("event") == name:
                return message
        return None


class Serial:
    """A person at the serial console: types, and waits for what appears."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self.seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def type(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def expect(self, pattern: str, timeout: float) -> re.Match[str]:
        """Wait until the pattern (a regular expression) appears in what was not matched before."""
        end = time.monotonic() + timeout
        while (found := re.search(pattern, self.seen)) is None:
            left = end - time.monotonic()
            self._socket.settimeout(max(left, 0.01))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                data = b""
            if not data and left <= 0.01:
                raise NodeError(
                    f"the console did not show {pattern!r} within {timeout:.0f} s; last:\n{self.seen[-2000:]}"
                )
            if not data and left > 0.01:
                time.sleep(0.05)
            self.seen += data.decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found
