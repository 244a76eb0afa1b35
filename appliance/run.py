"""The one place that runs other programs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance.errors import CommandError, HostError

Arg = str | Path


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
        how = f"was ended by {signal.Signals(-returncode).name}"
    else:
        how = f"ended with status {returncode}"
    tail = "\n".join("  | " + line for line in output.strip().splitlines()[-25:])
    return f"a command {how}\n  $ {pasteable(argv)}" + (f"\n{tail}" if tail else "")


def run(
    argv: Sequence[Arg],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    timeout: float | None = None,
    check: bool = True,
    hint: str = "",
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end with captured output.

    `env` is the whole environment when given; `timeout` is in seconds. Raises HostError when the program is missing,
    CommandError when it fails (unless `check` is false) or overruns its time.
    """
    words = [str(word) for word in argv]
    words[0] = words[0] if os.sep in words[0] else find_program(words[0])
    try:
        done = subprocess.run(
            words, cwd=cwd, env=env, input=input, stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True, timeout=timeout,
        )
    except FileNotFoundError as error:
        raise HostError(f"cannot run {words[0]}: {error.strerror}", hint="run ./build.py doctor") from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"a command was stopped after {timeout:g} s\n  $ {pasteable(argv)}", hint=hint) from error
    if check and done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace")
        raise CommandError(describe_failure(argv, done.returncode, output), hint=hint)
    return done
