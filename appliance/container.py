"""The same layers as a container image: what an engine unpacks, and the little that a container needs besides.

A folder with `base.json` (digest and tar of the base layer), `app.tar`, `config.tar` and `container.tar`.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path

from appliance.model import Layer, Release, RenderedFile, RenderedTree
from appliance.store import Store, key_of
from appliance.tools import Tools

BASE_RECORD = "base.json"
ARCHIVES = {"app.tar": "/opt/samepage/", "config.tar": "/", "container.tar": "/"}
RELEASE = "usr/lib/samepage/release.json"

# A container's engine owns the network interface and the clock; what stands in /run on a machine comes from tmpfiles.
ADAPTATION = {
    "etc/systemd/network/10-container.network": "[Match]\nName=eth*\n\n[Link]\nUnmanaged=yes\n",
    "etc/tmpfiles.d/samepage-container.conf": (
        "d /run/samepage 0755 root root -\n"
        "f+ /run/samepage/mode 0644 root root - container\n"
        f"C+ /run/samepage/release.json 0644 root root - /{RELEASE}\n"
    ),
}


def make(release: Release, tree: RenderedTree, base_tar: Path, tools: Tools, store: Store) -> Path:
    """The folder that describes the container image of one node."""
    layers = {layer.kind: layer for layer in release.layers if layer.node in ("", tree.node)}
    inputs = {
        **{f"layer {kind}": layer.digest for kind, layer in layers.items()},
        "base tar": str(base_tar),
        "manifest": key_of({"manifest": release.manifest.decode()}),
        "code": key_of({"code": Path(__file__).read_text(encoding="utf-8")}),
    }

    def build(folder: Path) -> None:
        record = {"digest": layers["base"].digest, "tar": str(base_tar)}
        (folder / BASE_RECORD).write_text(json.dumps(record), encoding="utf-8")
        _app(layers["app"], tree.app, tools, folder / "app.tar", release.epoch)
        with tarfile.open(folder / "config.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for file in tree.config:
                _add(tar, _member(file, file.path.strip("/"), release.epoch), file.content)
        with tarfile.open(folder / "container.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            files = {RELEASE: release.manifest} | {name: text.encode() for name, text in ADAPTATION.items()}
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o644, release.epoch
                _add(tar, member, content)

    return store.step("container", inputs, build)


def _app(layer: Layer, files: tuple[RenderedFile, ...], tools: Tools, out: Path, epoch: int) -> None:
    """The app layer's image as a tar; only what recipes give to others than root has another owner."""
    owners = {file.path.removeprefix("/opt/samepage/").strip("/"): (file.uid, file.gid) for file in files}

    def settle(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid, member.gid = owners.get(member.name.removeprefix("./"), (0, 0))
        member.uname = member.gname = ""
        member.mtime = epoch
        return member

    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name) / "app"
        folder.mkdir(mode=0o755)
        tools.run(
            "fsck.erofs", f"--extract={folder}", "--overwrite", "--no-preserve-owner", "--preserve-perms", layer.image
        )
        with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(folder, ".", filter=settle)


def _member(file: RenderedFile, name: str, epoch: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid, member.mtime = file.mode, file.uid, file.gid, epoch
    if file.link:
        member.type, member.linkname = tarfile.SYMTYPE, file.link
    elif file.path.endswith("/"):
        member.type = tarfile.DIRTYPE
    else:
        member.size = len(file.content)
    return member


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, content: bytes) -> None:
    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
