"""Where a tree stands while it is built: in memory where that is plentiful, which takes half the time of a disk."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appliance.run import run
from appliance.store import remove

RAM = Path("/dev/shm")
RAM_NEEDED = 3_000_000_000  # bytes: the tree, the packages, and room to breathe


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder in memory, or in TMPDIR where that is set or memory is short; gone at the end.

    What killed builds left is removed first: nobody holds the lock in it any more.
    """
    base = _work_base()
    prefix = f"samepage-build-{os.geteuid()}-"
    for leftover in base.glob(prefix + "*"):
        with suppress(OSError), _locked(leftover):
            _remove_tree(leftover)
    new = Path(tempfile.mkdtemp(prefix="samepage-new-", dir=base))
    new.chmod(0o755)  # the namespace's root must get through
    with _locked(new):  # before it has the name by which others look for leftovers
        folder = new.rename(base / (prefix + new.name.rpartition("-")[2]))
        try:
            yield folder
        finally:
            _remove_tree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself; raises BlockingIOError when another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _work_base() -> Path:
    if chosen := os.environ.get("TMPDIR"):
        return Path(chosen)
    in_ram = os.access(RAM, os.W_OK) and min(shutil.disk_usage(RAM).free, _available_memory()) > RAM_NEEDED
    return RAM if in_ram else Path("/tmp")


def _available_memory() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def _remove_tree(folder: Path) -> None:
    """Remove a work folder; what the namespace's users own is emptied in the namespace."""
    for tree in folder.glob("mmdebstrap.*"):
        if tree.stat().st_uid != os.geteuid():
            run(["mmdebstrap", "--unshare-helper", "find", tree, "-mindepth", "1", "-xdev", "-delete"], check=False)
    remove(folder)
