"""An upgrade that is stopped, killed or cut off: what each state promises, and that nothing half-done stays."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from appliance.targets.qmp import Qmp
from tests.upgrade.endings import (
    DOOR,
    FULL,
    JOURNAL,
    NGINX,
    PAGE,
    PRODUCT,
    USERSPACE,
    came_back,
    door_is_held,
    left_files,
    put_bundle,
    settled,
    told_why,
    undone,
    wait_until,
    written_journal,
)
from tests.upgrade.machines import TARGET, TOOL, Machine
from tests.variants import Variants

STATES = ("hold", "snapshot", "switch", "migrate", "health", "commit", "open")
CGROUP = "/sys/fs/cgroup/system.slice/samepage-upgrade.service/cgroup.procs"
TITLE = f"head -c 4096 /opt/samepage/{PAGE.partition('/opt/samepage/')[2]}"

# Signals the processes of the upgrade, or the one that shows it, as soon as a state has been entered.
KILLER = """
import os, re, sys, time
signal, state, files = int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3:]
while True:
    try:
        if state == b"stage":
            if any(name.endswith(".partial") for name in os.listdir("/state/layers")):
                break
        elif b'"state": "%s"' % state in open("/state/upgrade/journal.json", "rb").read():
            break
    except OSError:
        pass
    time.sleep(0.002)
for number in re.findall(r"[0-9]+", "".join(open(file).read() for file in files)):
    os.kill(int(number), signal)
"""


@pytest.fixture
def product(variants: Variants) -> Path:
    """A bundle for a live upgrade that holds the door and keeps the data of before."""
    variants.release("5.1", PRODUCT)
    return variants.bundle("1.0", "5.1")


@pytest.fixture
def nginx(variants: Variants) -> Path:
    """A bundle for a live upgrade that needs neither."""
    variants.release("5.2", NGINX)
    return variants.bundle("1.0", "5.2")


@pytest.fixture
def userspace(variants: Variants) -> Path:
    """A bundle for a soft reboot."""
    variants.release("5.3", USERSPACE)
    return variants.bundle("1.0", "5.3")


def kill_in(node: Machine, state: str, signal: int = 9, file: str = CGROUP) -> None:
    """Have the upgrade's processes signalled in that state; `file` has their numbers."""
    node.put(KILLER.encode(), "/run/killer.py")
    node.ssh(f"python3 -IS /run/killer.py {signal} {state} {file} >/run/killer.log 2>&1 </dev/null &")


def stop(node: Machine, bundle: str, state: str) -> dict[str, Any]:
    status, found = node.tool("install", bundle, "--stop-before", state)
    assert (status, found["outcome"]) == (0, "stopped"), found
    return found


# --- stopped on purpose ----------------------------------------------------------------------------------------------


def test_what_each_state_promises(node: Machine, product: Path) -> None:
    """One upgrade, stopped before each of its states in turn."""
    place = put_bundle(node, product)
    old = node.invocations()["samepage.service"]
    begun = node.status()

    status, found = node.tool("install", place, "--stop-before", "stage")
    assert (status, found["outcome"]) == (0, "stopped"), found
    assert node.status() == begun
    status, found = node.tool("install", place, "--stop-before", "plan")
    assert (status, found["outcome"], found["class"]) == (0, "planned", "live"), found
    assert set(node.status()["releases"]) == {"1.0", "5.1"}
    settled(node, "1.0")

    stop(node, place, "hold")
    refused, found = node.tool("install", place)
    assert (refused, found["reason"]) == (3, "unfinished"), found
    entered = "plan"
    for state in STATES:
        if state != "hold":
            status, found = node.tool("commit", "--stop-before", state)
            assert (status, found["outcome"]) == (0, "stopped"), found
        reached = STATES.index(state)
        journal = written_journal(node)
        assert journal is not None
        assert (journal["state"], journal["stop_before"], journal["stopped"]) == (entered, state, True)
        assert door_is_held(node) == (state != "hold")
        if state == "hold":
            node.client().call("Items.create", title="just before", body="written before the door was held")
        copied, committed, new = reached > 1, reached > 5, ("1.0", "5.1")[reached > 2]
        now = node.status()
        assert now["version"] == new
        assert now["next_boot"] == {
            "release": "5.1" if committed else "1.0",
            "data": 2 if copied and not committed else 1,
        }
        assert node.ssh("ls /state/data").split() == (["1", "2"] if copied else ["1"])
        assert ("<title>Later: " in node.ssh(TITLE)) == (reached > 2)
        assert (node.invocations().get("samepage.service") == old) == (reached <= 3)
        entered = state
    status, found = node.tool("commit")
    assert (status, found["outcome"]) == (0, "committed"), found
    found = settled(node, "5.1")
    assert found["releases"]["1.0"]["data"] == 2
    assert {"before", "just before"} <= node.titles()
    assert node.tool("commit")[0] == 2  # there is nothing to go on with


@FULL
def test_called_off_before_anything_is_switched(node: Machine, product: Path) -> None:
    place, boot, running = put_bundle(node, product), node.boot(), node.invocations()
    for state in ("hold", "snapshot", "switch"):
        stop(node, place, state)
        status, found = node.tool("rollback")
        assert (status, found["outcome"], found["message"]) == (1, "failed", "it was called off"), found
        undone(node)
        assert node.ssh("ls /state/data").split() == ["1"]
    came_back(node)
    now = node.invocations()
    assert (node.boot(), now["samepage.service"], now[DOOR]) == (boot, running["samepage.service"], running[DOOR])
    told_why(node, "it was called off")


@FULL
@pytest.mark.parametrize("state", ["migrate", "health", "commit", "open"])
def test_called_off_later(node: Machine, product: Path, state: str) -> None:
    """Up to the moment when clients are let in, even after the commit."""
    stop(node, put_bundle(node, product), state)
    status, found = node.tool("rollback")
    assert (status, found["outcome"]) == (5, "rolled-back"), found
    node.over()
    came_back(node)
    told_why(node, "it was called off")


@FULL
def test_called_off_where_no_data_is_concerned(node: Machine, nginx: Path) -> None:
    place, running = put_bundle(node, nginx), node.invocations()
    for state in ("migrate", "open"):
        stop(node, place, state)
        assert not door_is_held(node)
        assert node.tool("rollback")[0] == 5
        undone(node)
    came_back(node)
    assert node.invocations()[DOOR] == running[DOOR]


@FULL
def test_door_of_a_stopped_trial_stays_shut(node: Machine, userspace: Path) -> None:
    boot = node.boot()
    status, found = node.tool("install", put_bundle(node, userspace), "--stop-before", "commit")
    assert (status, found["outcome"], found["class"]) == (4, "restarting", "soft-reboot"), found
    TARGET.hang_up(node.instance)

    def stopped() -> bool:
        journal = written_journal(node) if TARGET.reachable(node.instance) else None
        return bool(journal and journal["stopped"])

    wait_until(stopped, "the release that is tried has been found good")
    assert node.status()["version"] == "5.3"
    assert node.status()["next_boot"] == {"release": "1.0", "data": 2}
    assert node.ssh(f"systemctl show -p ActiveState --value {DOOR}").strip() == "inactive"
    status, found = node.tool("commit")
    assert (status, found["outcome"]) == (0, "committed"), found
    settled(node, "5.3")
    assert "before" in node.titles()
    assert node.boot() == boot


# --- restarts --------------------------------------------------------------------------------------------------------


def restart(node: Machine, how: str) -> None:
    if how == "reset":
        with Qmp(Path(node.instance.details["sockets"]) / "qmp") as qmp:
            qmp.execute("system_reset")
    else:
        node.run("systemctl reboot")
    TARGET.hang_up(node.instance)


@FULL
@pytest.mark.parametrize(
    ("state", "how"), [("switch", "reset"), ("migrate", "reboot"), ("commit", "reset"), ("commit", "reboot")]
)
def test_restart_before_the_commit(node: Machine, product: Path, state: str, how: str) -> None:
    stop(node, put_bundle(node, product), state)
    boot = node.boot()
    restart(node, how)
    last = node.over()
    assert last["outcome"] == ("failed" if state == "switch" else "rolled-back"), last
    came_back(node)
    told_why(node, "the machine was restarted")
    assert node.boot() != boot
    assert node.ssh("ls /state/data").split() == ["2"]


@FULL
def test_restart_after_the_commit(node: Machine, product: Path) -> None:
    stop(node, put_bundle(node, product), "open")
    boot = node.boot()
    restart(node, "reboot")
    assert node.over()["outcome"] == "committed"
    found = settled(node, "5.1")
    assert (found["data"], node.boot() != boot) == (1, True)
    assert "before" in node.titles()


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "states", [("migrate", "commit"), pytest.param(("switch", "health", "open"), marks=FULL)], ids=" and ".join
)
def test_killed_where_no_data_is_concerned(node: Machine, nginx: Path, states: tuple[str, ...]) -> None:
    place, running = put_bundle(node, nginx), node.invocations()
    for state in states:
        kill_in(node, state)
        status, found = node.tool("install", place)
        if (status, found["outcome"]) == (0, "committed"):
            assert state in ("commit", "open")  # just before, the old release was what a power-on boots
            settled(node, "5.2")
            assert node.tool("rollback")[0] == 0
            undone(node)
        else:
            assert (status, found["outcome"]) == (5, "rolled-back"), found
            assert state != "open"
            assert undone(node)["reason"] == "the upgrade's process was ended"
    came_back(node)
    assert node.invocations()[DOOR] == running[DOOR]


@FULL
def test_killed_before_anything_is_switched(node: Machine, product: Path) -> None:
    place, boot = put_bundle(node, product), node.boot()
    for state in ("hold", "snapshot"):
        kill_in(node, state)
        status, found = node.tool("install", place)
        assert (status, found["outcome"]) == (1, "failed"), found
        undone(node)
        assert node.ssh("ls /state/data").split() == ["1"]
    came_back(node)
    assert node.boot() == boot


@pytest.mark.parametrize(
    "state", ["migrate", *(pytest.param(one, marks=FULL) for one in ("switch", "health", "commit", "open"))]
)
def test_killed_later(node: Machine, product: Path, state: str) -> None:
    place = put_bundle(node, product)
    kill_in(node, state)
    status, found = node.tool("install", place)
    if (status, found["outcome"]) == (0, "committed"):
        assert state in ("commit", "open")
        settled(node, "5.1")
        assert "before" in node.titles()
        return
    assert (status, found["outcome"]) == (5, "rolled-back"), found
    assert state != "open"
    node.over()
    came_back(node)
    told_why(node, "the upgrade's process was ended")


@FULL
def test_killed_judge(node: Machine, userspace: Path) -> None:
    """Nobody could say any more whether the release is good; the door has not been open."""
    place = put_bundle(node, userspace)
    node.tool("install", place, "--stop-before", "commit")
    TARGET.hang_up(node.instance)
    wait_until(
        lambda: TARGET.reachable(node.instance) and bool((written_journal(node) or {}).get("stopped")), "it is judged"
    )
    node.run("systemctl kill -s KILL samepage-upgrade-gate")
    assert node.over()["outcome"] == "rolled-back"
    came_back(node)


# --- cut off ---------------------------------------------------------------------------------------------------------


def test_cancelled_or_killed_while_staging(node: Machine, userspace: Path) -> None:
    place, begun = put_bundle(node, userspace), node.status()
    for signal, file in ((2, "/run/front"), (9, CGROUP)):
        kill_in(node, "stage", signal, file)
        status, out, _ = node.run(f"echo $$ >/run/front; exec {TOOL} install {place} --json")
        assert status == 1, out
        assert node.status() == begun
        assert left_files(node) == []
        assert set(node.ssh("ls /state/layers").split()) == {
            f"{kind}-{digest}.erofs" for kind, digest in begun["layers"].items()
        }
    came_back_unchanged = node.ssh("systemctl --failed --no-legend")
    assert came_back_unchanged.strip() == ""


def test_one_at_a_time_and_a_lost_connection(node: Machine, nginx: Path) -> None:
    place = put_bundle(node, nginx)
    kill_in(node, "migrate", 19)  # SIGSTOP
    null = subprocess.DEVNULL
    words = TARGET.command(node.instance, [TOOL, "install", place])
    first = subprocess.Popen(words, stdin=null, stdout=null, stderr=null)
    wait_until(lambda: '"migrate"' in node.run(f"cat {JOURNAL}")[1], "the first upgrade is under way")
    for verb in (("install", place), ("rollback",), ("commit",)):
        status, found = node.tool(*verb)
        assert (status, found["outcome"]) == (6, "locked"), found
    first.kill()
    first.wait()
    TARGET.hang_up(node.instance)
    wait_until(lambda: TARGET.reachable(node.instance), "there is a new connection")
    assert node.tool("install", place)[0] == 6
    node.ssh(f"kill -CONT $(cat {CGROUP})")
    assert node.over()["outcome"] == "committed"
    settled(node, "5.2")
