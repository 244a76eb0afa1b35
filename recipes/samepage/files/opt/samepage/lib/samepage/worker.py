"""The worker's process: takes jobs from the database and mails them; also throws away what is out of date.

A job is taken by moving its `due_at` into the future (the lease) in one statement, so several workers never share one,
and a job whose worker died is due again by itself. A mail that the server took before a crash may then go twice, with
the same Message-ID.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import smtplib
import sys
import time
from typing import Any

import psycopg
from psycopg.rows import DictRow

from . import service
from .clock import utc_now
from .config import SHARE, ConfigError, Settings
from .database import conninfo
from .mail import UnknownMail, build
from .migrations import SchemaError, plan, read_migrations
from .retries import ATTEMPTS, is_lasting, pause_after

_LEASE = 120  # seconds; longer than all of SMTP's time limits together
_SMTP_TIMEOUT = 20
_IDLE = 60.0  # seconds between looks without a notification: leases that ran out, retries
_HOUSEKEEPING = 3600.0
_PAUSE = 1.0  # between attempts to reach the database
_log = logging.getLogger(__name__)

_TAKE = """
UPDATE jobs SET attempts = attempts + 1, due_at = now() + make_interval(secs => %s)
WHERE id = (SELECT id FROM jobs WHERE state = 'waiting' AND due_at <= now()
            ORDER BY due_at, id FOR UPDATE SKIP LOCKED LIMIT 1)
RETURNING id, kind, payload, attempts
"""
_FINISH = """
UPDATE jobs SET state = %s, payload = '{}', last_error = %s, finished_at = now()
WHERE id = %s AND attempts = %s AND state = 'waiting'
"""
_RETRY = """
UPDATE jobs SET due_at = now() + make_interval(secs => %s), last_error = %s
WHERE id = %s AND attempts = %s AND state = 'waiting'
"""
_NEXT = "SELECT extract(epoch FROM min(due_at) - now())::float AS seconds FROM jobs WHERE state = 'waiting'"
_OUTDATED = (
    "DELETE FROM jobs WHERE state <> 'waiting' AND finished_at < now() - interval '14 days'",
    "DELETE FROM invitations WHERE expires_at < now() - interval '14 days'",
    "DELETE FROM stats WHERE at < now() - interval '90 days'",
)

Connection = psycopg.Connection[DictRow]


def work_off(connection: Connection, settings: Settings) -> bool:
    """Do one job that is due; False when there is none."""
    job = connection.execute(_TAKE, (_LEASE,)).fetchone()
    if job is None:
        return False
    _do(connection, settings, job)
    return True


def _do(connection: Connection, settings: Settings, job: dict[str, Any]) -> None:
    mark = (job["id"], job["attempts"])
    try:
        _send(settings, job)
    except (UnknownMail, ValueError, KeyError, OSError, smtplib.SMTPException) as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        _log.warning("job %d, attempt %d: %s", *mark, reason)
        if is_lasting(error) or job["attempts"] >= ATTEMPTS:
            connection.execute(_FINISH, ("failed", reason, *mark))
        else:
            connection.execute(_RETRY, (pause_after(job["attempts"]), reason, *mark))
    else:
        connection.execute(_FINISH, ("done", "", *mark))
        _log.info("job %d is done", job["id"])


def _send(settings: Settings, job: dict[str, Any]) -> None:
    domain = settings.mail_from.rpartition("@")[2]
    message_id = f"<job-{job['id']}@{domain}>"
    message = build(job["kind"], job["payload"], sender=settings.mail_from, message_id=message_id, at=utc_now())
    with smtplib.SMTP(settings.smtp_host, settings.smtp_port, local_hostname=domain, timeout=_SMTP_TIMEOUT) as server:
        server.send_message(message)


class Worker:
    """One connection at a time; stops between two jobs, so that none is left half done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._levels = read_migrations(SHARE / "migrations")
        self._bell, self._ringer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self._cleaned = -_HOUSEKEEPING

    def stop(self, *_: object) -> None:
        self._stopping = True
        os.write(self._ringer, b".")

    def run(self) -> None:
        """Work until told to stop, over any number of lost connections. Raises SchemaError for a newer database."""
        complained = False
        while not self._stopping:
            try:
                with connect(self._settings) as connection:
                    if self._is_ready(connection):
                        service.notify("STATUS=Working")
                        complained = False
                        self._work(connection)
            except psycopg.OperationalError as error:
                service.notify("STATUS=Waiting for PostgreSQL")
                if not complained:
                    _log.warning("waiting for PostgreSQL: %s", str(error).strip().splitlines()[0])
                complained = True
            self._wait(_PAUSE)

    def _is_ready(self, connection: Connection) -> bool:
        """Whether the API's process has brought the schema to this release's level."""
        known = connection.execute("SELECT to_regclass('schema_migrations') AS known").fetchone()
        if known is None or known["known"] is None:
            return False
        rows = connection.execute("SELECT level, checksum FROM schema_migrations").fetchall()
        return not plan(self._levels, {row["level"]: row["checksum"] for row in rows})

    def _work(self, connection: Connection) -> None:
        connection.execute("LISTEN samepage_jobs")
        while not self._stopping:
            while not self._stopping and work_off(connection, self._settings):
                pass
            if time.monotonic() - self._cleaned > _HOUSEKEEPING:
                for statement in _OUTDATED:
                    connection.execute(statement)
                self._cleaned = time.monotonic()
            due = connection.execute(_NEXT).fetchone()
            seconds = _IDLE if due is None or due["seconds"] is None else due["seconds"]
            self._wait(min(_IDLE, max(seconds, 0.5)), connection.fileno())
            for _ in connection.notifies(timeout=0):
                pass

    def _wait(self, seconds: float, *descriptors: int) -> None:
        """Sleep until something is readable; psycopg's own waiting wakes ten times a second."""
        select.select([self._bell, *descriptors], [], [], 0 if self._stopping else seconds)


def connect(settings: Settings) -> Connection:
    return psycopg.Connection[DictRow].connect(**conninfo(settings, "samepage-worker"))


def main() -> None:
    """The entry point. Exit status 78 means that a human must act first."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        worker = Worker(Settings.load())
        signal.signal(signal.SIGTERM, worker.stop)
        service.notify("STATUS=Waiting for the database's schema")
        worker.run()
    except (ConfigError, SchemaError) as error:
        _log.error("%s", error)
        service.notify(f"STATUS={error}")
        sys.exit(78)
