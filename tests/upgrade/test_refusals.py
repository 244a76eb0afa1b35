"""What is refused leaves the node as it was; and what the commands around an upgrade do: channel, downloads, retention.

One woken node serves all tests of this file, in their order: it goes from release 1.0 to 6.6, by small live upgrades.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import bundle as making
from appliance import channel
from appliance.node import bundle, signed
from appliance.node.channel import INDEX_NAME, BundleEntry, Index, ReleaseEntry, dump_index
from appliance.node.keys import PUBLIC, Signer, Trust, dump_key
from tests.upgrade.machines import TOOL, Machine, changed, wake_node
from tests.variants import SIGNER, Edit, Variants, replace

OTHER = Signer(bytes(range(1, 33)))
TRUST = Trust({SIGNER.id: SIGNER.public})
CHANNEL = "/state/channel"
WEB = Path(__file__).parents[1] / "webserver.py"


def connections(number: int) -> Edit:
    """An edit of a file that one unit watches: an upgrade to it reloads that unit."""
    return replace("recipes/nginx/recipe.yaml", "worker_connections: 1024", f"worker_connections: {number}")


def worker(name: str) -> Edit:
    """An edit that restarts a unit which keeps data, so that an upgrade takes a snapshot."""
    file = "recipes/samepage/templates/etc/systemd/system/samepage-worker.service.j2"
    return replace(file, "Description=Samepage's", f"Description={name}")


@pytest.fixture(scope="module")
def chain(variants: Variants) -> Variants:
    """Releases 6.1 to 6.6, each with one edit of its own."""
    for number in (1, 2, 3, 4):
        variants.release(f"6.{number}", connections(1000 + number))
    for number in (5, 6):
        variants.release(f"6.{number}", worker(f"No. {number}, Samepage's"))
    return variants


@pytest.fixture(scope="module")
def node(frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = wake_node(frozen, tmp_path_factory.mktemp("refusals"), "refusals")
    yield machine
    machine.stop()


def picture(node: Machine) -> tuple[list[str], dict[str, str]]:
    """All of the state partition but the data itself, the boot records, the mounts, and what runs."""
    told = node.ssh(
        "find /state -xdev -printf '%p %y %m %U %s %T@ %i %l\\n' | sort; sha256sum /state/boot/*; cat /proc/mounts;"
        " sha256sum /run/samepage/release.json"
    )
    return told.splitlines(), node.invocations()


def refused(node: Machine, words: str, reason: str, message: str = "", status: int = 3) -> None:
    """The tool refuses and says why."""
    found, result = node.tool(words)
    outcome = "locked" if status == 6 else "refused"
    assert (found, result["status"], result["outcome"], result["reason"]) == (status, status, outcome, reason), result
    assert message in result["message"]
    assert result["hint"]


@contextmanager
def nothing_happens(node: Machine, but: str = "\0") -> Iterator[None]:
    """`but`: a folder that the test itself writes to."""
    before = picture(node)
    yield
    after = picture(node)
    assert [line for line in after[0] if not line.startswith(but)] == [
        line for line in before[0] if not line.startswith(but)
    ]
    assert changed(before[1], after[1]) == set()


# --- bundles ---------------------------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a bundle."""
    front = content[: signed.FRONT_SIZE]
    end = signed.FRONT_SIZE + signed.header_size(front, bundle.MAGIC, "bundle")
    return signed.unseal(front, content[signed.FRONT_SIZE : end], TRUST, "bundle"), content[end:]


def with_header(content: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """The bundle with another header, signed by the key that the node trusts."""
    header, payload = split(content)
    edit(header)
    return signed.seal(bundle.MAGIC, header, SIGNER) + payload


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def of_no_release(header: dict[str, Any]) -> None:
    header["from"] = {"version": "0.8", "manifest": "f" * 64}
    header["parts"][0]["sources"] = ["f" * 64]


BAD: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "another kind of file": (lambda _: b"PK\3\4 no bundle", "foreign-file", "no bundle"),
    "nothing": (lambda _: b"", "foreign-file", "no bundle"),
    "a later format": (lambda one: one[:8] + b"\2" + one[9:], "unknown-format", "format 2"),
    "an unknown key": (lambda one: flipped(one, 9), "unknown-key", "not trusted here"),
    "a flipped byte in the signature": (lambda one: flipped(one, 30), "bad-signature", "does not fit"),
    "a flipped byte in the header": (lambda one: flipped(one, signed.FRONT_SIZE + 40), "bad-signature", "does not fit"),
    "a flipped byte in the content": (lambda one: flipped(one, -20), "damaged", "not what was signed"),
    "no end of the envelope": (lambda one: one[:50], "truncated", "envelope"),
    "no end of the header": (lambda one: one[:200], "truncated", "header"),
    "no last byte": (lambda one: one[:-1], "truncated", "bytes of"),
    "one more byte": (lambda one: one + b"\0", "trailing-bytes", "1 bytes follow"),
    "an impossible header": (
        lambda one: one[:17] + struct.pack("<I", 1 << 30) + one[21:], "damaged", "claims 1073741824 bytes"
    ),
    "another base": (lambda one: with_header(one, of_no_release), "wrong-base", "starts from release 0.8"),
    "another layout": (
        lambda one: with_header(one, lambda header: header["to"].update(layout="qa-cloud")), "wrong-layout", "qa-cloud"
    ),
    "another architecture": (
        lambda one: with_header(one, lambda header: header["to"].update(architecture="arm64")), "wrong-architecture",
        "arm64",
    ),
    "an older release": (
        lambda one: with_header(one, lambda header: header["to"].update(version="0.9")), "downgrade", "older than 1.0"
    ),
    "another manifest": (
        lambda one: with_header(one, lambda header: header["to"].update(version="1.7")), "damaged", "another release"
    ),
}  # fmt: skip


def test_a_bundle_that_is_not_good_is_refused(node: Machine, chain: Variants) -> None:
    content = chain.bundle("1.0", "6.1").read_bytes()
    with nothing_happens(node):
        for make, reason, message in BAD.values():
            refused(node, f"install {node.put(make(content), '/tmp/bad.bundle')}", reason, message)


def test_a_key_must_be_trusted_and_not_revoked(node: Machine, chain: Variants, tmp_path: Path) -> None:
    foreign = making.make(chain.made["1.0"], chain.made["6.1"], OTHER, tmp_path / "foreign.bundle").path
    place = node.put(foreign, "/tmp/foreign.bundle")
    with nothing_happens(node):
        refused(node, f"install {place}", "unknown-key", OTHER.id)
    node.put(dump_key(OTHER.public, PUBLIC, "the site"), "/state/upgrade/keys/site.pub")
    assert node.tool(f"plan {place}")[0] == 0
    node.put(f"{OTHER.id}  # lost\n".encode(), "/state/upgrade/keys/revoked")
    with nothing_happens(node):
        refused(node, f"install {place}", "revoked-key", OTHER.id)
    node.put(b"no id\n", "/state/upgrade/keys/revoked")
    with nothing_happens(node):
        refused(node, f"install {place}", "not-upgradable", "/state/upgrade/keys/revoked")
    node.ssh("rm -r /state/upgrade/keys")


def test_an_upgrade_that_has_no_room_does_not_begin(node: Machine, chain: Variants) -> None:
    place = node.put(chain.bundle("1.0", "6.1"), "/tmp/good.bundle")
    free = int(node.ssh("df -B1 --output=avail /state | tail -n 1"))
    node.ssh(f"fallocate -l {free - 150_000_000} /state/filler")
    with nothing_happens(node):
        refused(node, f"install {place}", "no-room", "are free")
    node.ssh("rm /state/filler; sync")
    assert node.tool(f"plan {place}")[0] == 0


def test_only_one_upgrade_runs(node: Machine, chain: Variants) -> None:
    place = node.put(chain.bundle("1.0", "6.1"), "/tmp/good.bundle")
    node.ssh("mkdir -p /run/samepage/upgrade")
    with nothing_happens(node):
        for lock, words in (("front.lock", f"install {place}"), ("lock", f"install {place}"), ("lock", "cleanup")):
            node.ssh(f"flock /run/samepage/upgrade/{lock} sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/holder; sleep 0.5")
            try:
                refused(node, words, "locked", "another upgrade", status=6)
            finally:
                node.ssh("pkill -P $(cat /tmp/holder)")


def test_of_two_upgrades_at_once_one_is_refused(node: Machine, chain: Variants) -> None:
    place = node.put(chain.bundle("1.0", "6.1"), "/tmp/good.bundle")
    node.ssh(f"for n in 1 2; do {TOOL} install {place} --download-only --json >/tmp/out.$n 2>/dev/null & done; wait")
    results = [json.loads(node.ssh(f"cat /tmp/out.{number}")) for number in (1, 2)]
    assert sorted((one["status"], one["outcome"]) for one in results) == [(0, "downloaded"), (6, "locked")]
    node.ssh("rm -r /state/releases/6.1")


def test_looking_and_planning_change_nothing(node: Machine, chain: Variants) -> None:
    place = node.put(chain.bundle("1.0", "6.1"), "/tmp/good.bundle")
    with nothing_happens(node):
        look(node, place)


def look(node: Machine, place: str) -> None:
    status, planned = node.tool(f"plan {place}")
    assert (status, planned["outcome"], planned["class"], planned["to"]) == (0, "planned", "live", "6.1")
    assert planned["units"] == {"nginx.service": "reload"}
    assert node.tool(f"--dry-run {place}")[1] == planned
    assert node.tool(f"info {place}")[1]["version"] == "6.1"
    assert node.tool("rollback --dry-run")[0] == 2
    assert node.tool("commit --dry-run")[1]["release"] == "1.0"
    assert node.tool("verify")[1]["wrong"] == []
    assert node.tool("history")[1]["history"] == []
    assert node.tool("cleanup --dry-run")[1]["remove"] == []
    assert node.tool("status")[1]["next_boot"] == {"release": "1.0", "data": 1}


def test_nothing_is_upgraded_unattended_unless_the_settings_say_so(node: Machine) -> None:
    status, found = node.tool("--unattended --yes")
    assert (status, found["outcome"]) == (2, "nothing")
    assert "unattended" in found["message"]
    node.ssh("systemctl start samepage-upgrade-unattended.service")
    assert node.ssh("systemctl is-active samepage-upgrade-unattended.timer").strip() == "active"


def test_wrong_usage_is_told_apart(node: Machine) -> None:
    for words in ("stauts", "/nowhere.bundle", "status extra", "--apply=deep", "--to 1.0", "--progress-fd 77"):
        status, out, messages = node.run(f"{TOOL} {words}")
        assert (status, out) == (64, ""), words
        assert "see --help" in messages


# --- the channel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(node: Machine, chain: Variants, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A channel on the node, with bundles 1.0 -> 6.1 -> 6.2."""
    folder = tmp_path_factory.mktemp("channel")
    now = int(node.ssh("date +%s"))
    for start, goal in (("1.0", "6.1"), ("6.1", "6.2")):
        index = channel.add(folder, [chain.bundle(start, goal)], SIGNER, now)
    for file in folder.iterdir():
        node.put(file, f"{CHANNEL}/{file.name}")
    return index


def publish(node: Machine, index: Index, signer: Signer = SIGNER) -> None:
    node.put(dump_index(index, signer), f"{CHANNEL}/{INDEX_NAME}")


def test_the_channel_says_that_there_is_something_newer(node: Machine, served: Index) -> None:
    status, found = node.tool("check")
    assert (status, found["newest"], found["running"]) == (0, "6.2", "1.0")
    assert node.ssh("cat /state/upgrade/counter").strip() == str(served.counter)


INDEXES: dict[str, tuple[Callable[[Index], Index], str, str]] = {
    "expired": (lambda one: one._replace(created=one.created - 90_000, expires=one.created - 10), "expired", "ago"),
    "replayed": (lambda one: one._replace(counter=1), "replayed", "no. 1, but no. 2"),
    "made in a day from now": (lambda one: one._replace(created=one.created + 86_400), "clock-off", "from now"),
    "of another layout": (lambda one: one._replace(layout="qa-cloud"), "wrong-layout", "qa-cloud"),
    "of another architecture": (lambda one: one._replace(architecture="arm64"), "wrong-architecture", "arm64"),
    "of older releases": (
        lambda one: one._replace(releases=(one.releases[0]._replace(version="0.9", manifest="f" * 64),)),
        "downgrade", "0.9",
    ),
    "without a way": (lambda one: one._replace(bundles=one.bundles[1:]), "no-way", "from release 1.0 to 6.2"),
    "that revokes its own key": (lambda one: one._replace(revoked=frozenset({SIGNER.id})), "revoked-key", SIGNER.id),
}  # fmt: skip


def test_an_index_that_is_not_good_is_refused(node: Machine, served: Index) -> None:
    with nothing_happens(node, CHANNEL):
        for make, reason, message in INDEXES.values():
            publish(node, make(served))
            refused(node, "", reason, message)


def test_an_index_must_be_signed_and_whole(node: Machine, served: Index) -> None:
    good = dump_index(served, SIGNER)
    for content, reason in (
        (dump_index(served, OTHER), "unknown-key"),
        (flipped(good, -5), "bad-signature"),
        (good + b"x", "trailing-bytes"),
        (good[:-1], "truncated"),
    ):
        node.put(content, f"{CHANNEL}/{INDEX_NAME}")
        refused(node, "check", reason)


def test_a_bundle_in_the_channel_must_be_the_one_in_the_index(node: Machine, served: Index) -> None:
    file = f"{CHANNEL}/{served.bundles[0].file}"
    publish(node, served)
    node.ssh(f"cp {file} /tmp/kept; printf x | dd of={file} bs=1 seek=300 conv=notrunc status=none")
    before = node.invocations()
    status, found = node.tool()
    assert (status, found["reason"]) == (3, "damaged"), found
    node.ssh(f"truncate -s 200 {file}")
    status, found = node.tool()
    assert (status, found["outcome"], found["reason"]) == (1, "failed", "not-fetched"), found
    assert found["hint"] not in found["message"]
    node.ssh(f"mv /tmp/kept {file}")
    assert node.status()["release"] == "1.0"
    assert changed(before, node.invocations()) == set()


def test_a_key_revoked_by_the_channel_signs_no_bundle(node: Machine, served: Index, chain: Variants) -> None:
    """The site trusts the key, but the channel's index says that it is lost."""
    folder = chain.folder / "foreign"
    folder.mkdir(exist_ok=True)
    path = making.make(chain.made["1.0"], chain.made["6.1"], OTHER, folder / "foreign.bundle").path
    content = path.read_bytes()
    entry = served.bundles[0]._replace(file=path.name, size=len(content), sha256=making.sha256(content).hexdigest())
    node.put(content, f"{CHANNEL}/{path.name}")
    node.put(dump_key(OTHER.public, PUBLIC, "the site"), "/state/upgrade/keys/site.pub")
    publish(node, served._replace(bundles=(entry, served.bundles[1]), revoked=frozenset({OTHER.id})))
    status, found = node.tool()
    assert (status, found["outcome"], found["reason"]) == (3, "refused", "revoked-key"), found
    assert node.status()["release"] == "1.0"
    node.ssh(f"rm -r /state/upgrade/keys {CHANNEL}/{path.name}")
    publish(node, served)


def test_a_bare_call_upgrades_through_all_bundles(node: Machine, served: Index) -> None:
    publish(node, served)
    status, planned = node.tool("plan")
    assert (status, planned["from"], planned["to"], planned["class"]) == (0, "1.0", "6.2", "live")
    status, found = node.tool()
    assert (status, found["outcome"], found["from"], found["to"]) == (0, "committed", "1.0", "6.2"), found
    assert found["units"] == {"nginx.service": "reload"}
    assert "worker_connections 1002;" in node.ssh("cat /etc/nginx/nginx.conf")
    assert node.ssh("ls -A /state/upgrade/incoming") == ""
    assert node.tool("check")[0] == 2
    status, found = node.tool()
    assert (status, found["outcome"]) == (2, "nothing")
    assert len(node.tool("history")[1]["history"]) == 1


# --- ways to bring a bundle ------------------------------------------------------------------------------------------


def test_a_downgrade_must_be_allowed(node: Machine, chain: Variants) -> None:
    place = node.put(chain.bundle("6.2", "6.1"), "/tmp/down.bundle")
    with nothing_happens(node):
        refused(node, f"install {place}", "downgrade", "older than 6.2")
    status, found = node.tool(f"install {place} --allow-downgrade")
    assert (status, found["outcome"], found["to"]) == (0, "committed", "6.1"), found
    assert "worker_connections 1001;" in node.ssh("cat /etc/nginx/nginx.conf")
    status, found = node.tool("rollback --yes")
    assert (status, found["outcome"], found["to"]) == (0, "committed", "6.2"), found


SERVER = """
import pathlib, sys, time
sys.path.insert(0, "/tmp/web")
from webserver import Site, serving
with serving(Site(content=pathlib.Path("/tmp/web/bundle").read_bytes(), cuts=[300, 200])) as site:
    print(site.url, flush=True)
    while len(site.asked) < 3:
        time.sleep(0.1)
    time.sleep(3)
    print(*(asked for _, asked, _ in site.asked), sep="\\n", flush=True)
"""


def test_a_download_that_breaks_off_goes_on_where_it_was(node: Machine, chain: Variants) -> None:
    node.put(WEB, "/tmp/web/webserver.py")
    node.put(SERVER.encode(), "/tmp/web/server.py")
    node.put(chain.bundle("6.2", "6.3"), "/tmp/web/bundle")
    node.ssh("cd /tmp/web && (python3 server.py >log 2>&1 & echo $! >pid); until grep -q http log; do sleep 0.2; done")
    url = node.ssh("head -n 1 /tmp/web/log").strip()
    progress = "--progress-fd 3 3>/tmp/progress"
    status, found = node.tool(f"install {url}/next.bundle {progress}")
    assert (status, found["outcome"], found["to"]) == (0, "committed", "6.3"), found
    node.ssh("while kill -0 $(cat /tmp/web/pid) 2>/dev/null; do sleep 0.2; done")
    assert node.ssh("cat /tmp/web/log").splitlines()[1:] == ["", "bytes=300-", "bytes=500-"]
    events = [json.loads(line) for line in node.ssh("cat /tmp/progress").splitlines()]
    states = list(dict.fromkeys(event["state"] for event in events))
    assert states[0] == "fetch"
    assert [state for state in states if state in ("stage", "plan", "switch", "health", "commit")] == [
        "stage", "plan", "switch", "health", "commit"
    ]  # fmt: skip
    assert (events[-1]["state"], events[-1]["status"]) == ("end", 0)
    assert node.ssh("ls -A /state/upgrade/incoming") == ""


def test_what_is_downloaded_is_upgraded_to_later(node: Machine, served: Index, chain: Variants) -> None:
    path = chain.bundle("6.3", "6.4")
    node.put(path, f"{CHANNEL}/{path.name}")
    start, goal = (chain.made[version].digest for version in ("6.3", "6.4"))
    content = path.read_bytes()
    entry = BundleEntry(path.name, start, goal, len(content), making.sha256(content).hexdigest())
    publish(node, served._replace(counter=3, releases=(ReleaseEntry("6.4", goal),), bundles=(entry,)))
    before = node.invocations()
    status, found = node.tool("--download-only")
    assert (status, found["outcome"], found["from"], found["to"]) == (0, "downloaded", "6.3", "6.4"), found
    after = node.status()
    assert (after["release"], after["unfinished"]) == ("6.3", None)
    assert "6.4" in after["releases"]
    assert changed(before, node.invocations()) == set()
    node.ssh(f"rm {CHANNEL}/{path.name}")
    status, found = node.tool()
    assert (status, found["outcome"], found["to"]) == (0, "committed", "6.4"), found


# --- retention -------------------------------------------------------------------------------------------------------


def kept(node: Machine) -> tuple[set[str], set[int]]:
    """Releases and data on the state partition."""
    told = node.ssh("ls /state/releases; echo; ls /state/data").split("\n\n")
    return set(told[0].split()), {int(one) for one in told[1].split()}


def test_only_so_many_releases_and_their_data_stay(node: Machine, chain: Variants) -> None:
    assert kept(node) == ({"6.2", "6.3", "6.4"}, {1})
    for start, goal in (("6.4", "6.5"), ("6.5", "6.6")):
        status, found = node.upgrade(chain.bundle(start, goal))
        assert (status, found["outcome"], found["holds"]) == (0, "committed", True), found
    releases, data = kept(node)
    found = node.status()
    left = {one["data"] for one in found["releases"].values()}
    assert releases == {"6.4", "6.5", "6.6"} == set(found["releases"])
    assert data == {found["data"]} | left - {None}
    assert len(data) == 3
    layers = {name for name in node.ssh("ls /state/layers").split() if name.startswith("config-")}
    assert len(layers) == 3
    status, wanted = node.tool("cleanup")
    assert (status, wanted["remove"], wanted["files"], wanted["data"]) == (0, [], 0, [])
    assert "it runs" in wanted["text"]
    assert "a rollback goes back to it" in wanted["text"]


def test_data_goes_with_its_release(node: Machine, chain: Variants) -> None:
    _, before = kept(node)
    leaves = node.status()["releases"]["6.4"]["data"]
    place = node.put(chain.bundle("6.6", "6.1"), "/tmp/down.bundle")
    status, found = node.tool(f"install {place} --allow-downgrade")
    assert (status, found["outcome"]) == (0, "committed"), found
    releases, data = kept(node)
    assert releases == {"6.1", "6.5", "6.6"}
    assert leaves in before
    assert leaves not in data
    node.put(b"rest", "/state/layers/app-0000.erofs.partial")
    node.put(b"rest", "/state/upgrade/incoming/x.bundle")
    status, wanted = node.tool("cleanup --dry-run")
    assert (status, wanted["files"], wanted["dry_run"]) == (0, 2, True)
    assert "did not end" in wanted["text"]
    assert node.tool("cleanup")[1]["files"] == 2
    assert node.tool("cleanup")[1]["files"] == 0
    assert node.tool("verify")[0] == 0
