"""The engine on a state partition in a folder: whatever fails, wherever the power goes, no stored row is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.node.upgrade import engine, journal, judging, mounts, records, resume, services, trial
from appliance.node.upgrade.engine import Job, Outcome
from appliance.node.upgrade.journal import Journal
from appliance.node.upgrade.node import Node, Settings
from tests.unit.releases import Maker

DOOR = services.Door("nginx.service", 28, 1)  # type: ignore[arg-type]
STATES = tuple(engine.ORDER)
CLASSES = (("live", True), ("live", False), ("soft-reboot", True), ("reboot", True))


class Cut(BaseException):
    """Here the power goes, or the process is killed."""


@dataclass
class World:
    """A machine with clients that write whenever the front door lets them, and whatever is to go wrong.

    `error` is what the call with that `number` raises, of all calls that reach outside. Rows are lines of data/N/rows.
    """

    partition: Path
    root: Path
    running: str = "1.0"
    data: int = 1
    door: str = "open"  # open, held, or waiting for the gate
    trial: bool = False
    next_root: tuple[str, int] | None = None
    try_next: bool = False
    in_gate: bool = False
    down: str = ""  # how the machine restarts, as soon as the process has ended
    stored: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    number: int = 0  # of the call that fails
    error: BaseException | None = None

    def anew(self, number: int = 0, error: BaseException | None = None) -> World:
        """Back to the beginning; the call with that number will fail."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.partition, self.root)
        self.running, self.data, self.door, self.trial, self.next_root, self.try_next = (
            "1.0",
            1,
            "open",
            False,
            None,
            False,
        )
        self.down, self.stored, self.calls, self.number, self.error = "", set(), [], number, error
        self.in_gate = False
        return self

    @property
    def failed(self) -> bool:
        return self.number <= len(self.calls)

    def reach(self, what: str) -> None:
        self.calls.append(what)
        self.check()
        if self.error is not None and len(self.calls) == self.number:
            raise self.error

    def rows(self, number: int) -> set[str]:
        return set((self.root / f"data/{number}/rows").read_text().split())

    def client(self) -> None:
        """A client writes, and is told that it is stored."""
        if self.door == "open":
            row = f"row{len(self.stored)}"
            file = self.root / f"data/{self.data}/rows"
            file.write_text(f"{file.read_text()}{row}\n")
            self.stored.add(row)

    def open(self) -> None:
        self.door = "open"
        self.client()

    def check(self) -> None:
        """Whenever the power goes, what boots has every row that a client was told is stored."""
        self.client()
        choice = records.choose(str(self.root))
        assert choice is not None
        assert self.stored <= self.rows(choice.data), (self.calls[-3:], choice)

    def restart(self, how: str) -> None:
        """The machine comes up again: by its power, or with a new userspace only."""
        self.calls.append(f"[{how}]")
        if how == "soft-reboot":
            assert self.next_root is not None
            self.running, self.data = self.next_root
        else:
            choice = records.choose(str(self.root))
            assert choice is not None
            self.running, self.data, self.trial = choice.release, choice.data, False
            tried = records.read_record(str(self.root), records.TRY)
            if self.try_next and tried is not None:
                self.running, self.data, self.trial = tried.release, tried.data, True
            self.try_next = False
        self.next_root, self.door, self.down = None, "waiting", ""

    def node(self) -> Node:
        held = records.held_releases(str(self.root))
        return Node(
            "one", "/dev/vda3", held[self.running], self.data, held, Settings(), {"name": "one"}, root=str(self.root)
        )


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state partition with both releases, of which 1.0 runs."""
    root, files = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("files")
    maker = Maker(files)
    for name in ("data/1", "boot", journal.FOLDER, records.RELEASES):
        (root / name).mkdir(parents=True)
    (root / "data/1/rows").write_text("")
    for version in ("1.0", "1.1"):
        built = maker.release(version, app=version.encode())
        folder = root / records.RELEASES / version
        folder.mkdir()
        (folder / "release.json").write_bytes(built.content)
        (folder / "layers").write_text("base\n")
        for file in records.KERNEL_FILES:
            place = Path(records.kernel_path(str(root), built.manifest.kernel.id, file))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("x")
    held = records.held_releases(str(root))["1.0"]
    (root / records.SELECTED).write_bytes(records.select(held, 1)[records.SELECTED] or b"")
    return root


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where the host has that: thousands of small files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture
def world(partition: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(partition, folder / "state")
    monkeypatch.setattr(records, "commit", lambda _root: made.reach("commit"))

    def run(*words: str, **_: Any) -> str:
        made.reach(" ".join(words[:3]))
        if words[:3] == ("btrfs", "subvolume", "snapshot"):
            shutil.copytree(words[3], words[4])
        elif words[:3] == ("btrfs", "subvolume", "delete"):
            assert words[3] != str(made.root / f"data/{made.data}")
            shutil.rmtree(words[3])
        return ""

    def hold(_door: services.Door, _seconds: float) -> None:
        made.reach("hold")
        made.door = "held"

    def open_door(*_: object) -> None:
        made.reach("open")
        made.open()

    def swap(_old: mounts.Trees, _new: mounts.Trees, _identity: str) -> None:
        made.reach("swap")

    def build(trees: mounts.Trees, _identity: str, _state: str, _device: str, data: int) -> None:
        made.reach("build")
        releases = records.held_releases(str(made.root))
        release = next(name for name in releases if made.node().trees(releases[name]) == trees)
        made.next_root = (release, data)

    def show(manifest: bytes) -> None:
        made.reach("show")
        made.running = next(
            name for name, one in records.held_releases(str(made.root)).items()
            if manifest == (made.root / records.RELEASES / one.id / "release.json").read_bytes()
        )  # fmt: skip

    def soft_reboot(manifest: bytes, *, trial: bool) -> None:
        show(manifest)
        made.trial = trial
        made.reach("soft-reboot")
        made.down = "soft-reboot"

    def reboot() -> None:
        made.reach("reboot")
        made.next_root, made.down = None, "reboot"

    def boot_once(_device: str) -> None:
        made.reach("boot once")
        made.try_next = True

    def end() -> None:
        made.reach("end of the trial")
        made.trial = False

    def probe(_seconds: float, *, behind_door: bool) -> None:
        made.reach("probe behind the door" if behind_door else "probe")
        if made.door == "waiting" and not behind_door:
            raise judging.Failed("the front door's own probes wait for the gate, which waits for them")

    def wait_open() -> None:
        made.reach("wait open")
        if made.door != "open":
            raise judging.Shut("nginx does not start")

    for module, name, fake in (
        (services, "shorten_stop", lambda: made.reach("shorten stop")),
        (services, "run", run), (services, "doors", lambda _node: [DOOR]), (services, "hold", hold),
        (services, "release", open_door), (services, "notify", open_door),
        (services, "restarting", lambda: bool(made.down)), (services, "stop", lambda _units: made.reach("stop")),
        (services, "take_over", lambda *_: made.reach("take over")),
        (services, "forget_failures", lambda: made.reach("forget failures")),
        (mounts, "swap", swap), (mounts, "build_next_root", build),
        (mounts, "drop_next_root", lambda: made.reach("drop next root")),
        (mounts, "keep_config", lambda _trees: None),
        (trial, "ready", lambda: made.reach("watchdog")), (trial, "arm", lambda _seconds: made.reach("arm")),
        (trial, "end", end), (trial, "reboot", reboot),
        (trial, "soft_reboot", soft_reboot), (trial, "boot_once", boot_once), (trial, "show_release", show),
        (services, "serves", lambda _unit: made.door == "open"), (services, "shut", lambda _unit: made.reach("shut")),
        (judging, "wait_healthy", probe), (judging, "wait_open", wait_open),
        (resume, "look", made.node), (engine, "_tried", lambda _job: made.running == "1.1" and made.next_root is None),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fake)
    return made


def begin(world: World, depth: str, with_data: bool, **changes: Any) -> Job:
    node = world.node()
    begun = Journal(
        state="plan", action="upgrade", depth=depth, old="1.0", new="1.1", running_data=1,
        old_data=2 if with_data else 1, new_data=1, started=1, with_data=with_data,
        units={"samepage.service": "restart"},
    )  # fmt: skip
    return Job(node, node.held["1.0"], node.held["1.1"], begun._replace(**changes), quiet)


def quiet(_state: str, _done: int, _total: int) -> None:
    pass


def carry_on(world: World, outcome: Outcome | None) -> Outcome | None:
    """Let the machine restart as often as it wants to; how it ended."""
    for _ in range(4):
        if not world.down:
            return outcome
        world.restart(world.down)
        world.in_gate = True
        outcome = resume.after_boot(quiet) or outcome
        world.in_gate = False
        if world.door == "waiting" and not world.down and (outcome is None or outcome.name != "stopped"):
            world.open()
    raise AssertionError(f"no end of restarts: {world.calls}")


def upgrade(world: World, depth: str, with_data: bool, **changes: Any) -> Outcome | None:
    return carry_on(world, engine.run(begin(world, depth, with_data, **changes)))


def ended(world: World) -> str:
    """Everything is at an end: what runs is what boots, is what the history says, and serves; how it ended."""
    root = str(world.root)
    world.check()
    assert journal.read(root) is None
    last = journal.read_history(root)[-1]
    choice = records.choose(root)
    assert choice is not None
    assert (choice.release, choice.data) == (world.running, world.data)
    assert world.running == {"committed": "1.1", "rolled-back": "1.0", "failed": "1.0"}[last["outcome"]], last
    assert (world.door, world.trial) == ("open", False)
    left = {one.data for one in records.held_releases(root).values()} - {None}
    assert set(records.data_numbers(root)) == left | {world.data}
    assert not (world.root / records.TRY).exists()
    return str(last["outcome"])


# --- without trouble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
def test_upgrade_that_succeeds(world: World, depth: str, with_data: bool) -> None:
    upgrade(world.anew(), depth, with_data)
    assert ended(world) == "committed"
    assert (world.running, world.data) == ("1.1", 1)


@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
def test_what_shortens_a_stop_is_done_before_clients_wait(world: World, depth: str, with_data: bool) -> None:
    upgrade(world.anew(), depth, with_data)
    before_hold = world.calls[: world.calls.index("hold")] if with_data else world.calls
    assert ("shorten stop" in before_hold) == (depth != "live" and with_data)
    assert ("forget failures" in before_hold) == (depth == "soft-reboot")


def test_old_release_s_units_may_start_as_often_as_before(world: World) -> None:
    """A soft reboot keeps the count of starts, which those of a release that failed have used up."""
    upgrade(world.anew(), "soft-reboot", True)
    probed = world.calls.index("probe behind the door") + 1
    upgrade(world.anew(probed, OSError("it does not start")), "soft-reboot", True)
    after = world.calls[probed:]
    assert after.index("forget failures") < after.index("soft-reboot")


@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
@pytest.mark.parametrize("state", STATES)
def test_stopped_upgrade(world: World, depth: str, with_data: bool, state: str) -> None:
    """It goes on, is called off, or the machine restarts."""
    for end, outcomes in (
        (go_on, ("committed",)), (call_off, ("failed", "rolled-back")),
        (restart, ("committed",) if state == "open" else ("failed", "rolled-back")),
    ):  # fmt: skip
        outcome = upgrade(world.anew(), depth, with_data, stop_before=state)
        assert outcome is not None
        assert outcome.name == "stopped"
        shut = with_data and state != "hold"
        assert (world.door == "open") != (shut or world.trial)
        end(world)
        assert ended(world) in outcomes


def go_on(world: World) -> None:
    """What the worker does for `commit`."""
    begun = journal.read(str(world.root))
    assert begun is not None
    job = resume.job_of(world.node(), begun._replace(stopped=False, stop_before=""), quiet)
    carry_on(world, engine.run(job, begun.stop_before))


def call_off(world: World) -> None:
    """What the worker does for `rollback`."""
    begun = journal.read(str(world.root))
    assert begun is not None
    job = resume.job_of(world.node(), begun._replace(stopped=False), quiet)
    carry_on(world, engine.undo(job, begun.state, engine.CALLED_OFF))
    assert journal.read_history(str(world.root))[-1]["blameless"]


def restart(world: World) -> None:
    world.down = "power"
    carry_on(world, None)


# --- with trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space"), KeyError("a fault")], ids=repr)
@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
def test_any_call_fails(world: World, depth: str, with_data: bool, error: Exception) -> None:
    """The node serves again, with one of the two releases and every row."""
    for number in every_call(world):
        try:
            upgrade(world.anew(number, error), depth, with_data)
        except type(error):  # with no room for the history, say, the next run ends it
            carry_on(world, resume.after_end(quiet))
        if world.failed:
            ended(world)


@pytest.mark.parametrize("healthy", [True, False])
@pytest.mark.parametrize(("depth", "with_data"), [one for one in CLASSES if one[1]])
def test_clients_wait_until_the_old_release_serves_again(
    world: World, monkeypatch: pytest.MonkeyPatch, depth: str, with_data: bool, healthy: bool
) -> None:
    """A door before a product that only starts would send them away; one that stays shut is no better."""

    def probe(_seconds: float, *, behind_door: bool) -> None:
        world.reach(f"probe {behind_door}")
        if world.running == "1.1" or not healthy:
            raise judging.Failed("not healthy")

    monkeypatch.setattr(judging, "wait_healthy", probe)
    upgrade(world.anew(), depth, with_data)
    assert ended(world) == "rolled-back"
    back = max(number for number, call in enumerate(world.calls) if call.startswith("["))
    after = world.calls[back:]
    assert after.index("end of the trial") < after.index("probe True") < after.index("open")


@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
def test_power_is_cut_anywhere(world: World, depth: str, with_data: bool) -> None:
    for number in every_call(world):
        with suppress(Cut):
            upgrade(world.anew(number, Cut()), depth, with_data)
        if world.failed:
            begun, chosen = journal.read(str(world.root)), records.choose(str(world.root))
            restart(world)
            if begun is not None:
                assert chosen is not None
                assert ended(world) == "committed" or chosen.release == "1.0", world.calls


@pytest.mark.parametrize(("depth", "with_data"), CLASSES)
def test_process_is_killed_anywhere(world: World, depth: str, with_data: bool) -> None:
    """Its unit calls `recover` then; where it is the judge of a trial, the unit restarts the machine."""
    for number in every_call(world):
        with suppress(Cut):
            upgrade(world.anew(number, Cut()), depth, with_data)
        if not world.failed:
            continue
        begun = journal.read(str(world.root))
        if world.in_gate and world.trial:
            world.down = world.down or "reboot"
        if not world.down and not world.in_gate:
            resume.after_end(quiet)
        carry_on(world, None)
        if world.door == "waiting":  # the judge of a release that stays: its unit fails, and the next run ends it
            world.open()
        if journal.read(str(world.root)) is not None:
            carry_on(world, resume.after_end(quiet))
        if begun is not None:
            ended(world)


def every_call(world: World) -> Iterator[int]:
    """Numbers of calls, until there are no more of them."""
    number = 0
    while number == 0 or world.failed:
        number += 1
        yield number
    assert number > 8
