"""What the benchmarks of one call share: the packages, the mirrors, the peers and a checkout that may be edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from appliance.apt import Mirrors, find_mirrors
from appliance.lock import read_lock
from bench.debian import SUITE
from bench.measure import BenchError, Cost, measure, remove_tree, scratch
from bench.report import Figure, number

LEFT_OUT = (".git", ".venv", ".venv.lock", ".samepage", ".*_cache", "__pycache__", "dist", "tests", "*.egg-info")


@dataclass(frozen=True, slots=True)
class Build:
    """One run of the builder: its cost, what `--json` said, and the ISO."""

    cost: Cost
    said: dict[str, Any]

    @property
    def iso(self) -> Path:
        return Path(self.said["path"])

    def stage_seconds(self, name: str) -> float:
        """How long a stage took. Raises BenchError when it did not run."""
        for stage in self.said["stages"]:
            if stage["name"] == name:
                return float(stage["seconds"])
        raise BenchError(f"the builder ran no stage {name!r}")


@dataclass(frozen=True, slots=True)
class Builder:
    """The checkout's own `build.py`, at work on a copy of the project, with a cache of its own."""

    program: Path
    project: Path
    cache: Path
    out: Path

    def iso(self, *options: str) -> Build:
        """Run `build.py iso` as a user does, from the first to the last moment of its process."""
        output = self.out.with_name("build.json")
        cost = measure(
            [sys.executable, self.program, "-C", self.project, "--progress", "none", "iso", "--json",
             "--output-dir", self.out, *options],
            log=self.out.with_name("build.log"), output=output, env={"SAMEPAGE_CACHE": str(self.cache)},
        )  # fmt: skip
        return Build(cost, json.loads(output.read_text()))

    def forget(self) -> None:
        """Empty the cache and the output."""
        for folder in (self.cache, self.out, self.project / ".samepage"):
            remove_tree(folder)

    def restore(self, root: Path) -> None:
        """Undo the changes below."""
        remove_tree(self.project / "recipes")
        shutil.copytree(root / "recipes", self.project / "recipes", symlinks=True)

    def change_template(self, word: str) -> None:
        """Add a comment to one of the front door's configuration templates."""
        template = min((self.project / "recipes/nginx").rglob("*.conf.j2"))
        template.write_text(template.read_text() + f"# {word}\n")

    def add_package(self, name: str) -> None:
        """Let the front door's recipe ask for one more package."""
        recipe = self.project / "recipes/nginx/recipe.yaml"
        text, count = re.subn(r"^packages: \[", f"packages: [{name}, ", recipe.read_text(), flags=re.MULTILINE)
        if count != 1:
            raise BenchError(f"{recipe} has no line that starts with 'packages: ['")
        recipe.write_text(text)


@dataclass
class Workshop:
    """Shared state of one call. `rounds` is how often each side of a comparison is run."""

    root: Path
    rounds: int
    given_iso: Path | None = None
    mirror: str = ""
    older_locks: tuple[Path, ...] = ()
    tell: Callable[[str], None] = print  # each figure, as soon as it is known
    figures: list[Figure] = field(default_factory=list)
    cold: list[Cost] = field(default_factory=list)
    _builder: Builder | None = None

    @property
    def cache(self) -> Path:
        """What is kept from one call to the next, until `build.py clean`: the peers' own root trees and disks."""
        return self.root / ".samepage/bench"

    @cached_property
    def mirrors(self) -> Mirrors:
        return find_mirrors(SUITE, mirror=self.mirror)

    @cached_property
    def packages(self) -> tuple[str, ...]:
        """Names of all packages of the appliance, from the lock."""
        lock = read_lock(self.root / "recipes/packages.lock")
        return tuple(sorted(package.name for package in lock.sets["full"]))

    @property
    def builder(self) -> Builder:
        """A builder on its copy of the checkout, made once and alive as long as `open_workshop` is."""
        if self._builder is None:
            raise BenchError("the workshop is not open")
        return self._builder

    def add(self, *figures: Figure) -> None:
        """What was measured: for the report, and at once for whoever waits for the end of a long run."""
        for one in figures:
            self.figures.append(one)
            self.tell(f"{one.bench}  {one.name}  {number(one.value, one.unit)}")

    def warm(self) -> Build:
        """The unchanged project built with a filled cache; when that is empty, the build counts as a cold one."""
        self.builder.restore(self.root)
        if not self.cold:
            self.cold.append(self.builder.iso().cost)
        return self.builder.iso()

    def warm_builder(self) -> Builder:
        """The builder with a filled cache and nothing left to do."""
        self.warm()
        return self.builder

    @property
    def iso(self) -> Path:
        """The ISO to boot: the given one, or one that is built now."""
        return self.given_iso or self.warm().iso


@contextmanager
def open_workshop(
    root: Path, rounds: int, iso: Path | None, mirror: str, older_locks: tuple[Path, ...], tell: Callable[[str], None]
) -> Iterator[Workshop]:
    """A workshop whose copy of the checkout, caches and outputs are removed at the end."""
    shop = Workshop(root, rounds, iso, mirror, older_locks, tell)
    shop.cache.mkdir(parents=True, exist_ok=True)
    with scratch(shop.cache, "run") as folder:
        project = folder / "project"
        shutil.copytree(root, project, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        shop._builder = Builder(root / "build.py", project, folder / "cache", folder / "out")
        yield shop


def machine() -> dict[str, str]:
    """What the figures depend on beside the code."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpus": str(os.cpu_count()), "cpu": cpu[1] if cpu else "unknown", "kernel": os.uname().release,
        "load before": f"{os.getloadavg()[0]:.2f}", "python": sys.version.split()[0],
    }  # fmt: skip
