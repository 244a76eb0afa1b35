"""What stands in a layer's image, by path: to compare two layers, and to read single files."""

from __future__ import annotations

import stat
from pathlib import Path

from appliance import erofs


def file_of(image: Path, path: str) -> bytes | None:
    """Content of one file of an image, None where there is none. Raises ErofsError."""
    content = image.read_bytes()
    found = next((file for file in erofs.parse(content).files if file.path == path), None)
    return erofs.content_of(content, found) if found else None


def changed_paths(old: Path, new: Path, root: str) -> set[str]:
    """Paths of files and links that differ in content, mode or owner, or stand in one image only; `root` is where the
    images are mounted. Raises ErofsError."""
    if old == new:
        return set()
    before, after = _look(old), _look(new)
    return {root + path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _look(image: Path) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    content = image.read_bytes()
    return {
        file.path: (file.mode, file.owner, erofs.content_of(content, file))
        for file in erofs.parse(content).files
        if not stat.S_ISDIR(file.mode)
    }
