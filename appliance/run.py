"""The one place that runs other programs.

Every program runs in a session of its own, so that Ctrl-C reaches the builder only; the builder then ends the program
with everything that it started.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from appliance.errors import CommandError, HostError

Arg = str | Path

TAIL_LINES = 25
GRACE = 5.0  # seconds between asking a program to end and ending it


def find_program(name: str) -> str:
    """Absolute path of a host program, also from the sbin folders. Raises HostError where it is missing."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise HostError(f"the program {name!r} is not installed", hint="run ./build.py doctor, which names the package")
    return found


def pasteable(argv: Sequence[Arg]) -> str:
    """The command as a user can paste it into a shell."""
    return shlex.join(str(word) for word in argv)


def describe_failure(argv: Sequence[Arg], returncode: int, output: str) -> str:
    """Says whether the command failed by status or by signal, and ends with the tail of what it printed."""
    if returncode < 0:
        try:
            how = f"was ended by {signal.Signals(-returncode).name}"
        except ValueError:
            how = f"was ended by signal {-returncode}"
    else:
        how = f"ended with status {returncode}"
    tail = "\n".join("  | " + line for line in output.strip().splitlines()[-TAIL_LINES:])
    return f"a command {how}\n  $ {pasteable(argv)}" + (f"\n{tail}" if tail else "")


def end_group(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Ends a program and all it started: asks first, and after `grace` seconds insists."""
    for sign, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what the leader left behind


@contextmanager
def _started(
    argv: Sequence[Arg],
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stdin: int,
    stdout: int | IO[bytes],
    stderr: int,
) -> Iterator[subprocess.Popen[bytes]]:
    words = [str(word) for word in argv]
    words[0] = words[0] if os.sep in words[0] else find_program(words[0])
    try:
        process = subprocess.Popen(
            words, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
    except OSError as error:
        raise HostError(
            f"cannot run {words[0]}: {error.strerror}", hint="run ./build.py doctor, which names the package"
        ) from error
    try:
        yield process
    except BaseException:
        end_group(process)
        raise
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def run(
    argv: Sequence[Arg],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    output: Path | None = None,
    timeout: float | None = None,
    check: bool = True,
    hint: str = "",
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end with captured output; with `output`, its standard output goes to that file instead.

    `env` is the whole environment when given; `timeout` is in seconds. Raises HostError when the program is missing,
    CommandError when it fails (unless `check` is false) or overruns its time.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with open(output, "wb") if output else _no_file() as file:  # noqa: PTH123 - one expression for both cases
        target = subprocess.PIPE if file is None else file
        with _started(argv, cwd, env, stdin, target, subprocess.PIPE) as process:
            try:
                out, err = process.communicate(input, timeout)
            except subprocess.TimeoutExpired as error:
                raise _overran(argv, timeout or 0, hint) from error
    done = subprocess.CompletedProcess([str(word) for word in argv], process.returncode, out or b"", err or b"")
    if check and done.returncode != 0:
        text = (done.stdout + done.stderr).decode(errors="replace")
        raise CommandError(describe_failure(argv, done.returncode, text), hint=hint)
    return done


def stream(
    argv: Sequence[Arg],
    *,
    log: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = True,
    hint: str = "",
) -> int:
    """Run a long program, writing all it prints to `log` as it comes and handing each line to `on_line`.

    Returns the exit status. Raises like `run`; the error ends with the last lines printed and names the log.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    overran = threading.Event()
    with (
        open(log, "ab") if log else _no_file() as file,  # noqa: PTH123 - as in run
        _started(argv, cwd, env, subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT) as process,
    ):

        def expire() -> None:
            overran.set()
            end_group(process)

        timer = threading.Timer(timeout, expire) if timeout else None
        if timer:
            timer.start()
        try:
            assert process.stdout is not None
            for raw in process.stdout:
                if file is not None:
                    file.write(raw)
                    file.flush()
                line = raw.decode(errors="replace").rstrip()
                tail.append(line)
                if on_line:
                    on_line(line)
            process.wait()
        finally:
            if timer:
                timer.cancel()
    where = f"\nwhole log: {log}" if log else ""
    if overran.is_set():
        raise _overran(argv, timeout or 0, hint, where)
    if check and process.returncode != 0:
        raise CommandError(describe_failure(argv, process.returncode, "\n".join(tail)) + where, hint=hint)
    return process.returncode


def attached(argv: Sequence[Arg], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a program on the user's own terminal (a shell, a pager) and return its exit status."""
    words = [str(word) for word in argv]
    words[0] = words[0] if os.sep in words[0] else find_program(words[0])
    return subprocess.run(words, cwd=cwd, env=env).returncode


@contextmanager
def _no_file() -> Iterator[None]:
    yield None


def _overran(argv: Sequence[Arg], timeout: float, hint: str, where: str = "") -> CommandError:
    return CommandError(f"a command was stopped after {timeout:g} s\n  $ {pasteable(argv)}{where}", hint=hint)
