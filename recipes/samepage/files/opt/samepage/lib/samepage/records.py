"""The record that every API call leaves, and the spool that holds the records in bounded space.

The format is documented in docs/api-call-records.md; a test compares it with that page.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from .clock import utc_now

FORMAT = 1
CURRENT = "calls.jsonl"
MIDST = 0.05  # seconds in which a line that crosses two pages is surely written
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One API call. Times in milliseconds; `outcome` is 0 or the JSON-RPC error code; field order is the file's."""

    at: str
    id: str
    method: str
    group: str
    release: str
    variants: dict[str, str]
    outcome: int
    real_ms: float
    cpu_ms: float
    db_ms: float
    statements: int
    transactions: int

    def line(self) -> bytes:
        return json.dumps({"v": FORMAT, **asdict(self)}, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


class Spool:
    """JSON lines in `folder`: the current file, and finished ones named after the moment of their rotation.

    A file is finished at `file_bytes`; at most `files` finished ones are kept, so the folder never holds more than
    `file_bytes * (files + 1)` bytes. Each record is one write to a file opened for appending, so records of several
    writers do not mix. A record that cannot be written is counted in `lost`: no call fails for its record.
    """

    def __init__(self, folder: Path, *, file_bytes: int, files: int, clock: Callable[[], datetime] = utc_now) -> None:
        self.lost = 0
        self._folder = folder
        self._file_bytes = file_bytes
        self._files = files
        self._clock = clock
        self._descriptor = -1
        self._size = 0

    def write(self, record: CallRecord) -> None:
        line = record.line()
        try:
            if self._descriptor < 0:
                self._open()
            if self._size and self._size + len(line) > self._file_bytes:
                self._rotate()
            written = os.write(self._descriptor, line)
            self._size += written
            if written != len(line):  # a full disk: end the torn line, so that it spoils no other record
                self.lost += 1
                self._size += os.write(self._descriptor, b"\n")
        except OSError as error:
            if not self.lost:
                _log.warning("call records are lost: %s", error)
            self.lost += 1

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / CURRENT, flags, 0o640)
        if self._ends_torn():
            time.sleep(MIDST)
            if self._ends_torn():  # still: by a power cut, and not by another writer in the midst of its line
                os.write(self._descriptor, b"\n")
        self._size = os.fstat(self._descriptor).st_size

    def _ends_torn(self) -> bool:
        size = os.fstat(self._descriptor).st_size
        return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def _rotate(self) -> None:
        self.close()
        moment = self._clock().astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        (self._folder / CURRENT).rename(self._folder / f"calls-{moment}.jsonl")
        finished = sorted(self._folder.glob("calls-*.jsonl"))
        for old in finished[: max(0, len(finished) - self._files)]:
            old.unlink(missing_ok=True)
        self._open()
