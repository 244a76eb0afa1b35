"""Layers: trees become EROFS images with a digest, each packed into a squashfs for the ISO.

No root is needed: an image is made from a tar that says who owns what. Every option that could let a host, a user or a
clock into the image is fixed here. The image is not compressed (deltas between releases stay small), its squashfs is.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from appliance.errors import ApplianceError
from appliance.model import Layer, LayerKind, Lock, RenderedFile, RenderedTree, Wheel
from appliance.rootfs import Rootfs
from appliance.store import Store, digest_of_files
from appliance.tools import Tools

APP_ROOT = "/opt/samepage"
_UUIDS = uuid.UUID("3f6f1f1a-0f0c-4f2e-9b77-5a2d1c9e4b10")
_FAST, _STRONG = 3, 19  # zstd levels
_BYTECODE = Path(__file__).with_name("bytecode.py")
_CODE = digest_of_files({"layers.py": Path(__file__)})  # other code may make other bytes

Wheels = Callable[[Iterable[Wheel]], Mapping[str, Path]]
"""Fetches wheels: their files by sha256."""


def build_base(lock: Lock, rootfs: Rootfs, tools: Tools, store: Store, *, strong: bool = False) -> Layer:
    """The layer of all Debian packages. `strong` packs it as small as it gets, for a release."""
    inputs = _inputs(tools, lock, tree=rootfs.key)
    return _layer(
        "base", "", inputs, lambda out: _erofs(tools, lock, "base", rootfs.tar, out), lock, tools, store, strong
    )


def build_app(
    lock: Lock,
    tree: RenderedTree,
    wheels: tuple[Wheel, ...],
    fetch_wheels: Wheels,
    tools: Tools,
    store: Store,
    *,
    strong: bool = False,
) -> Layer:
    """The layer of the product's and the platform's own code, mounted at /opt/samepage; the same for all nodes that run
    the same recipes. Python files are compiled for the node's Python. Raises CommandError when one does not compile."""
    inputs = _inputs(
        tools,
        lock,
        files=_digest_of_rendered(tree.app),
        wheels=json.dumps(sorted(wheel.sha256 for wheel in wheels)),
        compiler=digest_of_files({"bytecode.py": _BYTECODE}),
    )

    def build(out: Path) -> None:
        files: dict[str, bytes] = {}
        for sha256, wheel in sorted(fetch_wheels(wheels).items() if wheels else ()):
            files.update(_unpack_wheel(wheel, sha256))
        entries = [_plain(path, content, lock.epoch) for path, content in files.items()]
        entries += [_rendered(file, APP_ROOT, lock.epoch) for file in tree.app]
        with tempfile.TemporaryDirectory(dir=out.parent) as name:
            entries += _compiled(tools, entries, Path(name), lock.epoch)
            _erofs(tools, lock, "app", _tar(entries, lock.epoch, Path(name) / "tar"), out)

    return _layer("app", "", inputs, build, lock, tools, store, strong)


def build_config(lock: Lock, tree: RenderedTree, tools: Tools, store: Store, *, strong: bool = False) -> Layer:
    """The layer of one node's rendered /etc."""
    inputs = _inputs(tools, lock, files=_digest_of_rendered(tree.config))

    def build(out: Path) -> None:
        entries = [_rendered(file, "", lock.epoch) for file in tree.config]
        with tempfile.TemporaryDirectory(dir=out.parent) as name:
            _erofs(tools, lock, "config", _tar(entries, lock.epoch, Path(name) / "tar"), out)

    return _layer("config", tree.node, inputs, build, lock, tools, store, strong)


# --- image and squashfs ----------------------------------------------------------------------------------------------


def _inputs(tools: Tools, lock: Lock, **more: str) -> dict[str, str]:
    return {"code": _CODE, "tools root": tools.version, "clock": str(lock.epoch), **more}


def _layer(
    kind: LayerKind,
    node: str,
    inputs: dict[str, str],
    build: Callable[[Path], None],
    lock: Lock,
    tools: Tools,
    store: Store,
    strong: bool,
) -> Layer:
    def make_image(folder: Path) -> None:
        image = folder / "image"
        build(image)
        image.chmod(0o644)  # the squashfs holds it with its mode
        image.rename(folder / f"{kind}-{_sha256(image)}.erofs")

    image = next(store.step(kind, inputs, make_image).iterdir())
    level = _STRONG if strong else _FAST

    def make_packed(folder: Path) -> None:
        packed = folder / "packed"
        _squashfs(tools, lock, image, packed, level)
        packed.rename(folder / f"{image.stem}.{_sha256(packed)}.squashfs")

    packed = next(
        store.step(f"{kind}-packed", {**inputs, "image": image.name, "level": str(level)}, make_packed).iterdir()
    )
    digest, packed_digest = image.stem.rpartition("-")[2], packed.name.split(".")[1]
    return Layer(kind, node, digest, image.stat().st_size, image, packed, packed_digest)


def _erofs(tools: Tools, lock: Lock, kind: LayerKind, tar: Path, out: Path) -> None:
    tools.run(
        "mkfs.erofs",
        "--quiet",
        "--tar=f",
        f"-T{lock.epoch}",
        "--mkfs-time",
        f"-U{uuid.uuid5(_UUIDS, kind)}",
        f"-Lsamepage-{kind}",
        "-b4096",
        "-x-1",
        "--workers=1",
        "-Enoinline_data",  # files behind a changed one then move by whole blocks, and inodes do not: deltas stay small
        out,
        tar,
    )


def _squashfs(tools: Tools, lock: Lock, image: Path, out: Path, level: int) -> None:
    tools.run(
        "mksquashfs",
        image,
        out,
        "-noappend",
        "-no-progress",
        "-quiet",
        "-no-xattrs",
        "-no-exports",
        "-all-root",
        "-b",
        "1M",
        "-comp",
        "zstd",
        "-Xcompression-level",
        str(level),
        "-mkfs-time",
        str(lock.epoch),
        "-all-time",
        str(lock.epoch),
        "-root-mode",
        "755",
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- trees -----------------------------------------------------------------------------------------------------------

Entry = tuple[tarfile.TarInfo, bytes]


def _digest_of_rendered(files: Iterable[RenderedFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        head = [file.path, file.mode, file.uid, file.gid, file.link, len(file.content)]
        digest.update(json.dumps(head).encode() + b"\0" + file.content)
    return digest.hexdigest()


def _rendered(file: RenderedFile, root: str, epoch: int) -> Entry:
    """A tar entry; `root` is where the layer is mounted."""
    inside = file.path.removeprefix(root).strip("/")
    member = tarfile.TarInfo(inside)
    member.mode, member.uid, member.gid, member.mtime = file.mode, file.uid, file.gid, epoch
    if file.link:
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, file.link, 0o777
    elif file.path.endswith("/"):
        member.type = tarfile.DIRTYPE
    else:
        member.size = len(file.content)
    return member, file.content


def _plain(path: str, content: bytes, epoch: int, mode: int = 0o644) -> Entry:
    member = tarfile.TarInfo(path)
    member.mode, member.mtime, member.size = mode, epoch, len(content)
    return member, content


def _tar(entries: Iterable[Entry], epoch: int, out: Path) -> Path:
    """A tar of the entries, sorted, with the folders that lead to them; a later entry of the same name wins."""
    members = {member.name: (member, content) for member, content in entries}
    for name in list(members):
        for parent in PurePosixPath(name).parents:
            folder = tarfile.TarInfo("" if str(parent) == "." else str(parent))
            folder.type, folder.mode, folder.mtime = tarfile.DIRTYPE, 0o755, epoch
            if folder.name:
                members.setdefault(folder.name, (folder, b""))
    root = tarfile.TarInfo(".")
    root.type, root.mode, root.mtime = tarfile.DIRTYPE, 0o755, epoch
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in [(root, b""), *(members[name] for name in sorted(members))]:
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return out


def _compiled(tools: Tools, entries: list[Entry], folder: Path, epoch: int) -> list[Entry]:
    """The compiled form of every Python module under lib/, valid whatever the clock says: a layer never changes."""
    sources = {
        member.name: content
        for member, content in entries
        if member.isreg() and member.name.startswith("lib/") and member.name.endswith(".py")
    }
    if not sources:
        return []
    root = folder / "python"
    for name, content in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    tools.run("python3.13", "-s", "-S", "-P", _BYTECODE, root, APP_ROOT, hint="correct the Python file named above")
    return [_plain(str(file.relative_to(root)), file.read_bytes(), epoch) for file in sorted(root.rglob("*.pyc"))]


def _unpack_wheel(wheel: Path, sha256: str) -> dict[str, bytes]:
    """A wheel's modules, under lib/. Raises ApplianceError when it is not a wheel that can simply be unpacked."""
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                parts = PurePosixPath(name).parts
                if name.endswith("/") or ".." in parts or name.startswith("/"):
                    continue
                if parts[0].endswith(".data"):
                    if parts[1] not in ("purelib", "platlib"):
                        continue  # scripts and headers: units call modules
                    parts = parts[2:]
                files["/".join(("lib", *parts))] = archive.read(name)
    except zipfile.BadZipFile as error:
        raise ApplianceError(
            f"the wheel {sha256[:12]} is damaged: {error}", hint="remove it with ./build.py clean"
        ) from error
    return files
