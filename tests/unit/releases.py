"""Small releases for tests: real manifests over images that the tests' own writer makes."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from appliance import initrd
from appliance.bundle import ReleaseFiles
from appliance.node.keys import Signer, Trust
from appliance.node.release import File, KernelRecord, LayerRecord, Manifest, PackageRecord, dump
from tests.unit.erofs_writer import image

SIGNER = Signer(bytes(range(32)))
OTHER = Signer(bytes(range(1, 33)))
TRUST = Trust({SIGNER.id: SIGNER.public})
NOISE = random.Random(7).randbytes(60_000)

UNITS = {
    "nginx.service": {"on_change": "reload", "files": ["/etc/nginx/nginx.conf"]},
    "app.service": {"on_change": "restart", "files": ["/opt/samepage/lib/app/"]},
}


class Maker:
    """Makes releases in a folder; each file lies there under its digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, content: bytes) -> File:
        digest = sha256(content).hexdigest()
        (self.folder / digest).write_bytes(content)
        return File(digest, len(content))

    def release(
        self, version: str = "1.0", *, nginx: bytes = b"one", app: bytes = b"print(1)", library: bytes = NOISE,
        kernel: bytes = b"linux 1", packages: Mapping[str, str] | None = None, nodes: tuple[str, ...] = ("one",),
        migrations: tuple[str, ...] = (), **changes: Any,
    ) -> ReleaseFiles:  # fmt: skip
        base = self.keep(image({"/usr/lib/library.so": library, "/usr/lib/module.ko": NOISE[:20_000] + kernel}))
        sql = {f"/share/app/migrations/{name}": name.encode() for name in migrations}
        code = self.keep(image({"/lib/app/main.py": app, "/share/page.html": b"<p>"} | sql))
        layers = [LayerRecord("base", "", base.digest, base.size), LayerRecord("app", "", code.digest, code.size)]
        for node in nodes:
            record = json.dumps({"name": node, "units": UNITS}).encode()
            config = self.keep(
                image(
                    {"/etc/samepage/node.json": record, "/etc/nginx/nginx.conf": nginx, "/etc/hostname": node.encode()}
                )
            )
            layers.append(LayerRecord("config", node, config.digest, config.size))
        vmlinuz = self.keep(NOISE[::-1][:5000] + kernel)
        disk = self.keep(initrd.pack([initrd.plain("lib/module.ko", NOISE[:20_000] + kernel)]))
        name = f"6.12-{vmlinuz.digest[:8]}{disk.digest[:8]}"
        manifest = Manifest(
            version=version, layout="test", architecture="amd64", epoch=1_700_000_000, schema_level=1,
            layers=tuple(layers),
            kernel=KernelRecord(name, "6.12", "quiet", vmlinuz, disk),
            packages=tuple(PackageRecord(key, value, "all") for key, value in (packages or {"nginx": "1.26"}).items()),
        )  # fmt: skip
        manifest = manifest._replace(**changes)
        content = dump(manifest)
        files = {one.name: one for one in self.folder.iterdir()}
        return ReleaseFiles(content, manifest, files)
