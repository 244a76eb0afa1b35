"""A large bundle between two real releases, and a long chain of small ones, through the code that nodes run.

The second release has some of the files that the recipe of PostgreSQL leaves out (new ones, and moved blocks behind
them), a changed program, a text in another order and a changed template: every kind of operation comes up.
"""

from __future__ import annotations

import filecmp
import io
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance import bundle as making
from appliance.bundle import ReleaseFiles
from appliance.check import check_project
from appliance.console import Console
from appliance.node import delta
from appliance.node.bundle import Bundle, check_fit, files_of, open_bundle
from appliance.node.keys import Signer, Trust
from appliance.node.refusals import Damaged, ForeignFile, Refusal, TrailingBytes, Truncated
from appliance.node.signed import FRONT_SIZE
from appliance.node.upgrade import records, staging
from appliance.pipeline import Built, Options, assemble, make_layers
from appliance.release import make as make_release
from appliance.store import Store
from tests.evolving import Evolving

PROJECT = Path(__file__).parents[2]
NODE = "samepage"
SIGNER = Signer(bytes(range(32)))
TRUST = Trust({SIGNER.id: SIGNER.public})
FLIPS = 10_000
CHAIN = 50
MEMORY = 64 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """Two real releases and the bundle from one to the other."""

    old: ReleaseFiles
    new: ReleaseFiles
    bundle: Path


def copy_of_project(folder: Path) -> Path:
    for name in ("recipes", "appliance"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def release_of(project: Path, version: str, like: Built) -> ReleaseFiles:
    """What the copy of the project makes of the same packages."""
    options = Options(project, version=version, cache=like.options.cache)
    model, trees = check_project(project, options.layout, version)
    return making.files_of(assemble(options, model, trees, like.lock, Console("none")).release)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, file
    file.write_text(text.replace(old, new))


def node_with(release: ReleaseFiles, root: Path) -> Path:
    """A state partition that holds one release; its files are links, for nothing may write to them."""
    manifest = release.manifest
    for digest, file in staging.wanted_files(str(root), manifest, NODE).items():
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
        Path(file.path).symlink_to(release.files[digest])
    records.record_release(str(root), manifest.version, release.content, NODE)
    return root


def upgrade(root: Path, bundle: Path) -> staging.Staged:
    """What the node's tool does until the new release's files are there."""
    held = records.held_releases(str(root))
    newest = max(held.values(), key=lambda one: [int(part) for part in one.manifest.version.split(".")])
    with open_bundle(str(bundle), TRUST) as opened:
        check_fit(opened.info, newest.manifest, {one.digest: one.manifest.version for one in held.values()})
        return staging.stage(str(root), opened, NODE, held, lambda _done, _total: None)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders stand for the state partition; what survives a power cut is tested elsewhere."""
    monkeypatch.setattr(records, "commit", lambda _root: None)


@pytest.fixture(scope="module")
def pair(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("releases")
    old = release_of(copy_of_project(folder / "old"), "1.0", built)
    project = copy_of_project(folder / "new")
    bitcode = "/usr/lib/postgresql/17/lib/bitcode"
    replace(project / "recipes/postgresql/recipe.yaml", f"  - {bitcode}\n", f"  - {bitcode}/postgres\n")
    nginx = project / "recipes/nginx/templates/etc/nginx/nginx.conf.j2"
    nginx.write_text(f"# another first line\n{nginx.read_text()}")
    program = project / "appliance/node/health.py"
    program.write_text(program.read_text().replace("self", "this") + "\n\nLONGER = True\n")
    style = project / "recipes/samepage/files/opt/samepage/share/samepage/web/style.css"
    style.write_text("\n".join(sorted(style.read_text().splitlines())))
    new = release_of(project, "1.1", built)
    made = making.make(old, new, SIGNER, folder / "large.bundle").path
    assert made.stat().st_size > 1_000_000
    return Pair(old, new, made)


@pytest.fixture
def copy(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copy(pair.bundle, tmp_path / "copy.bundle"))


def refusal(path: Path) -> Refusal | None:
    try:
        with open_bundle(str(path), TRUST):
            return None
    except Refusal as refused:
        return refused


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_any_flipped_byte_is_refused(copy: Path) -> None:
    """Every byte of the envelope and the header, and samples of all the rest; each flip is undone."""
    size, chance = copy.stat().st_size, random.Random(50)
    with open_bundle(str(copy), TRUST) as opened:
        front = size - opened.info.payload
    places = [*range(front), *chance.sample(range(front, size), FLIPS - front), size - 1]
    assert len(places) > FLIPS
    descriptor = os.open(copy, os.O_RDWR)
    try:
        for at in places:
            byte = os.pread(descriptor, 1, at)
            os.pwrite(descriptor, bytes([byte[0] ^ 1 << chance.randrange(8)]), at)
            assert refusal(copy) is not None, f"byte {at} was flipped and nobody noticed"
            os.pwrite(descriptor, byte, at)
    finally:
        os.close(descriptor)
    assert refusal(copy) is None


def boundaries(opened: Bundle, size: int) -> dict[str, int]:
    """Where something ends: the fields of the envelope, the header, every part, every run of every delta."""
    found = dict(zip(("nothing", "magic", "version", "key", "size", "signature"), (0, 8, 9, 17, 21, 85), strict=True))
    at = found["header"] = size - opened.info.payload
    for part in opened.info.parts:
        name = f"{part.kind} {part.node}".strip()
        packed = opened.payload.part(at - found["header"], part.packed)
        sizes, head = delta._head(packed)
        end = at + head
        found[f"{name}: sizes of the runs"] = end
        for run, length in zip(("ops", "bytes", "words", "literals", "frames"), sizes, strict=True):
            end += length
            found[f"{name}: {run}"] = end
        at += part.packed
        assert end == at
    return found


def test_truncation_at_every_kind_of_boundary_is_refused(copy: Path) -> None:
    size = copy.stat().st_size
    with open_bundle(str(copy), TRUST) as opened:
        ends = boundaries(opened, size)
    assert ends["signature"] == FRONT_SIZE
    assert max(ends.values()) == size
    parts = {name.partition(":")[0] for name in ends if ":" in name}
    assert parts == {"manifest", "base", "app", f"config {NODE}"}
    for run, before in (("ops", "sizes of the runs"), ("bytes", "ops"), ("words", "bytes"), ("literals", "words"),
                        ("frames", "literals")):  # fmt: skip
        assert any(ends[f"{part}: {run}"] > ends[f"{part}: {before}"] for part in parts), f"no delta has {run}"
    cuts = {at + step for at in ends.values() for step in (-1, 0, 1) if 0 <= at + step < size}
    for at in sorted(cuts, reverse=True):
        os.truncate(copy, at)
        assert isinstance(refusal(copy), Truncated if at else ForeignFile), at


def test_a_delta_that_is_cut_off_is_refused_by_the_applying_code(pair: Pair, copy: Path, tmp_path: Path) -> None:
    """Though the signature were good: each part at each of its boundaries."""
    with open_bundle(str(copy), TRUST) as opened:
        ends = boundaries(opened, copy.stat().st_size)
        begin = 0
        for part in opened.info.parts[1:]:
            begin += opened.info.parts[opened.info.parts.index(part) - 1].packed
            sources = [os.open(pair.old.files[one], os.O_RDONLY) for one in part.sources]
            slices = [delta.Slice(one, 0, os.fstat(one).st_size) for one in sources]
            for end in sorted(ends.values()):
                cut = end - ends["header"] - begin
                if 0 <= cut < part.packed:
                    with pytest.raises(delta.DeltaError), (tmp_path / "out").open("w+b") as out:
                        delta.apply(opened.payload.part(begin, cut), slices, out, part.size, part.digest)
            for one in sources:
                os.close(one)


@pytest.mark.parametrize("more", [1, 4096, 0], ids=["a byte", "a block", "the bundle again"])
def test_trailing_bytes_are_refused(copy: Path, more: int) -> None:
    content = copy.read_bytes()
    with copy.open("ab") as file:
        file.write(content[-more:])
    assert isinstance(refusal(copy), TrailingBytes)


def test_a_byte_that_flips_after_the_check_makes_nothing_wrong(pair: Pair, copy: Path) -> None:
    """As on a failing medium: the digest of what is made is the last word."""
    chance = random.Random(51)
    with open_bundle(str(copy), TRUST) as opened, copy.open("r+b", buffering=0) as file:
        begin = copy.stat().st_size - opened.info.payload
        for part in opened.info.parts:
            if part.kind in ("app", "config"):
                for _ in range(300):
                    at = begin + chance.randrange(part.packed)
                    byte = os.pread(file.fileno(), 1, at)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << chance.randrange(8)]), at)
                    out = io.BytesIO()
                    try:
                        opened.extract(part, lambda digest: str(pair.old.files[digest]), out)
                    except Damaged:
                        pass
                    else:  # a bit of zstd that means nothing
                        assert out.getvalue() == pair.new.files[part.digest].read_bytes()
                    os.pwrite(file.fileno(), byte, at)
            begin += part.packed


# --- applying --------------------------------------------------------------------------------------------------------


def same_files(root: Path, release: ReleaseFiles) -> None:
    for digest, file in staging.wanted_files(str(root), release.manifest, NODE).items():
        assert filecmp.cmp(file.path, release.files[digest], shallow=False), file.path


def test_the_new_releases_files_are_the_builders(pair: Pair, tmp_path: Path) -> None:
    root = node_with(pair.old, tmp_path / "state")
    staged = upgrade(root, pair.bundle)
    assert staged.release.digest == pair.new.digest
    assert staged.made == sum(
        size for digest, size in files_of(pair.new.manifest).items() if digest not in files_of(pair.old.manifest)
    )
    same_files(root, pair.new)
    assert staging.verify(str(root), pair.new.manifest, NODE, lambda _done, _total: None) == []


STAGE = """
import sys
from appliance.node.bundle import open_bundle
from appliance.node.keys import Trust, key_id
from appliance.node.upgrade import records, staging
root, bundle, node, key = sys.argv[1], sys.argv[2], sys.argv[3], bytes.fromhex(sys.argv[4])
records.commit = lambda root: None
with open_bundle(bundle, Trust({key_id(key): key})) as opened:
    staging.stage(root, opened, node, records.held_releases(root), lambda done, total: None)
with open("/proc/self/status") as status:
    print([int(line.split()[1]) for line in status if line.startswith("VmHWM")][0])
"""


def test_applying_takes_at_most_64_mb(pair: Pair, tmp_path: Path) -> None:
    root = node_with(pair.old, tmp_path / "state")
    done = subprocess.run(
        [sys.executable, "-c", STAGE, root, pair.bundle, NODE, SIGNER.public.hex()],
        env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= MEMORY
    assert max(layer.size for layer in pair.new.manifest.layers) > 4 * MEMORY


# --- a long chain ----------------------------------------------------------------------------------------------------


def small_release(evolving: Evolving, version: str, built: Built, store: Store) -> ReleaseFiles:
    """As release_of, but the base and the kernel are those of the build, and the rest comes from its own store."""
    options = Options(evolving.project, version=version)
    model, trees = check_project(evolving.project, options.layout, version)
    made = make_layers(options, model, trees, built.tree, built.tools, built.lock, store)
    return making.files_of(make_release(model, built.lock, made, built.release.kernel, built.lock.sets["full"]))


def store_with_base(built: Built, folder: Path) -> Store:
    """A store without any layer of the app or the configuration."""
    (folder / "steps").mkdir(parents=True)
    for name in ("base", "base-packed"):
        (folder / "steps" / name).symlink_to(built.store.root / "steps" / name)
    return Store(folder, PROJECT)


@pytest.mark.timeout(300)
def test_a_chain_of_50_releases_ends_as_a_fresh_build(built: Built, tmp_path: Path) -> None:
    evolving, store = Evolving(copy_of_project(tmp_path / "project")), store_with_base(built, tmp_path / "cache")
    new = small_release(evolving, "1.0", built, store)
    root = node_with(new, tmp_path / "state")
    seen = {new.digest}
    for number in range(1, CHAIN + 1):
        evolving.step()
        old, new = new, small_release(evolving, f"1.{number}", built, store)
        seen.add(new.digest)
        made = making.make(old, new, SIGNER, tmp_path / "next.bundle")
        assert made.size < 60_000
        assert upgrade(root, made.path).release.digest == new.digest
        shutil.rmtree(root / records.RELEASES / old.manifest.version)  # each is made from what was made last
    assert len(seen) == CHAIN + 1
    fresh = small_release(evolving, f"1.{CHAIN}", built, store_with_base(built, tmp_path / "another cache"))
    assert fresh.content == new.content
    same_files(root, fresh)
