"""Python wheels that Debian does not have: fetched by pip from whatever index the host uses, kept by content."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from appliance.errors import ApplianceError
from appliance.model import Wheel
from appliance.run import run

NODE_PYTHON = "3.13"


def fetch(wheels: Iterable[Wheel], cache: Path) -> Mapping[str, Path]:
    """The wheels' files by sha256, fetched where the cache lacks them. Raises CommandError naming the wheel."""
    found: dict[str, Path] = {}
    for wheel in wheels:
        place = cache / f"{wheel.sha256}.whl"
        if not place.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _download(wheel, place)
        found[wheel.sha256] = place
    return found


def _download(wheel: Wheel, place: Path) -> None:
    with TemporaryDirectory(dir=place.parent, prefix="fetch-") as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--only-binary=:all:", "--python-version", NODE_PYTHON, "--require-hashes", "--quiet"]
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                *options,
                "-d",
                folder,
                "-r",
                folder / "wanted.txt",
            ],
            hint=f"correct {wheel.place.file}:{wheel.place.line}, or set PIP_INDEX_URL to an index that has the wheel",
        )
        files = list(folder.glob("*.whl"))
        if len(files) != 1 or hashlib.sha256(files[0].read_bytes()).hexdigest() != wheel.sha256:
            raise ApplianceError(
                f"the index has another {wheel.requirement}", hint=f"correct the sha256 in {wheel.place.file}"
            )
        files[0].replace(place)
