"""Waits until files below some folders change: by looking at their times, which costs milliseconds and no library."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from appliance.sources import ASIDE

Snapshot = Mapping[str, tuple[int, int, int, int]]
"""Time of change, size, mode and inode of every file, by path."""

PAUSE = 0.25  # seconds between two looks
QUIET = 0.1  # seconds without a change after which an editor is taken to be done


def snapshot(folders: Iterable[Path]) -> Snapshot:
    """How the files look now. A folder that is missing is empty."""
    found: dict[str, tuple[int, int, int, int]] = {}
    waiting = [str(folder) for folder in folders]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # it was removed meanwhile
            continue
        for entry in entries:
            if ASIDE.fullmatch(entry.name):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    status = entry.stat(follow_symlinks=False)
                    found[entry.path] = status.st_mtime_ns, status.st_size, status.st_mode, status.st_ino
            except OSError:
                continue
    return found


def wait_for_change(
    folders: Iterable[Path], before: Snapshot, idle: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:  # fmt: skip
    """Wait until the folders look other than `before` and are quiet again; returns the paths that changed, sorted.

    `idle` is called before each look.
    """
    folders = tuple(folders)
    now, last = snapshot(folders), before
    while now == before or now != last:
        idle()
        sleep(PAUSE if now == before else QUIET)
        now, last = snapshot(folders), now
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
