"""Wall time, CPU time and sizes of programs and of what they write."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp


class BenchError(Exception):
    """A benchmark could not be carried out; the message says which program or file was the cause."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took: `wall` and `cpu` (user and system of the whole process tree) in seconds, and the most `memory`
    (resident, in bytes) that the program itself had, without its children; 0 where it was not looked at.
    """

    wall: float
    cpu: float
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu, max(self.memory, other.memory))


def measure(
    argv: Sequence[str | Path],
    *,
    log: Path,
    output: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> Cost:
    """Run a program to its end and account for it and every descendant that was waited for.

    What it prints goes to `log`, its standard output to `output` where that is given; `env` is added to the
    environment; `timeout` is in seconds. Raises BenchError when the program is missing, fails, or overruns its time
    (its whole process group is then killed).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in argv]
    with log.open("wb") as messages, output.open("wb") if output else nullcontext(messages) as results:
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                words, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                stdout=results, stderr=messages, start_new_session=True,
            )
        except FileNotFoundError as error:
            raise BenchError(f"the program {words[0]!r} is missing") from error
        try:
            status, usage, memory = _wait(process, started + timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join("  | " + line for line in log.read_text(errors="replace").splitlines()[-15:])
        raise BenchError(f"status {process.returncode} of: {' '.join(words)}\n{tail}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, memory)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, resource.struct_rusage, int]:
    """os.wait4 with a deadline, precise to 5 ms or 1 %; with the peak of memory, which wait4 would mix with our own."""
    memory, started = 0, time.monotonic()
    while True:
        memory = max(memory, peak_memory(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return status, usage, memory
        if time.monotonic() > deadline:
            raise BenchError(f"not finished in its time: {process.args!r}")
        time.sleep(min(0.1, max(0.005, (time.monotonic() - started) / 100)))


def peak_memory(pid: int) -> int:
    """The most bytes that a running process had in memory so far; 0 once it has ended."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def cpu_of(pid: int) -> float:
    """User and system seconds that a running process has used. Raises BenchError when it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError as error:
        raise BenchError(f"the process {pid} has ended") from error
    fields = text.rpartition(")")[2].split()  # the name, in parentheses, may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk_size(path: Path) -> int:
    """Bytes allocated on disk by a file or a tree; hard links count once, links are not followed."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        info = entry.lstat()
        if (info.st_dev, info.st_ino) not in seen:
            seen.add((info.st_dev, info.st_ino))
            total += info.st_blocks * 512
    return total


def remove_tree(path: Path) -> None:
    """Delete a file or a tree; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder below `parent`, removed at the end whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f"{name}-", dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        remove_tree(folder)
