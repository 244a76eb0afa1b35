"""Bundles: what is made is applied, and nothing else is: each refusal has its own message and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import bundle as making
from appliance.errors import ApplianceError
from appliance.node import bundle, refusals, signed
from appliance.node.bundle import Info, check_fit, open_bundle, parse_info, read_info
from appliance.node.keys import SECRET, KeyFileError, Signer, Trust, dump_key, load_trust, parse_key, parse_revoked
from appliance.node.plan import classify, touched_units
from appliance.node.versions import order
from tests.unit.releases import NOISE, OTHER, SIGNER, TRUST, Maker


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    (tmp_path / "files").mkdir()
    return Maker(tmp_path / "files")


def make(old: making.ReleaseFiles | None, new: making.ReleaseFiles, out: Path, signer: Signer = SIGNER) -> Path:
    return making.make(old, new, signer, out).path


def apply_all(path: Path, old: making.ReleaseFiles | None, folder: Path) -> dict[str, bytes]:
    """Every file that the bundle makes, by digest; sources are the old release's files and what was made before."""
    made: dict[str, bytes] = {}
    folder.mkdir(exist_ok=True)
    with open_bundle(str(path), TRUST) as opened:
        manifest = opened.manifest(old.content if old else None)
        assert sha256(manifest).hexdigest() == opened.info.manifest
        for part in opened.info.parts[1:]:
            target = folder / part.digest
            with target.open("w+b") as out:
                opened.extract(
                    part,
                    lambda digest: str(folder / digest if digest in made else old.files[digest] if old else ""),
                    out,
                )
            made[part.digest] = target.read_bytes()
    return made


def check_made(new: making.ReleaseFiles, old: making.ReleaseFiles | None, made: dict[str, bytes]) -> None:
    had = bundle.files_of(old.manifest) if old else {}
    wanted = {digest for digest in bundle.files_of(new.manifest) if digest not in had}
    assert set(made) == wanted
    assert all(content == new.files[digest].read_bytes() for digest, content in made.items())


CHANGES: dict[str, dict[str, Any]] = {
    "config": {"nginx": b"two"},
    "app": {"app": b"print(2)"},
    "base": {"library": NOISE[:30_000] + b"patched" + NOISE[30_007:]},
    "kernel": {"kernel": b"linux 2"},
    "all": {"nginx": b"two", "app": b"print(2)", "library": NOISE[5:], "kernel": b"linux 2"},
    "version only": {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_makes_the_new_release(maker: Maker, tmp_path: Path, change: str) -> None:
    old, new = maker.release(), maker.release("1.1", **CHANGES[change])
    path = make(old, new, tmp_path / "bundle")
    check_made(new, old, apply_all(path, old, tmp_path / "made"))
    assert path.stat().st_size < (9000 if change == "all" else 6500)


def test_a_full_bundle_needs_nothing(maker: Maker, tmp_path: Path) -> None:
    new = maker.release("2.0", nodes=("one", "two"))
    path = make(None, new, tmp_path / "bundle")
    check_made(new, None, apply_all(path, None, tmp_path / "made"))
    assert read_info(str(path), TRUST).full


def test_a_small_change_makes_a_small_bundle(maker: Maker, tmp_path: Path) -> None:
    packages = {f"package-{number}": f"1.{number}" for number in range(200)}
    text = b"".join(b"setting_%d = %d;\n" % (number, number * 7) for number in range(120))
    old = maker.release(nginx=text, packages=packages)
    new = maker.release("1.1", nginx=text.replace(b"setting_50 = 350", b"setting_50 = 512"), packages=packages)
    assert make(old, new, tmp_path / "bundle").stat().st_size <= 2048


def test_a_new_node_gets_its_config_from_another(maker: Maker, tmp_path: Path) -> None:
    old, new = maker.release(), maker.release("1.1", nodes=("one", "two"))
    path = make(old, new, tmp_path / "bundle")
    check_made(new, old, apply_all(path, old, tmp_path / "made"))
    info = read_info(str(path), TRUST)
    assert [part.kind for part in info.parts_for("one")] == ["manifest"]
    assert [part.node for part in info.parts_for("two")] == ["", "two"]


def test_the_same_releases_make_the_same_bytes(maker: Maker, tmp_path: Path) -> None:
    old, new = maker.release(), maker.release("1.1", **CHANGES["all"])
    assert make(old, new, tmp_path / "a").read_bytes() == make(old, new, tmp_path / "b").read_bytes()


def test_the_summary_says_what_changes(maker: Maker, tmp_path: Path) -> None:
    old = maker.release(packages={"nginx": "1.26", "gone": "1"}, migrations=("0001_first.sql",))
    new = maker.release(
        "1.1", nginx=b"two", packages={"nginx": "1.27", "fresh": "2"}, schema_level=2,
        migrations=("0001_first.sql", "0002_tags.sql"),
    )  # fmt: skip
    path = make(old, new, tmp_path / "bundle")
    info = read_info(str(path), TRUST)
    assert info.summary == {
        "class": "live",
        "packages": {"fresh": ["", "2"], "gone": ["1", ""], "nginx": ["1.26", "1.27"]},
        "units": {"one": {"nginx.service": "reload"}},
        "migrations": [1, 2],
        "migration_files": ["0002_tags.sql"],
    }
    text = making.describe(info, path.stat().st_size)
    for line in (
        "release 1.0 -> release 1.1  (test, amd64)",
        "class: live: only the units named below are touched",
        "unchanged: base, vmlinuz, initrd",
        "nginx 1.26 -> 1.27",
        "fresh 2 (new)",
        "gone 1 (gone)",
        "units of one:\n  reload   nginx.service",
        "migrations: schema level 1 -> 2\n  0002_tags.sql",
    ):
        assert line in text
    for part in info.parts:
        assert f"{part.packed:,} of" in text


def test_a_full_bundle_is_described_too(maker: Maker, tmp_path: Path) -> None:
    path = make(None, maker.release("2.0"), tmp_path / "bundle")
    text = making.describe(read_info(str(path), TRUST), path.stat().st_size)
    assert "any release -> release 2.0" in text
    assert "class: reboot: the machine starts anew" in text
    assert "unchanged" not in text


@pytest.mark.parametrize("lost", ["config", "app", "base", "kernel"])
def test_what_cannot_be_made_from_an_old_file_is_sent_whole(maker: Maker, tmp_path: Path, lost: str) -> None:
    old, new = maker.release(), maker.release("1.1", **CHANGES["all"])
    kernel = old.manifest.kernel
    gone = {layer.digest for layer in old.manifest.layers if layer.kind == lost}
    gone |= {kernel.vmlinuz.digest, kernel.initrd.digest} if lost == "kernel" else set()
    poorer = replace(old, files={digest: path for digest, path in old.files.items() if digest not in gone})
    wanted = bundle.files_of(new.manifest)
    new = replace(new, files={digest: path for digest, path in new.files.items() if digest in wanted})
    path = make(poorer, new, tmp_path / "bundle")
    info = read_info(str(path), TRUST)
    assert info.from_manifest == old.digest
    assert not any(source in gone for part in info.parts for source in part.sources)
    check_made(new, poorer, apply_all(path, poorer, tmp_path / "made"))


def test_releases_of_two_layouts_have_no_bundle(maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(ApplianceError, match="layout"):
        make(maker.release(), maker.release("1.1", layout="other"), tmp_path / "bundle")
    assert not list(tmp_path.glob("*bundle*"))


# --- classes and units -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [("config", "live"), ("app", "live"), ("base", "soft-reboot"), ("kernel", "reboot"), ("version only", "nothing")],
)
def test_the_class_follows_from_what_differs(maker: Maker, change: str, expected: str) -> None:
    assert classify(maker.release().manifest, maker.release("1.1", **CHANGES[change]).manifest, "one") == expected


def test_another_kernel_command_line_needs_a_reboot(maker: Maker) -> None:
    old = maker.release().manifest
    assert classify(old, old._replace(kernel=old.kernel._replace(cmdline="debug"))) == "reboot"


def test_only_units_whose_files_changed_are_touched() -> None:
    units = {
        "a.service": {"on_change": "reload", "files": ["/etc/a.conf", "/etc/systemd/system/a.service"]},
        "b.service": {"on_change": "restart", "files": ["/opt/samepage/lib/b/"]},
        "c.service": {"on_change": "none", "files": ["/etc/c"]},
    }
    old, new = {"units": {**units, "old.service": {}}}, {"units": {**units, "new.service": {}}}
    always = {"new.service": "start", "old.service": "stop"}
    assert touched_units(old, new, []) == always
    assert touched_units(old, new, ["/etc/a.conf"]) == always | {"a.service": "reload"}
    assert touched_units(old, new, ["/etc/systemd/system/a.service.d/x.conf"]) == always | {"a.service": "restart"}
    assert touched_units(old, new, ["/opt/samepage/lib/b/deep/x.py"]) == always | {"b.service": "restart"}
    assert touched_units(old, new, ["/opt/samepage/lib/bb", "/etc/c"]) == always | {"c.service": "none"}


def test_versions_are_ordered_as_people_do() -> None:
    versions = ["2026.9", "2026.10~rc1", "2026.10", "2026.10.1", "2026.10.1+dirty", "2026.11"]
    for one, two in pairwise(versions):
        assert order(one) < order(two)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, making.ReleaseFiles]:
    folder = tmp_path_factory.mktemp("small")
    (folder / "files").mkdir()
    maker = Maker(folder / "files")
    old = maker.release()
    return make(old, maker.release("1.1", nginx=b"two"), folder / "bundle"), old


def refusal_of(path: Path, old: making.ReleaseFiles, trust: Trust = TRUST) -> refusals.Refusal | None:
    try:
        with open_bundle(str(path), trust) as opened:
            opened.manifest(old.content)
            for part in opened.info.parts[1:]:
                opened.extract(part, lambda digest: str(old.files[digest]), io.BytesIO())
    except refusals.Refusal as refusal:
        return refusal
    return None


def test_every_flipped_byte_is_refused(small: tuple[Path, making.ReleaseFiles], tmp_path: Path) -> None:
    path, old = small
    content = path.read_bytes()
    assert refusal_of(path, old) is None
    found = set()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "bundle").write_bytes(damaged)
        refusal = refusal_of(tmp_path / "bundle", old)
        assert refusal is not None, at
        assert refusal.status == 3
        found.add(refusal.reason)
    assert found >= {"foreign-file", "unknown-format", "unknown-key", "bad-signature", "damaged"}


def test_every_truncation_is_refused(small: tuple[Path, making.ReleaseFiles], tmp_path: Path) -> None:
    path, old = small
    content = path.read_bytes()
    for size in range(len(content)):
        (tmp_path / "bundle").write_bytes(content[:size])
        refusal = refusal_of(tmp_path / "bundle", old)
        assert refusal is not None
        assert refusal.reason == ("truncated" if size else "foreign-file")


@pytest.mark.parametrize("more", [b"\0", b"x" * 5000])
def test_trailing_bytes_are_refused(small: tuple[Path, making.ReleaseFiles], tmp_path: Path, more: bytes) -> None:
    (tmp_path / "bundle").write_bytes(small[0].read_bytes() + more)
    refusal = refusal_of(tmp_path / "bundle", small[1])
    assert refusal is not None
    assert refusal.reason == "trailing-bytes"
    assert str(len(more)) in refusal.message


def test_keys_decide(small: tuple[Path, making.ReleaseFiles], maker: Maker, tmp_path: Path) -> None:
    path, old = small
    foreign = make(old, maker.release("1.1", nginx=b"two"), tmp_path / "foreign", OTHER)
    reasons = {
        "unknown-key": refusal_of(foreign, old),
        "revoked-key": refusal_of(path, old, TRUST.revoking([SIGNER.id])),
        "bad-signature": refusal_of(path, old, Trust({SIGNER.id: OTHER.public})),
    }
    for reason, refusal in reasons.items():
        assert refusal is not None
        assert (refusal.reason, refusal.status) == (reason, 3)


def test_another_base_is_refused_with_what_would_do(small: tuple[Path, making.ReleaseFiles], maker: Maker) -> None:
    path, old = small
    info = read_info(str(path), TRUST)
    held = {old.digest: "1.0"}
    check_fit(info, old.manifest, held)
    other = maker.release("1.0", nginx=b"local")
    with pytest.raises(refusals.WrongBase, match="another build of that version is here"):
        check_fit(info, other.manifest, {other.digest: "1.0"})
    with pytest.raises(refusals.WrongBase, match=r"starts from release 1\.0"):
        check_fit(info, old.manifest._replace(version="0.9"), {"f" * 64: "0.9"})
    with pytest.raises(refusals.WrongLayout, match="layout"):
        check_fit(info, old.manifest._replace(layout="production"), held)
    with pytest.raises(refusals.WrongArchitecture, match="arm64"):
        check_fit(info, old.manifest._replace(architecture="arm64"), held)
    with pytest.raises(refusals.Downgrade, match=r"older than 1\.2"):
        check_fit(info, old.manifest._replace(version="1.2"), held)
    check_fit(info, old.manifest._replace(version="1.2"), held, allow_downgrade=True)


def test_other_source_files_are_refused(small: tuple[Path, making.ReleaseFiles], tmp_path: Path) -> None:
    path, _ = small
    (tmp_path / "wrong").write_bytes(bytes(50_000))
    with open_bundle(str(path), TRUST) as opened:
        with pytest.raises(refusals.Damaged, match="config one"):
            opened.extract(opened.info.parts[1], lambda _digest: str(tmp_path / "wrong"), io.BytesIO())
        with pytest.raises(refusals.Damaged, match="manifest"):
            opened.manifest(b"{}")


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    front = content[: signed.FRONT_SIZE]
    size = signed.header_size(front, bundle.MAGIC, "bundle")
    return signed.unseal(front, content[signed.FRONT_SIZE : signed.FRONT_SIZE + size], TRUST, "bundle")


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1 << 70), st.text(max_size=5), st.just("../../etc"), st.floats()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def replaced(value: Any, path: list[Any], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, child in children for found in paths_in(child, (*path, key))]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_signed_header_with_any_wrong_value_is_refused_or_a_header(small: Any, data: st.DataObject) -> None:
    header = json.loads(json.dumps(header_of(small[0])))
    where = data.draw(st.sampled_from(paths_in(header)[1:]))
    try:
        info = parse_info(replaced(header, list(where), data.draw(VALUES)))
    except refusals.Damaged:
        return
    assert isinstance(info, Info)
    assert all(len(digest) == 64 and digest.isalnum() for part in info.parts for digest in (part.digest, *part.sources))
    assert "/" not in info.version + info.layout + info.architecture


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_after_the_magic_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "bundle"
    path.write_bytes(bundle.MAGIC + noise)
    with pytest.raises(refusals.Refusal):
        read_info(str(path), TRUST)


@pytest.mark.parametrize("header", [b"", b"not zstd", b"[" * 100_000])
def test_a_signed_header_that_is_no_json_is_refused(header: bytes, tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.compress(header) if header else b""
    front = signed._FRONT.pack(bundle.MAGIC, 1, bytes.fromhex(SIGNER.id), len(packed))
    (tmp_path / "bundle").write_bytes(front + SIGNER.sign(front + packed) + packed)
    with pytest.raises(refusals.Damaged):
        read_info(str(tmp_path / "bundle"), TRUST)


def test_a_header_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.compress(bytes(1 << 28))
    front = signed._FRONT.pack(bundle.MAGIC, 1, bytes.fromhex(SIGNER.id), len(packed))
    (tmp_path / "bundle").write_bytes(front + SIGNER.sign(front + packed) + packed)
    with pytest.raises(refusals.Damaged, match="larger than allowed"):
        read_info(str(tmp_path / "bundle"), TRUST)


def test_each_refusal_has_its_own_name_and_a_hint() -> None:
    kinds = refusals.Refusal.__subclasses__()
    assert len({kind.reason for kind in kinds}) == len(kinds)
    assert all(kind.hint for kind in kinds)
    assert {kind.status for kind in kinds} == {refusals.REFUSED, refusals.LOCKED}


def test_a_bundle_that_shrinks_while_it_is_read_is_refused(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(small[0].read_bytes())
    with open_bundle(str(path), TRUST) as opened:
        os.truncate(path, 300)
        with pytest.raises(refusals.Damaged):
            opened.manifest(small[1].content)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_and_revocations_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "team.pub").write_bytes(dump_key(SIGNER.public, "samepage-public-key-1", "the team"))
    (tmp_path / "old.pub").write_bytes(dump_key(OTHER.public, "samepage-public-key-1", ""))
    (tmp_path / "revoked").write_text(f"# lost\n{OTHER.id}  # with the laptop\n\n")
    trust = load_trust(str(tmp_path))
    trust.verify(SIGNER.id, SIGNER.sign(b"x"), b"x")
    with pytest.raises(refusals.RevokedKey):
        trust.verify(OTHER.id, OTHER.sign(b"x"), b"x")
    assert parse_key(dump_key(SIGNER.secret, SECRET, "the team"), SECRET) == SIGNER.secret


@pytest.mark.parametrize(
    "content",
    [b"", b"other AAAA", b"samepage-public-key-1", b"samepage-public-key-1 AAAA", b"samepage-public-key-1 \xff"],
)
def test_a_key_file_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "team.pub").write_bytes(content)
    with pytest.raises(KeyFileError, match=r"team\.pub"):
        load_trust(str(tmp_path))


def test_a_line_that_is_no_key_id_is_refused() -> None:
    with pytest.raises(KeyFileError, match="no key id"):
        parse_revoked(b"0123456789abcdef\nsomething else\n")
