"""An old release, and a bundle that leads from it to a new one."""

from __future__ import annotations

from pathlib import Path

from appliance import bundle as making
from appliance.node import bundle, signed
from appliance.node.upgrade import records, staging
from tests.unit.releases import SIGNER, TRUST, Maker


class Sample:
    """An old release on a state partition, and a bundle to a new one."""

    def __init__(self, folder: Path) -> None:
        (folder / "files").mkdir()
        maker = Maker(folder / "files")
        self.old, self.new = maker.release(), maker.release("1.1", nginx=b"two", app=b"print(2)")
        self.bundle = making.make(self.old, self.new, SIGNER, folder / "bundle").path.read_bytes()
        front = self.bundle[: signed.FRONT_SIZE]
        end = signed.FRONT_SIZE + signed.header_size(front, bundle.MAGIC, "bundle")
        self.header = signed.unseal(front, self.bundle[signed.FRONT_SIZE : end], TRUST, "bundle")
        self.payload = self.bundle[end:]
        self.folder = folder

    def state(self, name: str) -> Path:
        """A state partition with the old release; made once for each name."""
        root = self.folder / name / "state"
        if not root.exists():
            for digest, file in staging.wanted_files(str(root), self.old.manifest, "one").items():
                Path(file.path).parent.mkdir(parents=True, exist_ok=True)
                Path(file.path).write_bytes(self.old.files[digest].read_bytes())
            records.record_release(str(root), "1.0", self.old.content, "one")
        return root

    def write(self, content: bytes) -> str:
        path = self.folder / "spoiled"
        path.write_bytes(content)
        return str(path)
