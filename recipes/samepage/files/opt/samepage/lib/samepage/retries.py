"""When a job that failed is tried again."""

from __future__ import annotations

import smtplib

ATTEMPTS = 12


def pause_after(attempts: int) -> int:
    """Seconds until the next attempt: 15, 30, 60 ... at most an hour."""
    return int(min(15 * 2 ** (attempts - 1), 3600))


def is_lasting(error: Exception) -> bool:
    """Whether trying again cannot help: the mail server said 5xx, or the job itself is wrong."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= 500 for code, _ in error.recipients.values())
    if isinstance(error, smtplib.SMTPResponseException):
        return error.smtp_code >= 500
    return not isinstance(error, OSError)  # every other error of smtplib is an OSError too: the connection was lost
