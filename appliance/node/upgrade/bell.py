"""Starts samepage-upgrade.service: systemd does when something is written to this pipe. Part of the node's own code.

The command line rings before it has loaded itself, so that both programs load at once; here next to
nothing is loaded.
"""

import os

BELL = "/run/samepage-upgrade.bell"  # samepage-upgrade.socket makes it
LOOKS = ("check", "info", "plan", "status", "history", "verify", "cleanup", "--dry-run", "--help", "-h")


def ring(bell: str = BELL) -> None:
    """Raises OSError where nobody listens."""
    descriptor = os.open(bell, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(descriptor, b"\n")
    finally:
        os.close(descriptor)


def ring_early(words: list[str], bell: str = BELL) -> None:
    """Ring where the words look as if a request would follow; where none does, the service ends by itself."""
    if not any(word in LOOKS for word in words):
        try:  # noqa: SIM105 - see above
            ring(bell)
        except OSError:  # it is rung again with the request, and told then
            pass
