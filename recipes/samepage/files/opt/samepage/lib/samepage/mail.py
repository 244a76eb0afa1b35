"""The mails that Samepage sends."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any


class UnknownMail(Exception):
    """A job of a kind that this release does not know."""


def build(kind: str, payload: Mapping[str, Any], *, sender: str, message_id: str, at: datetime) -> EmailMessage:
    """The message of a job. Every attempt of a job bears the same `message_id`, so mailboxes can tell a repetition.

    Raises UnknownMail, and ValueError for an address that no mail can go to.
    """
    if kind != "invitation":
        raise UnknownMail(f"there is no mail of kind {kind}")
    message = EmailMessage()
    message["Subject"] = f"{payload['from_name']} invites you to Samepage"
    message["From"] = Address("Samepage", addr_spec=sender)
    message["To"] = Address(payload["name"], addr_spec=payload["to"])
    message["Date"] = at
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(_INVITATION.format_map(payload))
    return message


_INVITATION = """\
Hello {name},

{from_name} invites you to Samepage, where your team keeps its notes.

Open this link within {days} days and choose a password:

{link}

The link works once. If you did not expect this mail, ignore it.
"""
