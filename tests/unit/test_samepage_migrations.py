"""Which migrations run, and when none may."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from samepage.migrations import Migration, SchemaError, plan, read_migrations

RECIPE = Path(__file__).parents[2] / "recipes" / "samepage"
SHIPPED = RECIPE / "files" / "opt" / "samepage" / "share" / "samepage" / "migrations"

MIGRATIONS = tuple(Migration(level, f"step{level}", f"SELECT {level}") for level in (1, 2, 3))


def applied(*levels: int) -> dict[int, str]:
    return {level: MIGRATIONS[level - 1].checksum for level in levels}


def test_the_recipe_states_the_newest_migration() -> None:
    assert yaml.safe_load((RECIPE / "recipe.yaml").read_text())["schema_level"] == len(read_migrations(SHIPPED))


@pytest.mark.parametrize(("levels", "left"), [((), (1, 2, 3)), ((1,), (2, 3)), ((1, 2, 3), ())])
def test_what_is_left_to_do(levels: tuple[int, ...], left: tuple[int, ...]) -> None:
    assert tuple(one.level for one in plan(MIGRATIONS, applied(*levels))) == left


def test_a_newer_database_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"has schema level 4, this release knows levels up to 3: start the release"):
        plan(MIGRATIONS, {**applied(1, 2, 3), 4: "x"})


def test_a_changed_migration_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"0002_step2 is not the one that this database was made with"):
        plan(MIGRATIONS, {**applied(1, 3), 2: "other"})


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text(f"-- {name}")
    return folder


def test_files_are_read_in_order(tmp_path: Path) -> None:
    found = read_migrations(write(tmp_path, "0002_b.sql", "0001_a.sql"))
    assert [(one.level, one.name, one.sql) for one in found] == [(1, "a", "-- 0001_a.sql"), (2, "b", "-- 0002_b.sql")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("0001_a.sql", "0003_c.sql"), "migration 0002 is missing or doubled: found 0003"),
        (("0001_a.sql", "0001_b.sql"), "migration 0002 is missing or doubled: found 0001"),
        (("0002_a.sql",), "migration 0001 is missing"),
        (("1_a.sql",), "1_a.sql is no migration"),
        (("0001_a.sql~",), "0001_a.sql~ is no migration"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        read_migrations(write(tmp_path, *names))
