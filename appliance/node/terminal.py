"""Talks to whoever sits at the machine, on every console at once. Part of the node's code."""

from __future__ import annotations

import os
import select
import termios
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple


class Terminal(NamedTuple):
    """Pairs of open descriptors (read, write). What is said goes to all of them; the first line typed is the answer."""

    pairs: tuple[tuple[int, int], ...]

    @staticmethod
    def of_process() -> Terminal:
        return Terminal(((0, 1),))

    @staticmethod
    def of_machine(devices: Sequence[str] = ("/dev/tty1", "/dev/ttyS0")) -> Terminal:
        """The screen and the first serial port, where they exist; otherwise the kernel's console."""
        found = []
        for device in devices:
            with suppress(OSError, termios.error):
                descriptor = os.open(device, os.O_RDWR | os.O_NOCTTY)
                termios.tcgetattr(descriptor)  # fails for a serial port that is not there
                found.append((descriptor, descriptor))
        return Terminal(tuple(found)) if found else Terminal.of_process()

    def say(self, text: str) -> None:
        self._write(f"{text}\n".encode())

    def ask(self, question: str) -> str:
        """The first line that somebody types on any console; empty when all consoles are closed.

        What a terminal received before the question was no answer to it, and is forgotten.
        """
        readers = [reader for reader, _ in self.pairs]
        for reader in readers:
            with suppress(termios.error):  # a pipe
                termios.tcflush(reader, termios.TCIFLUSH)
        self._write(question.encode())
        while readers:
            for reader in select.select(readers, [], [])[0]:
                try:
                    line = os.read(reader, 4096)
                except OSError:
                    line = b""
                if line:
                    return line.decode(errors="replace").rstrip("\r\n")
                readers.remove(reader)
        return ""

    def _write(self, data: bytes) -> None:
        for _, writer in self.pairs:
            with suppress(OSError):
                os.write(writer, data)
