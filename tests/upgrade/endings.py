"""What tests look at after an upgrade, however it ended, and the releases that several of them use."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.targets.qemu import hardware_acceleration
from tests.upgrade.machines import DEADLINE, TOOL, Machine
from tests.variants import Edit, Variants, replace

FULL = pytest.mark.skipif(
    os.environ.get("SAMEPAGE_UPGRADES") != "full" and not hardware_acceleration(),
    reason="takes minutes on an emulated node, and others look at the same in other classes: SAMEPAGE_UPGRADES=full",
)
PLACES = {"base": "/", "app": "/opt/samepage", "config": "/run/samepage/config"}
JOURNAL = "/state/upgrade/journal.json"
DOOR = "nginx.service"
SERVER = "recipes/samepage/files/opt/samepage/lib/samepage/server.py"
PAGE = "recipes/samepage/files/opt/samepage/share/samepage/web/index.html"
BASE = "recipes/base/recipe.yaml"

# Edits. A release of the product restarts its two services, and so holds the door and keeps the data of before.
PRODUCT = replace(PAGE, "<title>", "<title>Later: ")
NGINX = replace("recipes/nginx/recipe.yaml", "worker_connections: 1024", "worker_connections: 900")
USERSPACE = replace(BASE, "exclude:\n", "exclude:\n  - /usr/share/runit\n")  # makes another base layer


def broken_product(statement: str) -> Edit:
    """The product's service runs a statement instead of serving."""
    begin = "async def serve(settings: Settings) -> None:\n"
    return replace(SERVER, begin, f"{begin}    {statement}\n")


def sql(node: Machine, query: str) -> list[str]:
    """Rows of a query in the product's database, as psql prints them."""
    words = "setpriv --reuid 820 --regid 820 --clear-groups psql -X -A -t -h /run/postgresql samepage"
    return node.ssh(f"{words} -c '{query}'").split()


def impatient(node: Machine, seconds: int) -> None:
    """Give trials, and the probes in them, this long from now on, until the node or its userspace starts anew."""
    file = "/etc/samepage/upgrade.json"
    node.ssh(f'sed \'s/"trial_seconds": [0-9]*/"trial_seconds": {seconds}/\' {file} >/run/impatient.json')
    node.ssh(f"chmod 0644 /run/impatient.json && mount --bind /run/impatient.json {file}")


def mounted_layers(node: Machine) -> dict[str, str]:
    """The layer that is mounted last at each place."""
    lines = node.ssh("findmnt -rn -t erofs -o TARGET,SOURCE").splitlines()
    return {place: source.rpartition("/")[2] for place, source in (line.split() for line in lines)}


def runs(node: Machine, variants: Variants, version: str, *, whole: bool = True) -> None:
    """The node runs the very layers of the release as it was built, and its records say so.

    Not `whole`: its large layers were there before and are not read again, which takes long on an emulated processor.
    """
    made = variants.made[version]
    found = node.status()
    assert (found["version"], found["digest"], found["unfinished"]) == (version, made.digest, None)
    assert found["layers"] == {layer.kind: layer.digest for layer in made.manifest.layers}
    assert found["next_boot"] == {"release": found["release"], "data": found["data"]}
    if whole:
        status, verified = node.tool("verify")
        assert (status, verified["wrong"]) == (0, [])
    mounted = mounted_layers(node)
    for layer in made.manifest.layers:
        assert mounted[PLACES[layer.kind]] == f"{layer.kind}-{layer.digest}.erofs"


def came_back(node: Machine, *rows: str, version: str = "1.0") -> dict[str, Any]:
    """That release runs, is healthy and serves, with the rows of before; nothing else is left. The last entry."""
    found = settled(node, version)
    assert {"before", *rows} <= node.titles()
    return dict(found["last"])


def undone(node: Machine) -> dict[str, Any]:
    """A first look between several attempts in one test; `came_back` is the thorough one. The last entry."""
    found = node.status()
    assert (found["version"], found["unfinished"]) == ("1.0", None), found
    assert left_files(node) == []
    return dict(found["last"])


def settled(node: Machine, version: str) -> dict[str, Any]:
    """No upgrade is unfinished, that release runs and serves, and nothing is left behind; the status."""
    found = node.status()
    assert (found["version"], found["unfinished"]) == (version, None), found
    assert found["next_boot"] == {"release": found["release"], "data": found["data"]}
    node.ssh("/opt/samepage/bin/samepage-health --wait 500")
    assert node.client().call("Items.getList", query="", limit=1, offset=0) is not None
    kept = {found["data"]} | {one["data"] for one in found["releases"].values()} - {None}
    assert {int(name) for name in node.ssh("ls /state/data").split()} == kept
    assert left_files(node) == []
    assert node.run("test -e /run/samepage/trial")[0] == 1
    assert "/run/nextroot" not in node.ssh("findmnt -rn -o TARGET")
    return found


def left_files(node: Machine) -> list[str]:
    """Files of the upgrade that should be there only while one is unfinished."""
    names = r"-name '*.partial*' -o -name try.cfg -o -name 'journal.json*'"
    return node.ssh(rf"find /state -path /state/data -prune -o \( {names} \) -print").split()


def door_is_held(node: Machine) -> bool:
    """Whether only the front door's main process is there, or not even that."""
    return len(node.run(f"cat /sys/fs/cgroup/system.slice/{DOOR}/cgroup.procs")[1].split()) < 2


def told_why(node: Machine, *texts: str) -> None:
    """`status` says, in words for people, why the last upgrade is not what runs."""
    said = node.ssh(f"{TOOL} status")
    for text in texts:
        assert text in said, said


def written_journal(node: Machine) -> dict[str, Any] | None:
    status, out, _ = node.run(f"cat {JOURNAL}")
    return dict(json.loads(out)) if status == 0 else None


def wait_until(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not look():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.3)


def put_bundle(node: Machine, bundle: Path) -> str:
    return node.put(bundle, f"/state/{bundle.name}")
