"""Everything that a node reads from others, and what it left itself before a power cut, with any content.

Whatever stands there, a parser answers with a value or with its own refusal, in bounded memory, and no name that comes
out of it leads outside the state partition. What is signed is fuzzed behind its signature, too.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appliance import bundle as making
from appliance import delta as deltas
from appliance.node import bundle, channel, keys, refusals, release, signed
from appliance.node.channel import BundleEntry, Index, ReleaseEntry
from appliance.node.delta import ZERO, put_number
from appliance.node.keys import KeyFileError
from appliance.node.refusals import Refusal
from appliance.node.release import ReleaseError
from appliance.node.upgrade import journal, records, retention, staging, trial
from appliance.node.upgrade.node import NotUpgradable, read_settings
from appliance.node.upgrade.request import STATES, parse_request
from appliance.node.upgrade.web import inside
from appliance.node.versions import order
from tests.unit.releases import SIGNER, TRUST, Maker

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
FEW = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NASTY = [
    "", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "a\nb", "a'b", "$(reboot)", "-rf", "~",
    "x" * 300, "a b", "1.0.partial", "CON", "\u202e", "\ud800", "é", "%2e%2e%2f", "1.0\n",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from([1 << 50, (1 << 50) + 1, 10**400, -(10**30)])
    | st.floats() | st.sampled_from(NASTY) | st.text(max_size=6) | st.sampled_from(["f" * 64, "F" * 64, "0" * 16])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


# --- ways to spoil something -----------------------------------------------------------------------------------------


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few of them changed, taken out, put in or repeated."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        end = min(len(found), at + draw(st.integers(0, 40)))
        what = draw(st.sampled_from(["change", "remove", "insert", "repeat", "cut"]))
        if what == "change" and at < len(found):
            found[at] = draw(st.integers(0, 255))
        elif what == "remove":
            del found[at:end]
        elif what == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif what == "repeat":
            found[at:at] = found[at:end]
        elif what == "cut" and draw(st.booleans()):
            del found[at:]
    return bytes(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, child in children for found in places(child, (*path, key))]


@st.composite
def bent(draw: st.DrawFn, value: Any) -> Any:
    """The JSON value with one to three of its parts replaced, removed, or joined by others."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(places(found)))
        if not where:
            continue
        place = found
        for key in where[:-1]:
            place = place[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "replace":
            place[where[-1]] = draw(VALUES)
        elif what == "remove":
            del place[where[-1]]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=5))] = draw(VALUES)
        else:
            place.append(draw(VALUES))
    return found


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def stays(folder: str, name: str | Path) -> bool:
    """Whether a name that is joined to the folder stays below it."""
    path = str(Path(folder) / name)
    return os.path.normpath(path).startswith(folder + "/") and "\0" not in path and "\n" not in path


# --- bundles ---------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("sample"))


def everything(path: str, sample: Sample) -> None:
    """All that is read of a bundle. Raises a Refusal."""
    with bundle.open_bundle(path, TRUST) as opened:
        bundle.check_fit(opened.info, sample.old.manifest, {sample.old.digest: "1.0"})
        opened.manifest(sample.old.content)
        for part in opened.info.parts[1:]:
            out = io.BytesIO()
            opened.extract(part, lambda digest: str(sample.old.files.get(digest, "/dev/null")), out)
            assert sha256(out.getvalue()).hexdigest() == part.digest


@given(st.data())
@FEW
def test_a_spoiled_bundle_is_refused(sample: Sample, data: st.DataObject) -> None:
    content = data.draw(spoiled(sample.bundle))
    if content == sample.bundle:
        return
    with pytest.raises(Refusal):
        everything(sample.write(content), sample)


@given(st.data())
@FEW
def test_a_bundle_whose_signed_header_is_bent_is_refused_or_read(sample: Sample, data: st.DataObject) -> None:
    header = data.draw(bent(sample.header))
    content = signed.seal(bundle.MAGIC, header, SIGNER) + sample.payload
    with suppress(Refusal):
        everything(sample.write(content), sample)


@given(st.data())
@FEW
def test_a_bundle_whose_signed_content_is_spoiled_is_refused_or_makes_the_same_files(
    sample: Sample, data: st.DataObject
) -> None:
    """The same, as when a bit changed that says how much memory unpacking may take."""
    payload = data.draw(spoiled(sample.payload))
    if payload == sample.payload:
        return
    header = json.loads(json.dumps(sample.header))
    header["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    header["parts"][-1]["packed"] += len(payload) - len(sample.payload)
    with suppress(Refusal):
        everything(sample.write(signed.seal(bundle.MAGIC, header, SIGNER) + payload), sample)


# --- manifests -------------------------------------------------------------------------------------------------------


def check_names(manifest: release.Manifest) -> None:
    """Nothing that is made of a manifest's words leads outside the state partition, or is no word for GRUB."""
    name = records.release_id({}, manifest, "f" * 64)
    assert stays("/state/releases", name)
    assert "/" not in name
    for file in records.KERNEL_FILES:
        assert stays("/state/kernels", records.kernel_path("/state", manifest.kernel.id, file))
    for layer in manifest.layers:
        assert stays("/state/layers", records.layer_path("/state", layer.kind, layer.digest))
    record = records.parse_record(release.boot_record(manifest, 1, name))
    assert record is not None
    assert (record.release, record.kernel) == (name, manifest.kernel.id)
    assert order(manifest.version)
    assert retention.figure(sum(layer.size for layer in manifest.layers))
    with suppress(ReleaseError):
        assert len(release.parse_layers(release.dump_layers(manifest.layers_of("one")))) == 3
        assert all(stays("/state", file.path) for file in staging.wanted_files("/state", manifest, "one").values())
        assert all(stays("/state", file) for file in retention.files_of(manifest, "one"))


@given(st.data())
@FEW
def test_a_bent_manifest_is_refused_or_names_nothing_outside(sample: Sample, data: st.DataObject) -> None:
    try:
        manifest = release.parse(as_json(data.draw(bent(json.loads(sample.old.content)))))
    except ReleaseError:
        return
    check_names(manifest)


@given(st.data())
@FEW
def test_a_spoiled_manifest_is_refused_or_a_manifest(sample: Sample, data: st.DataObject) -> None:
    try:
        manifest = release.parse(data.draw(spoiled(sample.old.content)))
    except ReleaseError:
        return
    check_names(manifest)


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("where", [("version",), ("kernel", "id"), ("layers", 0, "kind"), ("layers", 0, "digest")])
def test_names_that_lead_elsewhere_are_refused(sample: Sample, where: tuple[Any, ...], name: str) -> None:
    value = json.loads(sample.old.content)
    place = value
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = name
    if name in ("CON", "1.0.partial", "x" * 300) and where[0] != "layers":
        check_names(release.parse(as_json(value)))  # words like others
        return
    with pytest.raises(ReleaseError):
        release.parse(as_json(value))


def staged(sample: Sample, content: bytes, root: Path) -> None:
    with bundle.open_bundle(sample.write(content), TRUST) as opened:
        held = records.held_releases(str(root))
        bundle.check_fit(opened.info, sample.old.manifest, {one.digest: one.manifest.version for one in held.values()})
        staging.stage(str(root), opened, "one", held, lambda *_: None)


def with_manifest(sample: Sample, value: Any, header: Any = None) -> bytes:
    """A signed bundle that makes this manifest, and the files that the sample makes."""
    content = as_json(value)
    first = deltas.make_small(content, sample.old.content)
    made = json.loads(json.dumps(header or sample.header))
    old_first = made["parts"][0]["packed"]
    made["parts"][0] |= {"packed": len(first), "size": len(content), "digest": sha256(content).hexdigest()}
    to = made["to"]
    to["manifest"] = sha256(content).hexdigest()
    for key in ("version", "layout", "architecture"):
        if isinstance(value, dict) and isinstance(value.get(key), str):
            to[key] = value[key]
    payload = first + sample.payload[old_first:]
    made["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    return signed.seal(bundle.MAGIC, made, SIGNER) + payload


@given(st.data())
@settings(FEW, max_examples=100)
def test_whatever_a_bundle_says_staging_writes_only_good_files_in_their_places(
    sample: Sample, data: st.DataObject
) -> None:
    root = sample.state("staged")
    outside = {path for path in root.parent.rglob("*") if root not in path.parents}
    content = with_manifest(sample, data.draw(bent(json.loads(sample.new.content))))
    with suppress(Refusal, OSError):
        staged(sample, content, root)
    assert {path for path in root.parent.rglob("*") if root not in path.parents} == outside
    for path in (path for path in root.rglob("*") if path.is_file()):
        kind = path.relative_to(root).parts[0]
        assert kind in ("layers", "kernels", "releases")
        if kind == "layers":
            assert sha256(path.read_bytes()).hexdigest() in path.name


def test_the_good_bundle_is_staged(sample: Sample) -> None:
    root = sample.state("good")
    staged(sample, with_manifest(sample, json.loads(sample.new.content)), root)
    staged(sample, sample.bundle, root)
    assert sorted(records.held_releases(str(root))) == ["1.0", "1.1", f"1.1+{sample.new.digest[:8]}"]


# --- channels --------------------------------------------------------------------------------------------------------

INDEX = Index(
    counter=7, created=1_800_000_000, expires=1_800_001_000, layout="test", architecture="amd64",
    releases=(ReleaseEntry("1.0", "a" * 64), ReleaseEntry("1.1", "b" * 64)),
    bundles=(
        BundleEntry("one.bundle", "a" * 64, "b" * 64, 10, "0" * 64), BundleEntry("two", "", "b" * 64, 9, "1" * 64)
    ),
    revoked=frozenset({"0" * 16}),
)  # fmt: skip
PACKED = channel.dump_index(INDEX, SIGNER)
HEADER = signed.unseal(PACKED[: signed.FRONT_SIZE], PACKED[signed.FRONT_SIZE :], TRUST, "index")


@given(spoiled(PACKED))
@FEW
def test_a_spoiled_index_is_refused(content: bytes) -> None:
    if content != PACKED:
        with pytest.raises(Refusal):
            channel.parse_index(content, TRUST)


@given(bent(HEADER))
@FEW
def test_a_bent_index_is_refused_or_names_nothing_outside(value: Any) -> None:
    try:
        index = channel.parse_index(signed.seal(channel.MAGIC, value, SIGNER), TRUST)
        channel.check_index(index, 1_800_000_500, 7, "test", "amd64")
        channel.plan(index, "1.0", ["a" * 64])
    except Refusal:
        return
    for entry in index.bundles:
        assert stays("/state/upgrade/incoming", entry.file)
        assert "/" not in inside("https://example.org/c?k=v", entry.file).removeprefix("https://example.org/c/")
    assert all(order(one.version) for one in index.releases)


@given(st.binary(max_size=80))
@FEW
def test_a_counter_is_a_number_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "counter"
    path.write_bytes(content)
    try:
        assert channel.read_seen(str(path)) >= 0
    except refusals.Damaged:
        assert not content.strip().isdigit()


# --- what the node itself left ---------------------------------------------------------------------------------------

BEGUN = journal.Journal(
    state="health", action="upgrade", depth="live", old="1.0", new="1.1", running_data=1, old_data=2, new_data=1,
    started=1_800_000_000, units={"nginx.service": "reload"},
)  # fmt: skip


@given(st.one_of(spoiled(journal.dump(BEGUN)), bent(json.loads(journal.dump(BEGUN))).map(as_json)))
@FEW
def test_a_spoiled_journal_is_refused_or_names_nothing_outside(content: bytes) -> None:
    try:
        found = journal.parse(content)
    except journal.JournalError:
        return
    assert stays("/state/releases", found.old)
    assert stays("/state/releases", found.new)
    assert found.state in STATES
    assert journal.parse(journal.dump(found)) == found


RECORD = b"set release='1.0'\nset kernel='6.12-a'\nset data='1'\nset options='quiet'\n"


@given(st.one_of(st.binary(max_size=100), spoiled(RECORD)))
@example(RECORD.replace(b"1.0", b"../../x"))
@FEW
def test_a_spoiled_boot_record_is_none_or_names_nothing_outside(content: bytes) -> None:
    found = records.parse_record(content)
    if found is not None:
        assert stays("/state/releases", found.release)
        assert stays("/state/kernels", found.kernel)
        assert 0 <= found.data < 10**9


@given(st.binary(max_size=60))
@FEW
def test_layers_are_three_digests_or_refused(content: bytes) -> None:
    with suppress(ReleaseError):
        assert all(len(one) == 64 for one in release.parse_layers(content).values())


@pytest.mark.parametrize("entry", ["try", ""])
def test_grubs_environment_is_one_block(entry: str) -> None:
    """GRUB reads a block of exactly this size; what counts lies in its first sector."""
    block = trial.environment(entry)
    assert len(block) == 1024
    head, line, rest = block.split(b"\n", 2)
    assert (head, line) == (b"# GRUB Environment Block", f"next_entry={entry}".encode())
    assert set(rest) == {ord("#")}
    assert len(head + line) < 512


@given(st.one_of(st.binary(max_size=60), bent({"channel": "x", "keep": 3, "unattended": True}).map(as_json)))
@FEW
def test_spoiled_settings_are_refused_or_settings(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "upgrade.json"
    path.write_bytes(content)
    try:
        found = read_settings(str(path))
    except NotUpgradable:
        return
    assert type(found.keep) is int
    assert type(found.channel) is str


@given(st.one_of(st.binary(max_size=60), bent({"verb": "install", "source": "x"}).map(as_json)))
@FEW
def test_a_spoiled_request_is_refused_or_a_request(content: bytes) -> None:
    with suppress(ValueError):
        parse_request(content)


# --- keys ------------------------------------------------------------------------------------------------------------

KEY = keys.dump_key(SIGNER.public, keys.PUBLIC, "the team")


@given(
    st.one_of(st.binary(max_size=90), spoiled(KEY)),
    st.one_of(st.binary(max_size=40), spoiled(b"# old\n" + b"0f" * 8)),
)
@FEW
def test_spoiled_keys_and_revocations_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory, key: bytes, revoked: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "keys"
    folder.mkdir(exist_ok=True)
    (folder / "team.pub").write_bytes(key)
    (folder / "revoked").write_bytes(revoked)
    try:
        trust = keys.load_trust(str(folder))
    except KeyFileError:
        return
    assert all(len(public) == 32 and keys.key_id(public) == name for name, public in trust.keys.items())
    with pytest.raises(Refusal):
        trust.verify(next(iter(trust.keys)), bytes(64), b"message")


# --- memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from appliance.node import bundle, channel, keys, refusals, release
from appliance.node.upgrade import journal, records
trust = keys.Trust({{ {id!r}: bytes.fromhex({public!r}) }})
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + ({more} << 20),) * 2)
try:
    print({call})
except (refusals.Refusal, ValueError) as error:
    print(type(error).__name__, str(error)[:200])
"""


def sealed(magic: bytes, packed: bytes, size: int | None = None) -> bytes:
    front = signed._FRONT.pack(magic, 1, bytes.fromhex(SIGNER.id), len(packed) if size is None else size)
    return front + SIGNER.sign(front + packed) + packed


def zstd(content: bytes, repeat: int = 1) -> bytes:
    """A frame of the content, again and again, without its size in front."""
    import zstandard

    machine = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return b"".join(machine.compress(content) for _ in range(repeat)) + machine.flush()


def bomb(sample: Sample) -> bytes:
    """A bundle whose manifest is a gigabyte of zeros."""
    out = bytearray()
    put_number(out, (1 << 30) << 3 | ZERO)
    ops = zstd(bytes(out))
    head = bytearray()
    for size in (len(ops), 0, 0, 0, 0):
        put_number(head, size)
    payload = bytes(head) + ops
    header = json.loads(json.dumps(sample.header))
    header["parts"] = [header["parts"][0] | {"packed": len(payload), "size": bundle.MANIFEST_LIMIT}]
    header["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    return signed.seal(bundle.MAGIC, header, SIGNER) + payload


def part_of(size: int) -> Callable[[Sample], bytes]:
    def make(sample: Sample) -> bytes:
        header = json.loads(json.dumps(sample.header))
        header["parts"][0]["packed"] += header["parts"][1]["packed"] - size
        header["parts"][1]["packed"] = size
        return signed.seal(bundle.MAGIC, header, SIGNER) + sample.payload

    return make


OPEN = 'bundle.open_bundle(sys.argv[1], trust).__enter__().manifest(open(sys.argv[2], "rb").read())'
INFO, PARSE = "bundle.read_info(sys.argv[1], trust)", "channel.parse_index(open(sys.argv[1], 'rb').read(), trust)"
MANIFEST = "release.parse(open(sys.argv[1], 'rb').read())"
SMALL, LARGE = 64, 512  # MiB
BOMBS: dict[str, tuple[Callable[[Sample], bytes], str, int, str]] = {
    "a header of 4 GB": (lambda _: sealed(bundle.MAGIC, b"x", (1 << 32) - 1), INFO, SMALL, "Damaged"),
    "a header of zeros": (lambda _: sealed(bundle.MAGIC, zstd(bytes(1 << 20), 300)), INFO, SMALL, "Damaged"),
    "a header that is deep": (lambda _: sealed(bundle.MAGIC, zstd(b"[" * (4 << 20))), INFO, SMALL, "Damaged"),
    "a header with a long number": (lambda _: sealed(bundle.MAGIC, zstd(b"1" * (4 << 20))), INFO, SMALL, "Damaged"),
    "a header of many things": (
        lambda _: sealed(bundle.MAGIC, zstd(b'{"from":[' + b"{}," * 2_700_000 + b"{}]}")), INFO, LARGE, "Damaged"
    ),
    "an index of zeros": (lambda _: sealed(channel.MAGIC, zstd(bytes(1 << 20), 300)), PARSE, SMALL, "Damaged"),
    "an index that is deep": (lambda _: sealed(channel.MAGIC, zstd(b'{"a":' * 800_000)), PARSE, SMALL, "Damaged"),
    "a manifest of zeros": (bomb, OPEN, SMALL, "Damaged"),
    "a part that is larger than the file": (part_of(1 << 40), OPEN, SMALL, "Damaged"),
    "a manifest that is deep": (lambda _: b"[" * (16 << 20), MANIFEST, SMALL, "ReleaseError"),
    "a manifest of many things": (lambda _: b"[" + b"[]," * (5 << 20) + b"[]]", MANIFEST, LARGE, "ReleaseError"),
    "a journal that is large": (
        lambda _: b" " * (64 << 20), "records.read_small(sys.argv[1], 1 << 20)", 16, "None"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded_whatever_is_claimed(sample: Sample, tmp_path: Path, name: str) -> None:
    make, call, more, expected = BOMBS[name]
    (tmp_path / "file").write_bytes(make(sample))
    (tmp_path / "old").write_bytes(sample.old.content)
    script = LIMITED.format(root=str(ROOT), id=SIGNER.id, public=SIGNER.public.hex(), more=more, call=call)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "file", tmp_path / "old"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected), done.stdout
