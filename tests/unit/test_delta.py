"""Deltas: any file is rebuilt from any other; a damaged delta is refused; memory stays small."""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import delta as making
from appliance import initrd
from appliance.delta_program import Piece, Program, compress
from appliance.node import delta
from appliance.node.lines import Shift
from appliance.shift import pack_frame
from tests.unit.erofs_writer import image

ROOT = Path(__file__).parents[2]


def slice_of(path: Path) -> delta.Slice:
    return delta.Slice(os.open(path, os.O_RDONLY), 0, path.stat().st_size)


def rebuild(packed: bytes, sources: Sequence[Path], size: int, digest: str, folder: Path) -> bytes:
    (folder / "delta").write_bytes(packed)
    slices = [slice_of(path) for path in (folder / "delta", *sources)]
    out = io.BytesIO()
    try:
        delta.apply(slices[0], slices[1:], out, size, digest)
    finally:
        for one in slices:
            os.close(one.descriptor)
    return out.getvalue()


def round_trip(folder: Path, new: bytes, *olds: bytes) -> bytes:
    """The delta, once it has rebuilt `new` from `olds`."""
    paths = []
    for number, content in enumerate((new, *olds)):
        paths.append(folder / f"file-{number}")
        paths[-1].write_bytes(content)
    packed = making.make(paths[0], paths[1:], workers=1)
    assert rebuild(packed, paths[1:], len(new), sha256(new).hexdigest(), folder) == new
    return packed


TREES = st.dictionaries(
    st.sampled_from([f"/lib/modules/6.12.{n}/a{i}.ko" for n in (1, 17) for i in range(4)] + ["/etc/b", "/etc/c"]),
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda target: b"link:" + target, st.binary(min_size=1, max_size=40).filter(lambda name: 0 not in name)
        ),
        st.builds(lambda seed: random.Random(seed).randbytes(9000), st.integers(0, 5)),
    ),
    max_size=8,
)


@given(TREES, TREES, st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_rebuilds_any_image_from_any_other(tmp_path_factory, new, old, new_inline, old_inline) -> None:
    folder = tmp_path_factory.mktemp("delta")
    round_trip(folder, image(new, inline=new_inline), image(old, inline=old_inline, extended=old_inline))


@given(st.binary(max_size=3000), st.lists(st.binary(max_size=3000), max_size=3))
@settings(max_examples=120, deadline=None)
def test_rebuilds_any_file_from_any_others(tmp_path_factory, new: bytes, olds: list[bytes]) -> None:
    round_trip(tmp_path_factory.mktemp("delta"), new, *olds)


@given(st.binary(max_size=5000), st.one_of(st.none(), st.binary(max_size=5000)))
@settings(max_examples=100, deadline=None)
def test_rebuilds_small_files(tmp_path_factory, new: bytes, old: bytes | None) -> None:
    folder = tmp_path_factory.mktemp("delta")
    packed = making.make_small(new, old)
    sources = []
    if old is not None:
        (folder / "old").write_bytes(old)
        sources = [folder / "old"]
    assert rebuild(packed, sources, len(new), sha256(new).hexdigest(), folder) == new


def test_a_changed_file_among_many_costs_little(tmp_path: Path) -> None:
    noise = random.Random(1)
    tree = {f"/usr/lib/file-{number:03}": noise.randbytes(6000) for number in range(300)}
    grown = dict(tree)
    grown["/usr/lib/file-100"] = (
        tree["/usr/lib/file-100"][:3000] + b"a few new bytes" * 400 + tree["/usr/lib/file-100"][3000:]
    )
    packed = round_trip(tmp_path, image(grown), image(tree))
    assert len(packed) < 600  # all files behind it moved by two blocks


def test_files_of_a_new_kernel_find_the_old_ones(tmp_path: Path) -> None:
    noise = random.Random(2)
    old = {f"/lib/modules/6.12.107/{name}.ko": noise.randbytes(20_000) for name in "abc"}
    new = {path.replace("107", "117"): content[:9000] + b"6.12.117" + content[9008:] for path, content in old.items()}
    assert len(round_trip(tmp_path, image(new), image(old))) < 600


def test_the_ram_disk_is_made_from_the_new_base(tmp_path: Path) -> None:
    noise = random.Random(3)
    modules = {f"/usr/lib/modules/6.12/{name}.ko": noise.randbytes(30_000) for name in "abc"}
    disk = initrd.pack([initrd.plain("lib/" + path.rpartition("/")[2], content) for path, content in modules.items()])
    assert len(round_trip(tmp_path, disk, initrd.pack([]), image(modules))) < 400


def test_a_text_is_made_with_the_old_one_as_dictionary(tmp_path: Path) -> None:
    noise = random.Random(9)
    words = [noise.randbytes(6).hex() for _ in range(3000)]
    old = " ".join(words).encode()
    new = " ".join(noise.choices(words, k=3000)).encode()
    packed = round_trip(tmp_path, image({"/text": new}), image({"/text": old}))
    assert len(packed) < 0.8 * len(making.make_small(new, None))


def test_texts_that_lie_together_share_their_frame(tmp_path: Path) -> None:
    noise = random.Random(12)
    words = [noise.randbytes(6).hex() for _ in range(400)]
    old = {f"/text-{number}": " ".join(noise.choices(words, k=400)).encode() for number in range(9)}
    paragraph = " ".join(noise.randbytes(6).hex() for _ in range(200)).encode()
    new = {path: content[:2000] + paragraph + content[2000:] for path, content in old.items()}
    packed = round_trip(tmp_path, image(new), image(old))
    assert len(packed) < 2 * len(making.make_small(paragraph, None))


def test_frames_are_as_many_as_their_limit_asks_for(tmp_path: Path) -> None:
    noise = random.Random(13)
    words = [noise.randbytes(6).hex() for _ in range(50_000)]
    old = {f"/text-{number}": " ".join(noise.choices(words, k=60_000)).encode() for number in range(4)}
    new = {path: b"more".join((content[:9000], content[9000:])) for path, content in old.items()}
    shuffled = {path: content[:5000][::-1] + content[5000:] for path, content in new.items()}
    round_trip(tmp_path, image(shuffled), image(old))  # 800 KB each: two of them in a frame


def test_a_file_that_is_there_twice_comes_once(tmp_path: Path) -> None:
    noise = random.Random(8).randbytes(20_000)
    packed = round_trip(
        tmp_path, image({"/bin/a": noise, "/bin/b": noise, "/bin/c": b"x" + noise}), image({"/bin/z": b"1"})
    )
    assert len(packed) < 42_000


def test_code_that_moved_is_made_of_differences(tmp_path: Path) -> None:
    noise = random.Random(4)
    old = bytearray(noise.randbytes(40_000))
    new = bytearray(old)
    for at in range(0, 40_000, 50):  # an address in every 50 bytes
        old[at : at + 4] = (0x401000 + at).to_bytes(4, "little")
        new[at : at + 4] = (0x401040 + at).to_bytes(4, "little")
    packed = round_trip(tmp_path, bytes(new), bytes(old))
    assert len(packed) < 700


@given(st.binary(max_size=400), st.data(), st.sampled_from([1, 4]))
@settings(max_examples=200)
def test_sums_are_modulo_their_unit(old: bytes, data: st.DataObject, unit: int) -> None:
    difference = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    whole = len(old) - len(old) % unit
    expected = b"".join(
        (sum(int.from_bytes(one[at : at + unit], "little") for one in (old, difference)) % 256**unit)
        .to_bytes(unit, "little")
        for at in range(0, whole, unit)
    ) + bytes((a + b) % 256 for a, b in zip(old[whole:], difference[whole:], strict=True))  # fmt: skip
    assert delta.add(old, difference, unit) == expected


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes, bytes]:
    folder = tmp_path_factory.mktemp("small")
    noise = random.Random(5)
    tree = {f"/etc/{name}": noise.randbytes(700) for name in "abcdef"}
    old, new = (
        image(tree),
        image(tree | {"/etc/c": tree["/etc/c"][:300] + b"!" + tree["/etc/c"][301:], "/etc/n": b"new" * 99}),
    )
    return folder, folder / "file-1", new, round_trip(folder, new, old)


def refused(packed: bytes, small: tuple[Path, Path, bytes, bytes]) -> bool:
    folder, old, new, _ = small
    try:
        return rebuild(packed, [old], len(new), sha256(new).hexdigest(), folder) != new
    except delta.DeltaError:
        return True


def test_every_changed_byte_is_refused_or_harmless(small: tuple[Path, Path, bytes, bytes]) -> None:
    folder, old, new, packed = small
    for at in range(len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 0x55
        try:
            content = rebuild(bytes(damaged), [old], len(new), sha256(new).hexdigest(), folder)
        except delta.DeltaError:
            continue
        assert content == new  # a bit of zstd that means nothing


def test_every_truncation_is_refused(small: tuple[Path, Path, bytes, bytes]) -> None:
    assert all(refused(small[3][:size], small) for size in range(len(small[3])))


def test_trailing_bytes_are_refused(small: tuple[Path, Path, bytes, bytes]) -> None:
    assert refused(small[3] + b"\0", small)


def test_another_old_file_is_refused(small: tuple[Path, Path, bytes, bytes], tmp_path: Path) -> None:
    folder, old, new, packed = small
    other = tmp_path / "other"
    other.write_bytes(bytes(len(old.read_bytes())))
    with pytest.raises(delta.DeltaError, match="wrong digest"):
        rebuild(packed, [other], len(new), sha256(new).hexdigest(), folder)


def program(*numbers: int, literals: bytes = b"", frames: bytes = b"") -> bytes:
    ops = bytearray()
    for number in numbers:
        delta.put_number(ops, number)
    runs = [compress(bytes(ops), delta.WINDOW_LOGS[0]), b"", b"", compress(literals, delta.WINDOW_LOGS[3]), frames]
    head = bytearray()
    for run in runs:
        delta.put_number(head, len(run))
    return bytes(head) + b"".join(runs)


COPY, LITERAL, ZERO, SOURCE, PATCH, KNOWN = (
    delta.COPY, delta.LITERAL, delta.ZERO, delta.SOURCE, delta.PATCH, delta.KNOWN,
)  # fmt: skip
FRAME = pack_frame(b"01234567")
SIZELESS = zstandard.ZstdCompressor(write_content_size=False).compress(b"01234567")


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (program(), "less than it says"),
        (program(1 << 3 | COPY), "end early"),
        (program(5 << 3 | SOURCE), "does not have"),
        (program(1 << 3 | COPY, 100 << 1), "outside its file"),
        (program(1 << 3 | COPY, 3), "outside its file"),
        (program((1 << 50) << 3 | ZERO), "more than it says"),
        (program(4 << 3 | ZERO), "less than it says"),
        (program(8 << 3 | LITERAL, literals=b"short"), "ends early"),
        (program(8 << 3 | ZERO, literals=b"left"), "more than it uses"),
        (program(8 << 3 | ZERO), "wrong digest"),
        (program(4 << 3 | ZERO, 1 << 3 | SOURCE, 4 << 3 | COPY, 2), "outside its file"),
        (program(8 << 3 | PATCH, 1 << 40), "larger than allowed"),
        (program(8 << 3 | PATCH, 3, frames=b"abc"), "damaged"),
        (program(8 << 3 | PATCH, 20, frames=b"abc"), "outside its file"),
        (program(8 << 3 | PATCH, len(FRAME) - 1, frames=FRAME[:-1]), "damaged"),
        (program(8 << 3 | PATCH, len(FRAME), frames=FRAME), "wrong digest"),
        (program(8 << 3 | PATCH, len(FRAME), frames=FRAME * 2), "more than it uses"),
        (program(7 << 3 | PATCH, len(FRAME), 1 << 3 | ZERO, frames=FRAME), "more than it uses"),
        (program(8 << 3 | ZERO, 3 << 3 | KNOWN, 0, 0), "more than it uses"),
        (program(8 << 3 | PATCH, len(SIZELESS), frames=SIZELESS), "larger than allowed"),
        (program((delta.FRAME_LIMIT + 1) << 3 | KNOWN, 0, 0), "larger than allowed"),
        (program(3 << 3 | KNOWN, 0, 1 << 40), "more shifts than allowed"),
        (program(3 << 3 | KNOWN, 100 << 1, 0), "outside its file"),
        (program(1 << 63), "too long"),
        (b"", "no head"),
        (b"\xff" * 60, "no head"),
    ],
)
def test_refusals(packed: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"0123456789")
    with pytest.raises(delta.DeltaError, match=message):
        rebuild(packed, [tmp_path / "old"], 8, sha256(b"").hexdigest(), tmp_path)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused(small: tuple[Path, Path, bytes, bytes], noise: bytes) -> None:
    assert refused(noise, small)


# --- memory ----------------------------------------------------------------------------------------------------------

APPLY = """
import os, resource, sys
from appliance.node.delta import DeltaError, Slice, apply
paths, size, digest = sys.argv[1:-2], int(sys.argv[-2]), sys.argv[-1]
runs = [Slice(os.open(path, os.O_RDONLY), 0, os.stat(path).st_size) for path in paths]
try:
    with open(sys.argv[1] + ".out", "w+b") as out:
        apply(runs[0], runs[1:], out, size, digest)
except DeltaError as error:
    print(error)
with open("/proc/self/status") as status:
    print([line.split()[1] for line in status if line.startswith("VmHWM")][0])
"""


def run_apply(*arguments: object, address_space: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", APPLY, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_large_file_is_rebuilt_in_64_mb(tmp_path: Path) -> None:
    noise = random.Random(6)
    parts = [noise.randbytes(1 << 20) for _ in range(48)]
    old = {f"/usr/lib/{number}": part for number, part in enumerate(parts)}
    new = {path: bytes(1000) + content[:500_000] + b"x" * 100_000 + content[500_000:] for path, content in old.items()}
    content = image(new)
    (tmp_path / "new").write_bytes(content)
    (tmp_path / "old").write_bytes(image(old))
    (tmp_path / "delta").write_bytes(making.make(tmp_path / "new", [tmp_path / "old"], workers=1))
    lines = run_apply(
        tmp_path / "delta", tmp_path / "old", len(content), sha256(content).hexdigest(), address_space=400 << 20
    )
    assert len(lines) == 1
    assert int(lines[0]) < 64 * 1024


def test_the_worst_delta_is_applied_in_64_mb(tmp_path: Path) -> None:
    """Every stream with its whole window, and patches as large as allowed, none of which can be packed."""
    noise, most, part = random.Random(11), delta.FRAME_LIMIT, 3 << 20
    old, new, made = noise.randbytes(12 << 20), bytearray(), Program(1)

    def put(kind: int, content: bytes, start: int = 0, payload: bytes = b"") -> None:
        made.put(Piece(len(new), len(content), kind, 0, start, payload))
        new.extend(content)

    for number in range(2):
        text = noise.randbytes(most - 100 - number)
        known = Piece(len(new), len(text), PATCH, 0, number, text, most, (Shift(0, 1),))
        made.open([known], pack_frame(text, old[number : number + most], 1))
        put(PATCH, text)
        literal, difference, words = (noise.randbytes(size) for size in (part, part // 2, part // 2))
        put(LITERAL, literal, payload=literal)
        put(delta.ADD, delta.add(old[: part // 2], difference, 1), 0, difference)
        put(delta.WORDS, delta.add(old[1 : 1 + part // 2], words, 4), 1, words)
    for start in noise.choices(range(11 << 20), k=300_000):
        put(COPY, old[start : start + 3], start)
    packed = made.pack()
    (tmp_path / "delta").write_bytes(packed)
    (tmp_path / "old").write_bytes(old)
    lines = run_apply(tmp_path / "delta", tmp_path / "old", len(new), sha256(new).hexdigest(), address_space=400 << 20)
    assert len(lines) == 1
    assert int(lines[0]) < 48 * 1024  # the modules of the upgrade tool itself come on top


def test_a_bomb_is_refused_in_64_mb(tmp_path: Path) -> None:
    (tmp_path / "delta").write_bytes(program((1 << 29) << 3 | LITERAL, literals=bytes(1 << 28)))
    lines = run_apply(tmp_path / "delta", 1 << 40, "0" * 64, address_space=400 << 20)
    assert "ends early" in lines[0]
    assert int(lines[1]) < 64 * 1024
