"""Every way an upgrade is refused before it begins. Part of the node's own code.

A refusal leaves the node as it was. `reason` is its name for programs, `status` the exit status of the upgrade tool.
"""

from __future__ import annotations

from typing import Any

FAILED = 1
REFUSED = 3
LOCKED = 6


class Ending(Exception):
    """Why something is not done: the message says why, `hint` what can be done, `reason` is its name for programs."""

    outcome = "failed"
    reason = "failed"
    status = FAILED
    hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def result(self) -> dict[str, Any]:
        """How a run that this ended is told, by the service and by the command line."""
        return {
            "status": self.status, "outcome": self.outcome, "reason": self.reason, "message": self.message,
            "hint": self.hint,
        }  # fmt: skip


class Refusal(Ending):
    """The upgrade is refused."""

    outcome = "refused"
    reason = "refused"
    status = REFUSED


class ForeignFile(Refusal):
    """The file is of another kind."""

    reason = "foreign-file"
    hint = "give a file that ./build.py bundle or ./build.py channel wrote"


class UnknownFormat(Refusal):
    reason = "unknown-format"
    hint = "upgrade in steps: first to a release that reads this format"


class Truncated(Refusal):
    reason = "truncated"
    hint = "fetch the file again"


class TrailingBytes(Refusal):
    reason = "trailing-bytes"
    hint = "fetch the file again"


class UnknownKey(Refusal):
    reason = "unknown-key"
    hint = "sign with a key that the node trusts, or add the public key to the node's trusted keys"


class RevokedKey(Refusal):
    reason = "revoked-key"
    hint = "sign it again with a key that is not revoked"


class BadSignature(Refusal):
    reason = "bad-signature"
    hint = "the file was changed after it was signed; fetch it again from its maker"


class Damaged(Refusal):
    """What is signed does not fit what stands in the file, or the node's own files are not what they were."""

    reason = "damaged"
    hint = "fetch the file again"


class WrongBase(Refusal):
    reason = "wrong-base"
    hint = "take the bundle for the release that runs here, or a full bundle"


class WrongLayout(Refusal):
    reason = "wrong-layout"
    hint = "take the bundle of this node's layout"


class WrongNode(Refusal):
    reason = "wrong-node"
    hint = "the layout must have a node of this name"


class WrongArchitecture(Refusal):
    reason = "wrong-architecture"
    hint = "take the bundle of this node's architecture"


class Downgrade(Refusal):
    reason = "downgrade"
    hint = "say --allow-downgrade if that is what you want"


class Replayed(Refusal):
    reason = "replayed"
    hint = "somebody serves an old index; look at the channel's server"


class Expired(Refusal):
    reason = "expired"
    hint = "renew the index with ./build.py channel keep"


class ClockOff(Refusal):
    reason = "clock-off"
    hint = "set the clock, e.g. with timedatectl"


class NoWay(Refusal):
    reason = "no-way"
    hint = "add a full bundle of the newest release to the channel"


class NoRoom(Refusal):
    reason = "no-room"
    hint = "remove old releases with samepage-upgrade-node cleanup"


class Busy(Refusal):
    """Another upgrade runs."""

    outcome = "locked"
    reason = "locked"
    status = LOCKED
    hint = "wait for it; samepage-upgrade-node status shows how far it is"
