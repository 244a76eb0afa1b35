"""The tools root: programs whose version decides the bytes that come out, unpacked from locked packages.

They run on any host without root and without a chroot, through their own dynamic loader and libraries.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import HostError
from appliance.model import Lock, Package
from appliance.run import Arg, run
from appliance.store import Store

Obtain = Callable[[Iterable[Package]], Mapping[str, Path]]
"""Fetches packages: their files by sha256."""

_FOLDERS = ("usr/bin", "usr/sbin", "usr/local/bin", "bin", "sbin")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib")
_SKIPPED = (
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/info",
    "./usr/share/locale",
    "./usr/share/lintian",
    "./usr/share/bug",
    "./etc",
)


@dataclass(frozen=True, slots=True)
class Tools:
    """An unpacked tools root. `version` changes whenever any of its packages does: an input of what the tools make."""

    root: Path
    version: str

    def command(self, program: str, *arguments: Arg) -> list[str]:
        """The command line that runs a program of the tools root. Raises HostError when it has none of that name."""
        found = next(
            (self.root / folder / program for folder in _FOLDERS if (self.root / folder / program).exists()), None
        )
        if found is None:
            raise HostError(f"the tools root has no program {program!r}", hint="run ./build.py clean and build again")
        libraries = ":".join(str(self.root / folder) for folder in _LIBRARIES)
        loader = self.root / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
        return [str(loader), "--library-path", libraries, "--argv0", program, str(found), *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        """What the tools need beside the host's environment."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))},
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "GCONV_PATH": str(self.root / "usr/lib/x86_64-linux-gnu/gconv"),
            "PYTHONHOME": str(self.root / "usr"),
            "PYTHONHASHSEED": "0",
        }

    def run(
        self,
        program: str,
        *arguments: Arg,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = True,
        hint: str = "",
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program of the tools root to its end; `env` is added to `environment`. Otherwise like run.run."""
        return run(
            self.command(program, *arguments),
            cwd=cwd,
            env={**self.environment, **(env or {})},
            input=input,
            timeout=timeout,
            check=check,
            hint=hint,
        )


def inputs(lock: Lock) -> dict[str, str]:
    """What the tools root is made of."""
    return {
        "layout": " ".join(_SKIPPED),
        **{f"package {package.name}": f"{package.version} {package.sha256}" for package in lock.sets["tools"]},
    }


def prepare(lock: Lock, store: Store, obtain: Obtain) -> Tools:
    """The tools root of the lock, unpacked when the store lacks it. No maintainer script runs."""
    wanted = inputs(lock)

    def build(folder: Path) -> None:
        files = obtain(lock.sets["tools"])
        root = folder / "root"
        root.mkdir()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda package: _unpack(files[package.sha256], root), lock.sets["tools"]))

    place = store.step("tools", wanted, build)
    return Tools(place / "root", place.name)


def _unpack(file: Path, root: Path) -> None:
    excludes = [f"--exclude={pattern}" for pattern in _SKIPPED]
    script = 'dpkg-deb --fsys-tarfile "$0" | tar -x --no-same-owner --no-same-permissions --keep-directory-symlink "$@"'
    run(["sh", "-ec", script, file, "-C", root, *excludes])
