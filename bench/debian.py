"""The plain Debian way: the same packages in a directory made by mmdebstrap, from the host's own mirrors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from appliance.apt import KEYRING, MAIN, SECURITY, Mirrors
from bench.measure import Cost, measure

SUITE = "trixie"


def source_lines(mirrors: Mirrors, suite: str = SUITE) -> tuple[str, ...]:
    """One-line apt sources of a suite, its updates and its security fixes."""
    places = [(MAIN, suite), (MAIN, f"{suite}-updates"), (SECURITY, f"{suite}-security")]
    return tuple(f"deb [signed-by={KEYRING}] {mirrors[archive]} {name} main" for archive, name in places)


def mmdebstrap(
    packages: Sequence[str],
    out: Path,
    mirrors: Mirrors,
    log: Path,
    *,
    options: Sequence[str] = (),
    timeout: float = 900,
) -> Cost:
    """Build `out` (a directory or, by suffix, a tar) from `packages`, with empty caches, the way its manual page does.

    As root in root mode, otherwise in a user namespace. The umask and the work folder are the caller's.
    """
    mode = "root" if os.geteuid() == 0 else "unshare"
    return measure(
        ["mmdebstrap", f"--mode={mode}", "--variant=essential", f"--include={','.join(packages)}", *options,
         SUITE, out, *source_lines(mirrors)],
        log=log, timeout=timeout,
    )
