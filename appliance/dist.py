"""The files in dist/: each whole or not there, and left alone while what they are made of stays the same.

Beside an image stand its checksum, the release's manifest, the list of packages and the SBOM. What was written is known
by a record of the image's inputs, size and time, so that an unchanged image is neither written nor read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from appliance.console import Console
from appliance.iso import put_beside
from appliance.model import Artifact, Release
from appliance.store import digest_of_files, key_of

if TYPE_CHECKING:
    from appliance.pipeline import Built, Output


def publish(built: Built, target: Path, code: str, write: Callable[[], Artifact], console: Console) -> Output:
    """The image at `target`, written by `write` unless the same inputs left it there; companions beside it."""
    from appliance.pipeline import Output

    name = key_of({"image": str(target.absolute())})
    with built.store.locked(f"dist-{name[:16]}", f"another build writes {target.name}; waiting for it"):
        artifact, rewritten = _settle(built, target, inputs_of(built, code), write, console)
        for path, content in companions(built, artifact).items():
            if not path.exists() or path.read_bytes() != content:
                put_beside(path, content)
    with built.store.locked(
        f"rendered-{key_of({'project': str(built.options.project)})[:16]}", "waiting for another build"
    ):
        keep_rendered(built)
    return Output(artifact, built, rewritten)


def _settle(
    built: Built, target: Path, inputs: dict[str, str], write: Callable[[], Artifact], console: Console
) -> tuple[Artifact, bool]:
    """The image as it stands, or written anew; and whether it was."""
    record = Record.read(target)
    if record is not None and record.inputs == inputs and record.fits(target):
        console.reused(target.suffix.removeprefix("."))
        return Artifact(target, record.sha256, record.size), False
    require_room_for(built, target)
    for stale in (record_file(target), target):
        stale.unlink(missing_ok=True)  # a build killed from here on must not leave an old image with new companions
    artifact = write()
    status = target.stat()
    Record(inputs, artifact.sha256, status.st_size, status.st_mtime_ns).write(target)
    return artifact, True


def inputs_of(built: Built, code: str) -> dict[str, str]:
    """What the bytes of an image depend on."""
    packed = {f"layer {layer.kind} {layer.node}".strip(): layer.packed_digest for layer in built.layers}
    manifest = {"manifest": key_of({"manifest": built.release.manifest.decode()})}
    return packed | manifest | {"boot files": built.boot.name, "node": built.options.node, "code": code}


def code_of(module: ModuleType) -> str:
    """A digest of the code that writes an image."""
    file = Path(str(module.__file__))
    return digest_of_files({file.name: file, "bootloader.py": file.with_name("bootloader.py")})


def companions(built: Built, artifact: Artifact) -> dict[Path, bytes]:
    """The small files beside an image."""
    from appliance.sbom import make_sbom

    image = artifact.path

    def beside(suffix: str) -> Path:
        return image.with_name(image.stem + suffix)

    return {
        image.with_name(image.name + ".sha256"): f"{artifact.sha256}  {image.name}\n".encode(),
        beside(".manifest.json"): built.release.manifest,
        beside(".packages.txt"): package_list(built.release),
        beside(".sbom.json"): make_sbom(built.release, built.model),
    }


def package_list(release: Release) -> bytes:
    """One line per package: name, version, architecture, parted by tabs."""
    rows = sorted(f"{package.name}\t{package.version}\t{package.architecture}" for package in release.packages)
    return ("\n".join(rows) + "\n").encode()


def require_room_for(built: Built, target: Path) -> None:
    """Raise HostError with the figure when the image does not fit beside what stands there."""
    from appliance.store import require_room

    packed = sum(layer.packed.stat().st_size for layer in built.layers)
    kernel = built.release.kernel
    require_room(
        {
            target.parent: int(1.02 * (packed + kernel.vmlinuz.stat().st_size + kernel.initrd.stat().st_size))
            + (80 << 20)
        }
    )


def keep_rendered(built: Built) -> None:
    """Keeps what was rendered, for `render --diff`."""
    from appliance.errors import ApplianceError
    from appliance.treefiles import read_tree, write_tree

    for tree in built.trees:
        folder = built.options.project / ".samepage" / "rendered" / built.model.name / tree.node
        try:
            same = read_tree(folder) == tree
        except ApplianceError:
            same = False
        if not same:
            folder.mkdir(parents=True, exist_ok=True)
            write_tree(tree, folder)


# --- records ---------------------------------------------------------------------------------------------------------


def record_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.record")


@dataclass(frozen=True, slots=True)
class Record:
    """What an image in dist/ was made of, and how its file looked when it was finished."""

    inputs: dict[str, str]
    sha256: str
    size: int
    time: int  # nanoseconds

    @classmethod
    def read(cls, target: Path) -> Record | None:
        try:
            stored: dict[str, Any] = json.loads(record_file(target).read_text(encoding="utf-8"))
            return cls(stored["inputs"], stored["sha256"], stored["size"], stored["time"])
        except (OSError, ValueError, KeyError):
            return None

    def write(self, target: Path) -> None:
        stored = {"inputs": self.inputs, "sha256": self.sha256, "size": self.size, "time": self.time}
        put_beside(record_file(target), json.dumps(stored, indent=1, sort_keys=True).encode())

    def fits(self, target: Path) -> bool:
        """Whether the file is the one that was recorded, by size and time."""
        try:
            status = target.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.time)
