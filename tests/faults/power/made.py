"""The releases and the disk that power-cut tests work with.

What only needs to be another layer, RAM disk or kernel is an old one with zeroes behind it: no program reads those, and
nothing has to be built.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from appliance import bundle, disk
from appliance.bundle import ReleaseFiles
from appliance.console import Console
from appliance.model import ToolBox
from appliance.node.release import File, dump
from appliance.pipeline import Built, build_release
from tests.faults.power.checks import files_of
from tests.variants import SIGNER, Variants, replace, write

FIRST = "1.0"
DISK_SIZE = 6 << 30  # bytes; the file is sparse
PADDING = 4096  # bytes
SERVICE = "recipes/samepage/templates/etc/systemd/system/samepage.service.j2"
# What changes in the recipes, by release; each has the changes of those before it.
NGINX = replace("recipes/nginx/recipe.yaml", "worker_connections: 1024", "worker_connections: 1000")
UNIT = replace(SERVICE, "Description=Samepage\n", "Description=Samepage, changed\n")
MIGRATION = write(
    "recipes/samepage/files/opt/samepage/share/samepage/migrations/0004_power.sql",
    "CREATE TABLE power AS SELECT id, title FROM items;\nALTER TABLE items ADD COLUMN power integer;\n",
)
LEVEL = replace("recipes/samepage/recipe.yaml", "schema_level: 3", "schema_level: 4")
TRIAL = replace(
    "recipes/node-tools/recipe.yaml", "trial_seconds: 600", "trial_seconds: 300"
)  # or it takes long to fail
BROKEN = replace(SERVICE, "ExecStart=/opt/samepage/bin/samepage-server", "ExecStart=/bin/false")


@dataclass
class Releases:
    """Releases by version; bundles between them. Everything is made when it is first asked for."""

    folder: Path
    made: dict[str, ReleaseFiles] = field(default_factory=dict)

    @cached_property
    def variants(self) -> Variants:
        return Variants(self.folder / "variants")

    @cached_property
    def first(self) -> Built:
        built = build_release(self.variants.options(FIRST), Console("none"))
        self.made[FIRST] = bundle.files_of(built.release)
        return built

    @property
    def tools(self) -> ToolBox:
        return self.first.tools

    @cached_property
    def disk(self) -> Path:
        """A raw disk with the first release."""
        target = self.folder / "first.raw"
        disk.write(self.first.release, self.first.boot, target, self.first.tools, size=DISK_SIZE)
        return target

    def __getitem__(self, version: str) -> ReleaseFiles:
        if version not in self.made:
            self.made[version] = {
                FIRST: lambda: bundle.files_of(self.first.release),
                "1.1": lambda: self.variants.release("1.1", NGINX),  # live
                "1.2": lambda: self.variants.release("1.2", NGINX, UNIT),  # live, with a unit that keeps data
                "1.3": lambda: self._other_base("1.3", self.variants.release("1.3-", NGINX, UNIT, MIGRATION, LEVEL)),
                "1.4": lambda: self._other_kernel("1.4", self.variants.release("1.4-", NGINX, UNIT, MIGRATION, LEVEL)),
                "1.5": lambda: self._other_base("1.5", self.variants.release("1.5-", NGINX, UNIT, BROKEN, TRIAL)),
                "1.6": lambda: self._other_kernel("1.6", self.variants.release("1.6-", NGINX, UNIT, BROKEN, TRIAL)),
            }[version]()
        return self.made[version]

    def bundle(self, start: str, goal: str) -> Path:
        out = self.folder / bundle.file_name(self[start], self[goal])
        if not out.exists():
            bundle.make(self[start], self[goal], SIGNER, out)
        return out

    def files(self) -> Mapping[str, File]:
        """All files of the releases made so far, by path on the state partition."""
        found: dict[str, File] = {}
        for release in self.made.values():
            found |= files_of(release.manifest)
        return found

    def _padded(self, source: Path) -> tuple[Path, File]:
        target = self.folder / f"{source.name}.padded"
        if not target.exists():
            shutil.copyfile(source, target)
            with target.open("ab") as file:
                file.write(bytes(PADDING))
        with target.open("rb") as file:
            return target, File(hashlib.file_digest(file, "sha256").hexdigest(), target.stat().st_size)

    def _other_base(self, version: str, of: ReleaseFiles) -> ReleaseFiles:
        old = next(layer for layer in of.manifest.layers if layer.kind == "base")
        path, file = self._padded(of.files[old.digest])
        layers = (one._replace(digest=file.digest, size=file.size) if one is old else one for one in of.manifest.layers)
        manifest = of.manifest._replace(version=version, layers=tuple(layers))
        return ReleaseFiles(dump(manifest), manifest, {**of.files, file.digest: path})

    def _other_kernel(self, version: str, of: ReleaseFiles) -> ReleaseFiles:
        old = of.manifest.kernel
        path, file = self._padded(of.files[old.initrd.digest])
        manifest = of.manifest._replace(version=version, kernel=old._replace(id=f"{old.id}-padded", initrd=file))
        return ReleaseFiles(dump(manifest), manifest, {**of.files, file.digest: path})
