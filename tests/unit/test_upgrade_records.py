"""The state partition: what is written in which order, and what a power-on boots from what is found there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.node.release import Manifest, boot_record, dump
from appliance.node.upgrade import records
from appliance.node.upgrade.records import BootRecord, Choice, Held, parse_record
from tests.unit.releases import Maker

GRUB = Path(__file__).parents[2] / "appliance/boot/grub-disk.cfg"
GOOD = "set release='1.0'\nset kernel='6.12-a'\nset data='1'\nset options='quiet console=tty0'\n"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Maker(tmp_path_factory.mktemp("files")).release().manifest


# --- boot records ----------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(manifest: Manifest) -> None:
    content = boot_record(manifest, 7, "1.0+abcdef01", "samepage.trial=600")
    assert parse_record(content) == BootRecord("1.0+abcdef01", manifest.kernel.id, 7, "quiet samepage.trial=600")
    assert parse_record(boot_record(manifest, 7)) == BootRecord("1.0", manifest.kernel.id, 7, "quiet")
    assert parse_record(GOOD.encode()) == BootRecord("1.0", "6.12-a", 1, "quiet console=tty0")


@pytest.mark.parametrize(
    "content",
    [
        "", "\n", "set release='1.0'\n", GOOD.replace("1.0", ""), GOOD.replace("'1'", "'x'"), GOOD.replace("'1'", "''"),
        GOOD.replace("'1'", "'-1'"), GOOD.replace("'1'", f"'{10**9}'"), GOOD + "\nreboot\n", GOOD + "set x='$(y)'\n",
        GOOD.replace("quiet", "quiet'; halt; '"), GOOD.replace("set ", "export "), GOOD.replace("'", '"'), "\0" * 512,
        GOOD.replace("1.0", "ü"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_none(content: str) -> None:
    assert parse_record(content.encode()) is None


def test_a_small_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert records.read_small(str(tmp_path / "file"), 5) == b"12345"
    assert records.read_small(str(tmp_path / "file"), 4) is None
    assert records.read_small(str(tmp_path / "none"), 5) is None
    assert records.read_small(str(tmp_path), 5) is None
    assert records.read_record(str(tmp_path), "none") is None


# --- what a power-on boots -------------------------------------------------------------------------------------------


def tree(
    root: Path, cfgs: Mapping[str, str | None], releases: tuple[str, ...] = ("1.0", "1.1"),
    kernels: tuple[str, ...] = ("6.12-a", "6.12-b"),
) -> Path:  # fmt: skip
    """A state partition with whole releases, kernels, and boot records with these contents."""
    for name in releases:
        (root / "releases" / name).mkdir(parents=True)
        (root / "releases" / name / "layers").write_text("base x\n")
    for name in kernels:
        (root / "kernels" / name).mkdir(parents=True)
        for file in records.KERNEL_FILES:
            (root / "kernels" / name / file).write_text("content")
    (root / "boot").mkdir()
    for name, content in cfgs.items():
        if content is not None:
            (root / "boot" / f"{name}.cfg").write_text(content)
    return root


OTHER = GOOD.replace("1.0", "1.1").replace("6.12-a", "6.12-b").replace("'1'", "'2'")
SELECTED, PREVIOUS = Choice("selected", "1.0", "6.12-a", 1), Choice("previous", "1.1", "6.12-b", 2)


def test_the_selected_release_boots(tmp_path: Path) -> None:
    assert records.choose(str(tree(tmp_path, {"selected": GOOD, "previous": OTHER}))) == SELECTED


@pytest.mark.parametrize("lost", ["boot/selected.cfg", "releases/1.0/layers", "kernels/6.12-a/vmlinuz"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_where_that_is_broken_the_one_before_boots(tmp_path: Path, lost: str, how: str) -> None:
    root = tree(tmp_path, {"selected": GOOD, "previous": OTHER})
    (root / lost).write_text("") if how == "empty" else (root / lost).unlink()
    assert records.choose(str(root)) == PREVIOUS
    (root / "kernels/6.12-b/initrd").unlink()
    assert records.choose(str(root)) is None


def test_a_release_that_is_tried_is_no_choice(tmp_path: Path) -> None:
    assert records.choose(str(tree(tmp_path, {"selected": GOOD, "try": OTHER}))) == SELECTED
    assert records.choose(str(tmp_path / "nothing")) is None


STUBS = r"""
serial() { return 1; }
regexp() { :; }
probe() { :; }
set() { printf -v "${1%%=*}" %s "${1#*=}"; }
load_env() { next_entry=$ENTRY; }
save_env() { saved=${next_entry:-empty}; }
sleep() { :; }
linux() { :; }
initrd() { :; }
declare -A shown
entry() { shown[$1]="$2|$3|$4"; }
grub_platform=efi
"""
ASK = r"""
echo "default=$default saved=$saved"
for name in "$default" $fallback; do
    if [ -n "${shown[$name]}" ]; then echo "$name|${shown[$name]}"; exit; fi
done
echo nothing
"""


def grub(root: Path, entry: str = "") -> tuple[str, Choice | None]:
    """What the installed disk's GRUB script chooses: its default, and what boots; bash runs it, GRUB's own words aside.

    GRUB goes to the fallback where the default cannot be started.
    """
    script = GRUB.read_text().replace('set store="($disk,gpt3)"', f"set store={root}")
    script, count = re.subn(
        r'menuentry "[^"]*" --id "\$name" (.*?) \{\n.*?\n +\}', r'entry "$name" \1', script, flags=re.DOTALL
    )
    assert count == 1
    script = script.replace("function start {", "start() {").replace('"$prefix/grubenv"', "grubenv")
    done = subprocess.run(
        ["bash", "-c", STUBS + script + ASK], capture_output=True, text=True, env={"ENTRY": entry, "PATH": "/usr/bin"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    head, last = done.stdout.splitlines()[-2:]
    if last == "nothing":
        return head, None
    record, release, kernel, data = last.split("|")
    return head, Choice(record, release, kernel, int(data))


CONTENTS = (GOOD, OTHER, "", None, GOOD.replace("1.0", "9"), GOOD.replace("-a", "-z"))
STATES = [(one, two) for one in CONTENTS for two in CONTENTS]


@pytest.mark.parametrize("number", range(len(STATES)))
def test_the_node_knows_what_grub_boots(tmp_path: Path, number: int) -> None:
    selected, previous = STATES[number]
    root = tree(tmp_path, {"selected": selected, "previous": previous})
    for lost in (None, "releases/1.0/layers", "kernels/6.12-a/initrd", "kernels/6.12-b/vmlinuz"):
        if lost:
            (root / lost).write_text("")
        assert records.choose(str(root)) == grub(root)[1], lost


def test_grub_tries_a_release_once(tmp_path: Path) -> None:
    root = tree(tmp_path, {"selected": GOOD, "try": OTHER.replace("quiet", "quiet samepage.trial=600")})
    assert grub(root, "try") == ("default=try saved=empty", PREVIOUS._replace(record="try"))
    assert grub(root) == ("default=selected saved=", SELECTED)
    assert grub(root, "something") == ("default=selected saved=", SELECTED)


def test_a_release_that_is_tried_and_cannot_be_started_gives_way_to_the_chosen_one(tmp_path: Path) -> None:
    root = tree(tmp_path, {"selected": GOOD, "previous": OTHER})
    assert grub(root, "try") == ("default=try saved=empty", SELECTED)
    (root / "kernels/6.12-a/vmlinuz").write_text("")
    assert grub(root, "try") == ("default=try saved=empty", PREVIOUS)


# --- writing ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Takes down what a power cut after each commit would find."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.states: list[dict[str, str]] = []
        monkeypatch.setattr(records, "commit", self.commit)

    def commit(self, root: str) -> None:
        assert root == str(self.root)
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        self.states.append({str(path.relative_to(self.root)): path.read_text() for path in files})


def test_files_are_replaced_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "boot" / name).write_text("old")
    seen = Recorder(tmp_path, monkeypatch)
    records.put(str(tmp_path), {"boot/a": b"new", "boot/c": None, "boot/b": b"new", "releases/x/data": b"1"})
    plain = [{name: text for name, text in one.items() if not name.endswith(records.PARTIAL)} for one in seen.states]
    assert plain == [
        {"boot/a": "old", "boot/b": "old", "boot/c": "old"},
        {"boot/a": "new", "boot/b": "old", "boot/c": "old"},
        {"boot/a": "new", "boot/b": "old"},
        {"boot/a": "new", "boot/b": "new"},
        {"boot/a": "new", "boot/b": "new", "releases/x/data": "1"},
    ]
    assert seen.states[0]["boot/a.partial"] == "new"  # whole on the disk before it gets its name
    assert not any(name.endswith(records.PARTIAL) for name in seen.states[-1])
    records.put(str(tmp_path), {"boot/c": None})  # what is gone may be removed again


def test_a_commit_works_on_any_file_system(tmp_path: Path) -> None:
    records.commit(str(tmp_path))
    records.put(str(tmp_path), {"file": b"x"})
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_release_appears_whole(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder(tmp_path, monkeypatch)
    content = dump(manifest)
    records.record_release(str(tmp_path), "1.0", content, "one")
    assert [sorted(one) for one in seen.states] == [
        ["releases/1.0.partial/layers", "releases/1.0.partial/release.json"],
        ["releases/1.0/layers", "releases/1.0/release.json"],
    ]
    held = records.held_releases(str(tmp_path))
    assert held["1.0"].manifest == manifest
    assert records.release_id(held, manifest, held["1.0"].digest) == "1.0"
    assert records.release_id(held, manifest, "f" * 64) == "1.0+ffffffff"
    assert records.release_id({}, manifest, "f" * 64) == "1.0"


def test_what_is_no_whole_release_is_not_held(tmp_path: Path, manifest: Manifest) -> None:
    content = dump(manifest)
    for name, text in {
        "good": content, "gone.partial": content, "cut": content[:-50], "empty": b"", "deep": b"[" * 100_000,
        "other": b'{"format": 2}',
    }.items():  # fmt: skip
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / "release.json").write_bytes(text)
    (tmp_path / "releases/none").mkdir()
    (tmp_path / "releases/good/data").write_text("7\n")
    assert {name: one.data for name, one in records.held_releases(str(tmp_path)).items()} == {"good": 7}
    (tmp_path / "releases/good/data").write_text("-7\n")
    assert records.held_releases(str(tmp_path))["good"].data is None
    assert records.held_releases(str(tmp_path / "nowhere")) == {}


def test_data_subvolumes_are_numbers(tmp_path: Path) -> None:
    assert records.data_numbers(str(tmp_path)) == []
    for name in ("1", "10", "9", "new", "2.partial"):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert records.data_numbers(str(tmp_path)) == [1, 9, 10]


def commits(held: Held, root: Path) -> Iterator[Choice | None]:
    """What boots after each step of the commit of release 1.1, with the data 1, over 1.0 with its snapshot 2."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Choice | None] = []
        patch.setattr(records, "commit", lambda place: seen.append(records.choose(place)))
        files: dict[str, bytes | None] = {records.PREVIOUS: GOOD.replace("'1'", "'2'").encode()}
        records.put(str(root), files | records.select(held, 1))
    yield from seen


def test_a_commit_is_one_step_from_old_to_new(tmp_path: Path, manifest: Manifest) -> None:
    """Whatever happens in it, the old release with the old data boots, or the new one with the new."""
    new = manifest._replace(version="1.1", kernel=manifest.kernel._replace(id="6.12-b"))
    root = tree(tmp_path, {"selected": GOOD.replace("'1'", "'2'")})
    found = list(commits(Held("1.1", new, "f" * 64, None), root))
    old, then = Choice("selected", "1.0", "6.12-a", 2), Choice("selected", "1.1", "6.12-b", 1)
    assert found == [old, old, then]
    assert grub(root)[1] == then
    (root / "kernels/6.12-b/vmlinuz").unlink()
    assert records.choose(str(root)) == grub(root)[1] == old._replace(record="previous")


NAMES = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,20}", fullmatch=True)
CMDLINES = st.from_regex(re.compile(r"[\w=.,:/@+ -]{0,40}", re.ASCII), fullmatch=True)


@given(NAMES, NAMES, st.integers(0, 10**9 - 1), CMDLINES)
@settings(max_examples=100)
def test_every_record_of_a_manifest_can_be_read(
    manifest: Manifest, name: str, kernel: str, data: int, cmdline: str
) -> None:
    made = manifest._replace(kernel=manifest.kernel._replace(id=kernel, cmdline=cmdline))
    assert parse_record(boot_record(made, data, name)) == BootRecord(name, kernel, data, cmdline.strip())
