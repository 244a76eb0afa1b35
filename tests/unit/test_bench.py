"""The pure parts of the benchmarks: medians, ratios, the table, what a VM says, and the accounting of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance.bundle import make as make_bundle
from appliance.model import Lock, Package
from bench import bundle, mkosi, peers, plain
from bench.boots import HEALTHY, memory_in_use
from bench.debian import source_lines
from bench.measure import BenchError, Cost, cpu_of, disk_size, measure, peak_memory, remove_tree, scratch
from bench.peers import Given, Taken
from bench.report import Figure, Report, median, number, of_runs, paired_ratio, spread, table
from bench.states import Change
from bench.vm import console_value
from bench.workshop import LEFT_OUT, Build, Builder, Workshop
from tests.unit.releases import NOISE, SIGNER, Maker
from tests.variants import with_kernel_of

PROJECT = Path(__file__).parents[2]
MIRRORS = {"debian": "http://mirror.example/debian", "debian-security": "http://mirror.example/security"}


@pytest.mark.parametrize(("values", "middle"), [([3.0], 3.0), ([9.0, 1.0, 2.0], 2.0), ([1.0, 2.0, 3.0, 10.0], 2.5)])
def test_median(values: list[float], middle: float) -> None:
    assert median(values) == middle


def test_median_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_ratio_is_taken_per_pair_so_that_drift_cancels() -> None:
    # the machine became twice as slow in mid-run: the ratio of medians would be 1.5, each pair says 1.5, 1.5 and 2
    assert paired_ratio([15.0, 30.0, 40.0], [10.0, 20.0, 20.0]) == 1.5


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], []), ([1.0], [0.0]), ([], [])])
def test_ratio_without_meaning_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|ratio|no values"):
        paired_ratio(ours, theirs)


@pytest.mark.parametrize(("value", "goal", "verdict"), [(1.0, 1.0, "met"), (1.01, 1.0, "missed"), (1.0, None, "")])
def test_verdict(value: float, goal: float | None, verdict: str) -> None:
    assert Figure("b", "n", value, "s", goal).verdict == verdict


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.234, "s", "0.23 s"), (12.34, "s", "12.3 s"), (1234.4, "MB", "1234 MB"), (12.345, "x", "12.35 x")],
)
def test_number(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_spread_is_only_said_of_several_runs() -> None:
    assert spread([1.0]) == ""
    assert spread([1.0, 2.0, 1.5]) == "1-2 of 3"


def test_table_is_aligned_and_holds_the_verdicts() -> None:
    figures = [of_runs("cold", "ISO", [2.0, 1.0, 3.0], "s"), Figure("cold", "ratio", 1.3, "x", 1.25, note="loaded")]
    assert table(figures).splitlines() == [
        "benchmark  what    value       goal          runs      note",
        "cold       ISO    2.00 s                     1-3 of 3",
        "cold       ratio  1.30 x  <= 1.25 x  missed            loaded",
    ]


def test_report_as_json_holds_runs_verdicts_and_failures() -> None:
    report = Report({"cpus": "2"}, (of_runs("boot", "ours", [1.0, 3.0], "s", 2.0),), {"mkosi": "is missing"})
    value = json.loads(report.to_json())
    assert value["machine"] == {"cpus": "2"}
    assert value["failures"] == {"mkosi": "is missing"}
    assert value["figures"] == [
        {"bench": "boot", "name": "ours", "value": 2.0, "unit": "s", "goal": 2.0, "runs": [1.0, 3.0], "note": "",
         "verdict": "met"}
    ]  # fmt: skip


def test_measure_counts_children_and_grandchildren(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    cost = measure([sys.executable, "-c", nested], log=tmp_path / "log")
    assert cost.cpu >= 0.3
    assert cost.wall >= 0.3


def test_measure_keeps_results_and_messages_apart(tmp_path: Path) -> None:
    words = ["sh", "-c", "echo result; echo message >&2; echo $WORD"]
    measure(words, log=tmp_path / "log", output=tmp_path / "out", env={"WORD": "word"})
    assert (tmp_path / "out").read_text() == "result\nword\n"
    assert (tmp_path / "log").read_text() == "message\n"


def test_measure_says_what_a_failed_program_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"status 3 of: sh -c (?s:.*)\| no luck"):
        measure(["sh", "-c", "echo no luck; exit 3"], log=tmp_path / "log")
    with pytest.raises(BenchError, match="'no-such-program' is missing"):
        measure(["no-such-program"], log=tmp_path / "log")


def test_measure_ends_what_overruns_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BenchError, match="not finished in its time"):
        measure(["sh", "-c", "sleep 60 & sleep 60"], log=tmp_path / "log", timeout=0.2)
    assert time.monotonic() - started < 10


def test_cpu_of_a_process_whose_name_is_hostile(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        assert 0 <= cpu_of(process.pid) < 1
        process.kill()
    assert cpu_of(os.getpid()) > 0
    with pytest.raises(BenchError, match="has ended"):
        cpu_of(process.pid)


def test_disk_size_counts_hard_links_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    alone = disk_size(tmp_path)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert disk_size(tmp_path / "a") >= 100_000
    assert disk_size(tmp_path) == alone


def test_scratch_is_gone_after_an_error(tmp_path: Path) -> None:
    def fail_inside() -> None:
        with scratch(tmp_path / "deep", "work") as folder:
            (folder / "file").touch()
            raise BenchError("stop")

    with pytest.raises(BenchError, match="stop"):
        fail_inside()
    assert list((tmp_path / "deep").iterdir()) == []


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_sources_name_suite_updates_and_security() -> None:
    lines = [line.split("] ")[1] for line in source_lines(MIRRORS, "trixie")]
    assert lines == [
        "http://mirror.example/debian trixie main", "http://mirror.example/debian trixie-updates main",
        "http://mirror.example/security trixie-security main",
    ]  # fmt: skip


def test_console_value_waits_for_the_whole_line() -> None:
    assert console_value('noise\r\nBENCH-READY {"healthy": 3', "BENCH-READY") is None
    assert console_value('noise\r\nBENCH-READY {"healthy": 38.0}\r\n', "BENCH-READY") == {"healthy": 38.0}
    assert console_value('BENCH-MEMORY {"used": 1}\n', "BENCH-READY") is None


def test_memory_in_use_is_what_is_not_available() -> None:
    meminfo = "MemTotal:  2000 kB\nMemFree: 10 kB\nMemAvailable: 1500 kB\nHugePages_Total: 0\n"
    assert memory_in_use(meminfo) == 500 * 1024


def test_the_console_line_that_is_waited_for_is_the_one_that_the_node_writes() -> None:
    from appliance.node.status import health_lines

    (line,) = health_lines({"healthy": True, "boot_seconds": 21.4})
    assert HEALTHY.search(line)


def test_mkosi_gets_the_packages_and_the_mirrors(tmp_path: Path) -> None:
    made = mkosi.prepare(["nginx", "udev"], tmp_path, tmp_path / "tree", MIRRORS)
    assert "Packages=nginx,udev\n" in (tmp_path / "mkosi.conf").read_text()
    sources = (tmp_path / "sandbox/etc/apt/sources.list.d/mkosi.sources").read_text()
    assert "URIs: http://mirror.example/debian\n" in sources
    assert "URIs: http://mirror.example/security\n" in sources
    made.change_file("other\n")
    assert (tmp_path / "extra/etc/bench.conf").read_text() == "other\n"


def builder_of(folder: Path, text: str) -> Builder:
    recipe = folder / "project/recipes/nginx"
    (recipe / "templates/etc/nginx").mkdir(parents=True)
    (recipe / "recipe.yaml").write_text(text)
    (recipe / "templates/etc/nginx/nginx.conf.j2").write_text("worker_processes 2;\n")
    return Builder(folder / "build.py", folder / "project", folder / "cache", folder / "out")


def test_builder_changes_its_copy_and_restores_it(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "summary: x\npackages: [nginx]\n")
    remains = tmp_path / "original"
    (remains / "recipes").mkdir(parents=True)
    builder.change_template("changed")
    builder.add_package("less")
    assert (builder.project / "recipes/nginx/recipe.yaml").read_text() == "summary: x\npackages: [less, nginx]\n"
    template = builder.project / "recipes/nginx/templates/etc/nginx/nginx.conf.j2"
    assert template.read_text() == "worker_processes 2;\n# changed\n"
    builder.restore(remains)
    assert list((builder.project / "recipes").iterdir()) == []


def test_builder_says_when_the_recipe_has_another_shape(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no line that starts with 'packages"):
        builder_of(tmp_path, "packages:\n  - nginx\n").add_package("less")


def test_stage_seconds_come_from_the_builders_own_account() -> None:
    build = Build(None, {"path": "/x.iso", "stages": [{"name": "iso", "seconds": 0.5}]})  # type: ignore[arg-type]
    assert build.iso == Path("/x.iso")
    assert build.stage_seconds("iso") == 0.5
    with pytest.raises(BenchError, match="no stage 'lock'"):
        build.stage_seconds("lock")


def test_a_workshop_knows_the_packages_of_the_lock_and_must_be_opened() -> None:
    shop = Workshop(PROJECT, 1)
    assert {"nginx", "udev", "postfix"} <= set(shop.packages)
    assert ".venv" in LEFT_OUT
    with pytest.raises(BenchError, match="not open"):
        _ = shop.builder


def test_the_projects_own_recipe_has_the_shape_that_the_benchmark_edits() -> None:
    recipe = PROJECT / "recipes/nginx"
    assert "\npackages: [" in (recipe / "recipe.yaml").read_text()
    assert list(recipe.rglob("*.conf.j2"))


# --- bundles and their peers -----------------------------------------------------------------------------------------


def test_measure_sees_the_memory_of_the_program_and_not_ours(tmp_path: Path) -> None:
    ours = bytearray(80 << 20)
    cost = measure(
        [sys.executable, "-I", "-c", "x = bytearray(40 << 20); import time; time.sleep(.1)"], log=tmp_path / "log"
    )
    assert 40 << 20 <= cost.memory < len(ours)
    assert peak_memory(os.getpid()) > len(ours)
    total = cost + Cost(1, 2, 3)
    assert (total.wall, total.cpu, total.memory) == (cost.wall + 1, cost.cpu + 2, cost.memory)


def test_a_peer_that_is_missing_is_shown_so() -> None:
    figure = Figure("bundle", "casync, layers", math.nan, "KB", note="the program 'casync' is missing")
    assert table([figure]).splitlines()[1].split() == ["bundle", "casync,", "layers", "missing", *figure.note.split()]
    assert figure.verdict == ""
    assert json.loads(Report({}, (figure,)).to_json())["figures"][0]["value"] is None


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Two trees that differ in a file, with files and images of them that are no real ones."""
    for name, word in (("old", b"one"), ("new", b"two")):
        (tmp_path / name / "etc").mkdir(parents=True)
        (tmp_path / name / "etc/changed").write_bytes(word * 1000)
        (tmp_path / name / "same").write_bytes(bytes(range(256)) * 500)
    tars = tuple(peers.as_tar(tmp_path / name, tmp_path / f"{name}.tar") for name in ("old", "new"))
    images = (tmp_path / "old.img", tmp_path / "new.img")
    images[0].write_bytes(b"a" * 4096 + b"b" * 4096)
    images[1].write_bytes(b"c" * 4096 + b"b" * 4096 + b"a" * 4096 + b"c" * 4096 + b"end")
    return Given(tmp_path / "old", tmp_path / "new", ((tars[0], tars[1]),), (images,))


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_makes_and_applies(name: str, given: Given, tmp_path: Path) -> None:
    program = name.split()[0]
    if program in peers.PROGRAMS and shutil.which(program) is None:
        pytest.skip(f"needs {program}: {peers.APT_LINE}")
    if program == "ostree" and os.geteuid() != 0:
        pytest.skip("needs root, as files keep their owners")
    (tmp_path / "work").mkdir()
    taken = peers.PEERS[name](given, tmp_path / "work")
    assert 0 < taken.size < 60_000


def test_blocks_that_the_old_image_has_anywhere_are_not_fetched(given: Given, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    assert peers.block_index(given, tmp_path / "work").size == 2 * 4096


def test_peers_that_are_not_installed_are_named(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = peers.run_peers(given, tmp_path / "cache")
    assert list(found) == list(peers.PEERS)
    assert all("is missing" in str(found[name]) for name in found if name.split()[0] in peers.PROGRAMS)
    assert isinstance(found["4 KiB block index"], Taken)


def lock_of(**versions: str) -> Lock:
    packages = tuple(
        Package(name.replace("_", "-"), version, "amd64", "debian", name, 1, "0" * 64)
        for name, version in versions.items()
    )
    return Lock("trixie", 1, {}, {"core": packages[:1], "full": packages, "tools": packages[1:]})


def test_an_update_is_told_in_words() -> None:
    old = lock_of(libc6="2.41-1", libc_bin="2.41-1", nginx="1.26", gone="1")
    new = lock_of(libc6="2.41-2", libc_bin="2.41-2", nginx="1.26", fresh="2")
    update = plain.Update("x", old, new, new, ())
    assert plain.in_words(update.moved) == ["fresh 2 (new)", "gone 1 (gone)", "libc-bin, libc6 2.41-1 -> 2.41-2"]


def test_the_old_kernel_is_kept_in_the_userspace_update() -> None:
    old, new = lock_of(linux_image_1="1", nginx="1.26"), lock_of(linux_image_2="2", nginx="1.27")
    mixed = with_kernel_of(new, old)
    assert [(one.name, one.version) for one in mixed.sets["full"]] == [("linux-image-1", "1"), ("nginx", "1.27")]
    assert [one.name for one in mixed.sets["core"]] == ["linux-image-1"]
    assert plain.same_tools(old, new).sets["tools"] == new.sets["tools"]
    assert plain.same_tools(old, new).sets["full"] == old.sets["full"]


def test_trees_share_what_is_the_same(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "opt/app").mkdir(parents=True)
    (tree / "same").write_text("same")
    (tree / "opt/app/old").write_text("old")
    (tmp_path / "app").mkdir()
    (tmp_path / "app/new").write_text("new")
    out = plain.with_files(tree, tmp_path / "out", {"opt/app": tmp_path / "app", "etc/file": tmp_path / "app/new"})
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "etc/file",
        "opt/app/new",
        "same",
    ]
    assert (out / "same").samefile(tree / "same")
    assert (tree / "opt/app/old").read_text() == "old"


def test_the_nodes_own_code_applies_a_bundle_and_is_measured(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    maker = Maker(tmp_path / "files")
    old, new = maker.release(), maker.release("1.1", nginx=b"two", library=NOISE[:30_000])
    path = make_bundle(old, new, SIGNER, tmp_path / "bundle").path
    change = Change("x", old, new, lambda folder: (folder, folder))
    root = tmp_path / "node"
    root.mkdir()
    words = (bundle._node_with(change, root), path, bundle._node(change), SIGNER.public.hex())
    peaks = [bundle._on_node("stage", *words).memory for _ in range(6)]  # a busy machine may miss the peak of some
    assert 0 < max(peaks) < 64 << 20
    made = bundle._made(change)
    assert sorted(file.name for file in made) == sorted(one.digest for one in new.manifest.layers if one.kind != "app")
    assert {file.name for file in (root / "layers").iterdir() if not file.is_symlink()} == {
        f"{layer.kind}-{layer.digest}.erofs" for layer in new.manifest.layers if layer.kind != "app"
    }
    assert bundle._on_node("copy", tmp_path / "out", *made).cpu > 0
    assert (tmp_path / "out").read_bytes() == made[-1].read_bytes()
