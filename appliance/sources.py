"""Finds the files of a recipe's folder and where they go in the appliance."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from appliance.errors import Faults, nearest
from appliance.model import Place, Source
from appliance.yamlfile import add_fault

CONTENTS = ("recipe.yaml", "README.md", "templates", "files", "checks")
ROOTS = ("/etc/", "/opt/samepage/")
ASIDE = re.compile(r".*~|\.#.*|#.*#|\..*\.sw.|4913|\.goutputstream-.*|.*\.pyc|__pycache__|\.git")
"""What editors and Python leave beside the files that are meant."""


def find_sources(
    project: Path, folder: Path, include: Mapping[str, tuple[Path, Place]], known: Iterable[Path], faults: Faults
) -> tuple[Source, ...]:
    """Every file of templates/, files/ and the included folders (target -> folder), sorted by target.

    `known` are the paths that recipe.yaml names; what else stands in the folder is a fault.
    """
    _refuse_strangers(project, folder, tuple(known), faults)
    found: dict[str, Source] = {}
    for source in _all_sources(project, folder, include, faults):
        first = found.setdefault(source.target, source)
        if first is not source:
            add_fault(faults, source.place, f"gives {source.target}, which {first.place.file} gives too")
    return tuple(found[target] for target in sorted(found))


def _refuse_strangers(project: Path, folder: Path, known: tuple[Path, ...], faults: Faults) -> None:
    """Only known names may stand in a recipe's folder, so that a misspelt one is not silently ignored."""
    for path in sorted(folder.iterdir()):
        named = any(path in (one, *one.parents) for one in known)
        if not named and path.name not in CONTENTS and not ASIDE.fullmatch(path.name):
            hint = nearest(path.name, CONTENTS)
            faults.add(path.relative_to(project).as_posix(), 0, "", "has no meaning in a recipe's folder", hint)


def _all_sources(
    project: Path, folder: Path, include: Mapping[str, tuple[Path, Place]], faults: Faults
) -> Iterator[Source]:
    for name in ("templates", "files"):
        if (folder / name).is_symlink():
            file = (folder / name).relative_to(project).as_posix()
            faults.add(file, 0, "", "is a symbolic link; a recipe's folders stand in the recipe")
        elif (folder / name).is_dir():
            yield from _walk(project, folder / name, "/", name == "templates", "", faults)
    for target, (path, place) in include.items():
        if not path.is_dir():
            add_fault(faults, place, f"{path.relative_to(project)} is not a folder of the project")
        else:
            yield from _walk(project, path, f"{target}/", False, f"{target}/", faults)


def _walk(project: Path, folder: Path, prefix: str, template: bool, group: str, faults: Faults) -> Iterator[Source]:
    """`prefix` is the folder's place in the appliance, ending in '/'."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        place = Place(path.relative_to(project).as_posix())
        target = prefix + entry.name
        if ASIDE.fullmatch(entry.name):
            continue
        if not (entry.name.isprintable() and entry.name.isascii()):
            add_fault(faults, place, "has a name with other than printable ASCII letters")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(project, path, target + "/", template, group, faults)
        elif not target.startswith(ROOTS):
            add_fault(faults, place, f"would become {target}; only files under etc/ and opt/samepage/ are allowed")
        elif entry.is_symlink():
            link = str(path.readlink())
            if template:
                add_fault(faults, place, "is a symbolic link, which cannot be a template", "put the link under files/")
            elif _leaves_root(target, link):
                add_fault(faults, place, f"is a link to {link}, which leads out of the appliance's root")
            else:
                yield Source(target, path, False, False, link, place, group)
        elif not entry.is_file():
            add_fault(faults, place, "is neither a file, a folder nor a symbolic link")
        elif template and not entry.name.endswith(".j2"):
            add_fault(
                faults, place, "stands under templates/ but does not end in .j2", "files/ holds what is copied as it is"
            )
        else:
            executable = bool(entry.stat().st_mode & stat.S_IXUSR)
            yield Source(
                target.removesuffix(".j2") if template else target, path, template, executable, "", place, group
            )


def _leaves_root(target: str, link: str) -> bool:
    """Whether a relative link climbs above the root of the appliance."""
    if link.startswith("/"):
        return False
    return posixpath.normpath(posixpath.join(posixpath.dirname(target).lstrip("/"), link)).startswith("..")
