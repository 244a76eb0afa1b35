"""The record of a release: manifest, layers file, boot record."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node.release import (
    File,
    KernelRecord,
    LayerRecord,
    Manifest,
    PackageRecord,
    ReleaseError,
    boot_record,
    dump,
    dump_layers,
    parse,
    parse_layers,
)

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
WORDS = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,12}", fullmatch=True)
SIZES = st.integers(0, 1 << 40)
FILES = st.builds(File, DIGESTS, SIZES)


def layers_of(nodes: list[str]) -> st.SearchStrategy[tuple[LayerRecord, ...]]:
    kinds = [("base", ""), ("app", ""), *(("config", node) for node in nodes)]
    return st.tuples(*(st.builds(LayerRecord, st.just(kind), st.just(node), DIGESTS, SIZES) for kind, node in kinds))


MANIFESTS = st.builds(
    Manifest, WORDS, WORDS, st.just("amd64"), SIZES, st.integers(0, 99),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True).flatmap(layers_of),
    st.builds(KernelRecord, WORDS, WORDS, st.from_regex(r"[a-z0-9=., /:-]*", fullmatch=True), FILES, FILES),
    st.lists(st.builds(PackageRecord, WORDS, st.text(max_size=8), st.just("all")), max_size=3).map(tuple),
)  # fmt: skip


def example(**changes: Any) -> Manifest:
    digest = iter("0123456789abcdef")

    def record(kind: str, node: str = "") -> LayerRecord:
        return LayerRecord(kind, node, next(digest) * 64, 4096)

    manifest = Manifest(
        "1.2.0", "private-cloud", "amd64", 1_763_800_000, 3, (record("base"), record("app"), record("config", "one")),
        KernelRecord("6.12-ab", "6.12", "quiet", File("e" * 64, 10), File("f" * 64, 20)),
        (PackageRecord("a", "1", "all"),),
    )  # fmt: skip
    return manifest._replace(**changes)


@given(MANIFESTS)
def test_manifest_reads_back(manifest: Manifest) -> None:
    content = dump(manifest)
    assert parse(content) == manifest
    assert dump(parse(content)) == content


def set_key(value: Any, key: str, new: Any) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        value = value[int(folder)] if folder.isdigit() else value[folder]
    value[int(last) if last.isdigit() else last] = new


@pytest.mark.parametrize(
    ("key", "new", "named"),
    [
        ("format", 2, "format 2"), ("version", "1/../../2", "version"), ("version", "1 2", "version"),
        ("version", "", "version"), ("version", "a\n", "version"), ("epoch", "now", "epoch"), ("epoch", -1, "epoch"),
        ("epoch", True, "epoch"), ("layers", {}, "layers"), ("layers.0.kind", "boot", "layers[0].kind"),
        ("layers.1.digest", "F" * 64, "layers[1].digest"), ("layers.2.size", None, "layers[2].size"),
        ("kernel", [], "kernel"), ("kernel.id", "../x", "kernel.id"), ("kernel.cmdline", "a'b", "kernel.cmdline"),
        ("kernel.cmdline", "a;b", "kernel.cmdline"), ("kernel.files.initrd.digest", "", "kernel.files.initrd.digest"),
        ("packages", [1], "packages[0]"), ("layers.0.kind", "app", "base, app and config"),
    ],
)  # fmt: skip
def test_wrong_manifest_names_the_key(key: str, new: Any, named: str) -> None:
    value = json.loads(dump(example()))
    set_key(value, key, new)
    with pytest.raises(ReleaseError) as caught:
        parse(json.dumps(value).encode())
    assert named in str(caught.value)


@given(st.binary(max_size=40))
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises(ReleaseError):
        parse(content)


def test_layers_of_one_node() -> None:
    second = LayerRecord("config", "two", "9" * 64, 1)
    manifest = example(layers=(*example().layers, second))
    assert [record.node for record in manifest.layers_of("two")] == ["", "", "two"]
    with pytest.raises(ReleaseError, match="more than one config"):
        manifest.layers_of()
    with pytest.raises(ReleaseError, match="no config layer for node three"):
        manifest.layers_of("three")


def test_layers_file_reads_back_and_refuses_gaps() -> None:
    records = example().layers_of()
    content = dump_layers(records)
    assert content.splitlines()[0] == b"base " + b"0" * 64
    assert parse_layers(content) == {record.kind: record.digest for record in records}
    for broken in (content.splitlines(keepends=True)[0], content + content, b"base x\n", b"\xff\n", b""):
        with pytest.raises(ReleaseError, match="layers"):
            parse_layers(broken)


def test_boot_record_is_quoted_for_grub_and_the_shell(tmp_path: Path) -> None:
    text = boot_record(example(), 7).decode()
    assert text == "set release='1.2.0'\nset kernel='6.12-ab'\nset data='7'\nset options='quiet'\n"
    checker = shutil.which("grub-script-check")
    if checker:
        (tmp_path / "record").write_text(text)
        subprocess.run([checker, tmp_path / "record"], check=True)
