"""The first administrator: made at first boot with a one-time password that only the console shows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from psycopg.rows import DictRow

from .config import Settings
from .database import Connection
from .passwords import CHOSEN, MADE, hash_password, make_password, verify_password

LOGIN = "admin"
CREDENTIAL = "samepage.admin-password"


async def ensure_administrator(connection: Connection, settings: Settings) -> None:
    """Make the administrator if there is none; show a one-time password as long as it has not been changed.

    The clear text lies beside the data, so that restoring older data restores the password that fits it.
    """
    row = await _administrator(connection)
    if row is None:
        await _create(connection, settings)
        row = await _administrator(connection)
    kept = _read(settings.first_login_kept)
    valid = row is not None and row["must_change_password"] and verify_password(kept, row["password_hash"] or "")
    if valid:
        _write(settings.first_login_shown, kept, settings.console_group)
    else:
        forget(settings)


def forget(settings: Settings) -> None:
    """Remove the clear text: it was changed, or never was this database's."""
    settings.first_login_shown.unlink(missing_ok=True)
    settings.first_login_kept.unlink(missing_ok=True)


async def _administrator(connection: Connection) -> DictRow | None:
    cursor = await connection.execute(
        "SELECT password_hash, must_change_password FROM members WHERE login = %s", (LOGIN,)
    )
    return await cursor.fetchone()


async def _create(connection: Connection, settings: Settings) -> None:
    given = _credential()
    password = given or make_password()
    if not given:
        # Written first: a password in the database that nobody can read would lock everybody out.
        _write(settings.first_login_kept, password, "")
    await connection.execute(
        "INSERT INTO members (login, name, role, password_hash, must_change_password)"
        " VALUES (%s, 'Administrator', 'administrator', %s, true) ON CONFLICT DO NOTHING",
        (LOGIN, hash_password(password, CHOSEN if given else MADE)),
    )


def _credential() -> str:
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    try:
        return (Path(folder) / CREDENTIAL).read_text(encoding="utf-8").strip() if folder else ""
    except FileNotFoundError:
        return ""


def _read(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["password"])
    except (OSError, ValueError, KeyError):
        return ""


def _write(file: Path, password: str, group: str) -> None:
    """Whole or not at all, durable, and readable by `group` only."""
    unfinished = file.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump({"user": LOGIN, "password": password}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    if group:
        shutil.chown(unfinished, group=group)
        unfinished.chmod(0o640)
    unfinished.replace(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
