"""Which migrations a database needs: numbered SQL files like `0003_jobs.sql`. The newest is the schema level."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")


class SchemaError(Exception):
    """The database cannot be brought to this release's schema. The message is for the operator."""


@dataclass(frozen=True, slots=True)
class Migration:
    level: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """sha256 of the text, hex: tells a changed migration from the one that was applied."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read_migrations(folder: Path) -> tuple[Migration, ...]:
    """All migrations in order. Raises SchemaError for a file of another form, a gap or a doubled number."""
    found = []
    for file in sorted(folder.iterdir()):
        matched = _NAME.fullmatch(file.name)
        if matched is None:
            raise SchemaError(f"{file.name} is no migration: a name looks like 0003_jobs.sql")
        found.append(Migration(int(matched[1]), matched[2], file.read_text(encoding="utf-8")))
    for expected, migration in enumerate(found, start=1):
        if migration.level != expected:
            raise SchemaError(f"migration {expected:04} is missing or doubled: found {migration.level:04}")
    return tuple(found)


def plan(migrations: tuple[Migration, ...], applied: Mapping[int, str]) -> tuple[Migration, ...]:
    """The migrations still to be applied, given the checksum of each applied level.

    Raises SchemaError when the database is newer than this release or came from other migrations.
    """
    known = {migration.level: migration for migration in migrations}
    newest = max(applied, default=0)
    if newest > len(migrations):
        raise SchemaError(
            f"the database has schema level {newest}, this release knows levels up to {len(migrations)}: "
            "start the release that wrote it, or restore the data of before that upgrade"
        )
    for level, checksum in sorted(applied.items()):
        if known[level].checksum != checksum:
            raise SchemaError(
                f"migration {level:04}_{known[level].name} is not the one that this database was made with: "
                "a migration must not change once it was released; add a new one"
            )
    return migrations[newest:]
