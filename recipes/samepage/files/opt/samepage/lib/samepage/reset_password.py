"""samepage-reset-password: a new one-time password for a member who lost theirs. For root on the node."""

from __future__ import annotations

import os
import pwd
import sys

import psycopg
from psycopg.rows import DictRow

from .config import ConfigError, Settings
from .database import conninfo
from .first_login import LOGIN, forget
from .passwords import MADE, hash_password, make_password

_SET = """
UPDATE members SET password_hash = %s, password_version = password_version + 1, must_change_password = true
WHERE login = lower(%s)
"""


def main() -> None:
    """Exit status 0 with the password on stdout, 1 when it was not set, 64 for wrong usage."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.stderr.write("usage: samepage-reset-password LOGIN\n\nexample: samepage-reset-password admin\n")
        sys.exit(64)
    try:
        sys.stdout.write(reset(Settings.load(), sys.argv[1]) + "\n")
    except (ConfigError, LookupError, psycopg.Error, PermissionError) as error:
        sys.stderr.write(f"samepage-reset-password: {str(error).strip()}\n")
        sys.exit(1)


def reset(settings: Settings, login: str) -> str:
    """The new one-time password; ends all sessions of the member. Raises LookupError for an unknown login."""
    _become(settings.database_user)
    password = make_password()
    with psycopg.Connection[DictRow].connect(**conninfo(settings, "samepage-reset-password")) as connection:
        if connection.execute(_SET, (hash_password(password, MADE), login)).rowcount != 1:
            raise LookupError(f"there is no member {login}")
    if login.lower() == LOGIN:
        forget(settings)  # the console must not show a password that is no longer valid
    return password


def _become(user: str) -> None:
    """PostgreSQL knows its clients by their system user."""
    entry = pwd.getpwnam(user)
    if os.geteuid() != entry.pw_uid:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
