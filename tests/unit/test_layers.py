"""Layers with stand-ins for the tools: an image is its tar, a squashfs is its image. Real images: tests/artifact."""

from __future__ import annotations

import hashlib
import marshal
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from appliance import bytecode, layers
from appliance.errors import ApplianceError, CommandError
from appliance.model import Lock, Place, RenderedFile, RenderedTree, Wheel
from appliance.rootfs import Rootfs
from appliance.run import run
from appliance.store import Store
from appliance.tools import Tools

LOCK = Lock("trixie", 1_700_000_000, {}, {})


@dataclass(frozen=True)
class FakeTools(Tools):
    calls: list[list[str]] = field(default_factory=list, compare=False)

    def run(self, program: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
        words = [program, *map(str, arguments)]
        self.calls.append(words)
        if program == "mkfs.erofs":
            shutil.copyfile(words[-1], words[-2])
        elif program == "mksquashfs":
            shutil.copyfile(words[1], words[2])
        else:
            # the tests' Python in the place of the node's
            return run([sys.executable, *arguments], hint=options.get("hint", ""))
        return subprocess.CompletedProcess(words, 0, b"", b"")

    def programs(self) -> list[str]:
        return [words[0] for words in self.calls]


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path, "1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", tmp_path)


def file(path: str, content: bytes = b"x", mode: int = 0o644, owner: int = 0, link: str = "") -> RenderedFile:
    return RenderedFile(path, content, mode, owner, owner, "r", "recipes/r/files" + path, link)


TREE = RenderedTree(
    "one",
    config=(
        file("/etc/samepage/node.json", b"{}"),
        file("/etc/secret", mode=0o640, owner=810),
        file("/etc/folder/", mode=0o750, owner=811),
        file("/etc/masked.service", link="/dev/null"),
    ),
    app=(
        file("/opt/samepage/bin/run", b"#!/bin/sh\n", 0o755),
        file("/opt/samepage/lib/product/main.py", b"import os\n"),
    ),
)


def no_wheels(_: Iterable[Wheel]) -> Mapping[str, Path]:
    raise AssertionError("nothing to fetch")


def members(image: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(image) as tar:
        return {member.name: member for member in tar}


def app(tools: Tools, store: Store, tree: RenderedTree = TREE) -> layers.Layer:
    return layers.build_app(LOCK, tree, (), no_wheels, tools, store)


def test_config_holds_what_was_rendered_and_nothing_of_the_host(tools: FakeTools, store: Store) -> None:
    layer = layers.build_config(LOCK, TREE, tools, store)
    found = members(layer.image)
    assert list(found) == [
        ".", "etc", "etc/folder", "etc/masked.service", "etc/samepage", "etc/samepage/node.json", "etc/secret"
    ]  # fmt: skip
    assert {(member.uname, member.gname) for member in found.values()} == {("", "")}
    assert {member.mtime for member in found.values()} == {LOCK.epoch}
    secret, folder, link = found["etc/secret"], found["etc/folder"], found["etc/masked.service"]
    assert (secret.uid, secret.gid, secret.mode) == (810, 810, 0o640)
    assert (folder.isdir(), folder.uid, folder.mode) == (True, 811, 0o750)
    assert (link.issym(), link.linkname) == (True, "/dev/null")
    assert (layer.kind, layer.node) == ("config", "one")


def test_an_image_is_called_by_its_digest(tools: FakeTools, store: Store) -> None:
    layer = layers.build_config(LOCK, TREE, tools, store)
    assert layer.image.name == f"config-{layer.digest}.erofs"
    assert layer.digest == hashlib.sha256(layer.image.read_bytes()).hexdigest()
    assert layer.packed_digest == hashlib.sha256(layer.packed.read_bytes()).hexdigest()
    assert layer.size == layer.image.stat().st_size


def test_nothing_is_made_twice(tools: FakeTools, store: Store) -> None:
    first = layers.build_config(LOCK, TREE, tools, store)
    assert tools.programs() == ["mkfs.erofs", "mksquashfs"]
    assert layers.build_config(LOCK, TREE, tools, store) == first
    assert layers.build_config(LOCK, replace(TREE, node="two"), tools, store).digest == first.digest
    assert len(tools.calls) == 2


def changed(tree: RenderedTree, **values: Any) -> RenderedTree:
    """The tree with another first file."""
    return replace(tree, config=(replace(tree.config[0], **values), *tree.config[1:]))


@pytest.mark.parametrize(
    "change",
    [
        lambda lock, tree, tools: (replace(lock, epoch=1), tree, tools),
        lambda lock, tree, tools: (lock, tree, replace(tools, version="2")),
        lambda lock, tree, tools: (lock, replace(tree, config=(*tree.config, file("/etc/more"))), tools),
        lambda lock, tree, tools: (lock, changed(tree, mode=0o600), tools),
        lambda lock, tree, tools: (lock, changed(tree, uid=1), tools),
        lambda lock, tree, tools: (lock, changed(tree, content=b"[]"), tools),
    ],
)
def test_every_input_makes_another_layer(tools: FakeTools, store: Store, change: Any) -> None:
    layers.build_config(LOCK, TREE, tools, store)
    lock, tree, other = change(LOCK, TREE, tools)
    layers.build_config(lock, tree, other, store)
    assert tools.programs().count("mkfs.erofs") == 2


def test_a_release_packs_the_same_image_tighter(tools: FakeTools, store: Store) -> None:
    fast = layers.build_config(LOCK, TREE, tools, store)
    strong = layers.build_config(LOCK, TREE, tools, store, strong=True)
    assert strong.image == fast.image
    levels = [words[words.index("-Xcompression-level") + 1] for words in tools.calls if words[0] == "mksquashfs"]
    assert [int(level) for level in levels] == sorted(int(level) for level in levels)
    assert len(levels) == 2


def test_app_brings_compiled_python(tools: FakeTools, store: Store) -> None:
    found = members(app(tools, store).image)
    assert found["bin/run"].mode == 0o755
    assert "lib/product/main.py" in found
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    assert f"lib/product/__pycache__/main.{tag}.pyc" in found


def test_compiled_python_is_valid_whatever_the_clock_says(tools: FakeTools, store: Store) -> None:
    with tarfile.open(app(tools, store).image) as tar:
        member = next(member for member in tar if member.name.startswith("lib/product/__pycache__/main."))
        stream = tar.extractfile(member)
        assert stream is not None
        content = stream.read()
    assert int.from_bytes(content[4:8], "little") == 0b01  # by hash, and never checked
    assert marshal.loads(content[16:]).co_filename == "/opt/samepage/lib/product/main.py"


def test_a_new_constant_changes_nothing_behind_it() -> None:
    """So that the next release of a module needs few bytes."""
    rest = "".join(f"\ndef f{number}(self): return self.name, 'shared', {number}.5" for number in range(30))
    old, new = f"x = 'shared'{rest}", f"x = ('another', 'shared'){rest}"
    module = compile(old, "/m.py", "exec", dont_inherit=True)
    functions = [each for each in module.co_consts if isinstance(each, CodeType)]
    assert len(functions) == 30
    for source in (old, new):
        content = bytecode.compiled(source.encode(), "/m.py")
        assert all(marshal.dumps(each, bytecode.WITHOUT_REFERENCES) in content for each in functions)


def test_python_that_does_not_compile_is_named(tools: FakeTools, store: Store) -> None:
    broken = replace(TREE, app=(file("/opt/samepage/lib/product/broken.py", b"def :\n"),))
    with pytest.raises(CommandError, match=r"/opt/samepage/lib/product/broken\.py:1: "):
        app(tools, store, broken)


def wheel(folder: Path, files: dict[str, bytes]) -> tuple[Wheel, Path]:
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return Wheel("thing==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), Place("recipes/r/recipe.yaml")), path


def test_wheels_are_unpacked_without_their_scripts(tools: FakeTools, store: Store, tmp_path: Path) -> None:
    content = {
        "thing/__init__.py": b"x = 1\n", "thing-1.0.dist-info/METADATA": b"Name: thing\n",
        "thing-1.0.data/purelib/pure.py": b"", "thing-1.0.data/scripts/run": b"#!python\n", "../out.py": b"",
    }  # fmt: skip
    one, path = wheel(tmp_path, content)
    layer = layers.build_app(LOCK, TREE, (one,), lambda _: {one.sha256: path}, tools, store)
    names = set(members(layer.image))
    assert {"lib/thing/__init__.py", "lib/pure.py", "lib/thing-1.0.dist-info/METADATA"} <= names
    assert not [name for name in names if "scripts" in name or name.endswith("/out.py")]


def test_a_damaged_wheel_is_named(tools: FakeTools, store: Store, tmp_path: Path) -> None:
    one, path = wheel(tmp_path, {"a.py": b""})
    path.write_bytes(b"nothing")
    with pytest.raises(ApplianceError, match=f"the wheel {one.sha256[:12]} is damaged"):
        layers.build_app(LOCK, TREE, (one,), lambda _: {one.sha256: path}, tools, store)


def test_base_is_the_tree_as_it_is(tools: FakeTools, store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree.tar").write_bytes(b"tree")
    rootfs = Rootfs(tmp_path / "tree.tar", tmp_path, "key")
    layer = layers.build_base(LOCK, rootfs, tools, store)
    assert layer.image.read_bytes() == b"tree"
    assert layers.build_base(LOCK, rootfs, tools, store) == layer
    layers.build_base(LOCK, replace(rootfs, key="other"), tools, store)
    assert tools.programs().count("mkfs.erofs") == 2


def test_images_state_no_host_user_or_clock(tools: FakeTools, store: Store) -> None:
    layers.build_config(LOCK, TREE, tools, store)
    erofs, squashfs = tools.calls
    assert f"-T{LOCK.epoch}" in erofs
    assert any(word.startswith("-U") for word in erofs)
    assert squashfs[squashfs.index("-mkfs-time") + 1] == str(LOCK.epoch)
    assert squashfs[squashfs.index("-all-time") + 1] == str(LOCK.epoch)
    assert "-all-root" in squashfs
