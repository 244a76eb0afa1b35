"""When the worker tries a job again."""

from __future__ import annotations

import smtplib

import pytest
from samepage.mail import UnknownMail
from samepage.retries import ATTEMPTS, is_lasting, pause_after


def test_pauses_grow_to_an_hour_and_end_after_hours() -> None:
    pauses = [pause_after(attempt) for attempt in range(1, ATTEMPTS)]
    assert pauses[:4] == [15, 30, 60, 120]
    assert max(pauses) == 3600
    assert 3.5 < sum(pauses) / 3600 < 4.5


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (ConnectionRefusedError(), False),
        (TimeoutError(), False),
        (smtplib.SMTPServerDisconnected("gone"), False),
        (smtplib.SMTPConnectError(421, "busy"), False),
        (smtplib.SMTPDataError(451, b"later"), False),
        (smtplib.SMTPDataError(554, b"no"), True),
        (smtplib.SMTPSenderRefused(550, b"no", "a@b"), True),
        (smtplib.SMTPRecipientsRefused({"a@b": (550, b"no")}), True),
        (smtplib.SMTPRecipientsRefused({"a@b": (450, b"later")}), False),
        (UnknownMail("newsletter"), True),
        (KeyError("link"), True),
        (ValueError("address"), True),
    ],
)
def test_what_another_attempt_cannot_mend(error: Exception, lasting: bool) -> None:
    assert is_lasting(error) is lasting
