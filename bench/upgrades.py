"""What an upgrade costs those who use the node: how soon a change is served, and how long a client waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from appliance.lock import read_lock
from appliance.pipeline import LOCK_FILE, Options
from appliance.targets import qemu
from appliance.targets.base import load_request
from bench.measure import BenchError, scratch
from bench.report import Figure, of_runs, paired_ratio
from bench.workshop import Workshop
from tests.boot.samepage_site import Client
from tests.upgrade.machines import DEADLINE, TARGET, TOOL, Machine, freeze_node, wake_node
from tests.variants import PROJECT, Variants, release_lock, todays_lock, with_lock, without_kernel
from tests.variants import replace as text_edit

BENCH = "upgrades"
PORT = text_edit("recipes/nginx/recipe.yaml", "public_port: 443 ", "public_port: 4443 ")
PRODUCT = text_edit("recipes/samepage/files/opt/samepage/share/samepage/web/index.html", "<title>", "<title>New: ")
PAUSE = 0.02  # seconds between two looks at what is served
IMPATIENT = 3.0  # seconds; whoever asks a node that boots would wait for its own repeated packets otherwise


def upgrades(shop: Workshop) -> None:
    """A changed template, a changed product, new packages, a new kernel, each beside the plainest way to the same."""
    old, new = release_lock(Options(PROJECT).cache), todays_lock()
    with scratch(shop.cache, "upgrades") as folder:
        made = Variants(folder / "variants", (with_lock(old),))
        image = made.disk("1.0")
        made.release("1.1", PORT)
        made.release("1.2", PRODUCT)
        release = read_lock(folder / "variants/1.0" / LOCK_FILE)
        made.release("2.0", with_lock(without_kernel(new, release)))
        made.release("3.0", with_lock(new))
        frozen = freeze_node(image, folder)
        template(shop, made, frozen, folder)
        product(shop, made, frozen, folder)
        for kind in RESTARTS:
            restart(shop, kind, made.bundle("1.0", kind.version), frozen, folder)


def template(shop: Workshop, made: Variants, frozen: Path, folder: Path) -> None:
    """From the command to the new configuration served, beside `systemctl reload` of the same unit."""
    node = wake_node(frozen, folder, "template")
    try:
        place = node.put(made.bundle("1.0", "1.1"), "/state/template.bundle")
        ours, reloads = [], []
        for _ in range(shop.rounds):
            reloads.append(timed(lambda: node.ssh("systemctl reload nginx")))
            ours.append(served(node, f"{TOOL} install {place} --yes", ":4443/"))
            if node.tool("rollback", "--yes")[0]:
                raise BenchError("the node did not go back to its first release")
    finally:
        node.stop()
    shop.add(
        of_runs(BENCH, "template: command to served", ours, "s"),
        of_runs(BENCH, "template: systemctl reload", reloads, "s"),
        Figure(BENCH, "template: to systemctl reload", paired_ratio(ours, reloads), "x", 3.0),
    )


def product(shop: Workshop, made: Variants, frozen: Path, folder: Path) -> None:
    """The longest that a client waits for the new product, beside `systemctl restart` of the same units."""
    node = wake_node(frozen, folder, "product")
    try:
        place = node.put(made.bundle("1.0", "1.2"), "/state/product.bundle")
        ours, restarts = [], []
        for _ in range(shop.rounds):
            restarts.append(wait_during(node, lambda: node.ssh("systemctl restart samepage samepage-worker")))
            ours.append(wait_during(node, lambda: node.ssh(f"{TOOL} install {place} --yes")))
            if node.tool("rollback", "--data=keep", "--yes")[0]:
                raise BenchError("the node did not go back to its first release")
    finally:
        node.stop()
    shop.add(
        of_runs(BENCH, "product: longest wait", ours, "s"),
        of_runs(BENCH, "product: longest wait, systemctl restart", restarts, "s"),
        Figure(BENCH, "product: to systemctl restart", paired_ratio(ours, restarts), "x"),
    )


class Restart(NamedTuple):
    """An upgrade by a restart to that version; `longest` has a node make it, and tells how long a client waits."""

    name: str
    version: str
    way: str
    longest: Callable[[Machine, str], float]
    goal: float | None = None


def restart(shop: Workshop, kind: Restart, bundle: Path, frozen: Path, folder: Path) -> None:
    """The longest that a client waits for it, beside the door's absence in a cold boot."""
    ours, boots = [], []
    for number in range(shop.rounds):
        node = wake_node(frozen, folder, f"{kind.name}-{number}")
        try:
            ours.append(kind.longest(node, node.put(bundle, f"/state/{bundle.name}")))
            if (ended := node.over())["outcome"] != "committed" or ended["class"] != kind.way.replace(" ", "-"):
                raise BenchError(f"{kind.name}: {ended['outcome']} by a {ended['class']}: {ended['reason']}")
            boots.append(cold_boot(node))
        finally:
            node.stop()
    shop.add(
        of_runs(BENCH, f"{kind.name}: longest wait ({kind.way})", ours, "s"),
        of_runs(BENCH, f"{kind.name}: no answer in a cold boot", boots, "s"),
        Figure(BENCH, f"{kind.name}: to a cold boot", paired_ratio(ours, boots), "x", kind.goal),
    )


# --- clocks ----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def location(node: Machine) -> str:
    """Where the front door redirects to, which the template decides; empty while it does not answer."""
    connection = HTTPConnection(node.instance.address, node.instance.ports["80"], timeout=600)
    try:
        connection.request("HEAD", "/")
        return connection.getresponse().headers.get("Location", "")
    except OSError:
        return ""
    finally:
        connection.close()


def served(node: Machine, command: str, sign: str) -> float:
    """Seconds from a command until the front door answers with the sign."""
    began = time.monotonic()
    thread = threading.Thread(target=node.run, args=(command,))
    thread.start()
    while sign not in location(node):
        if not thread.is_alive() and sign not in location(node):
            raise BenchError(f"{command} ended without the change being served")
        time.sleep(PAUSE)
    took = time.monotonic() - began
    thread.join()
    return took


def wait_during(node: Machine, work: Callable[[], object]) -> float:
    """The longest that a read through the front door took meanwhile; they follow one another without a pause."""
    waits: list[float] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            waits.append(timed(partial(once, node)))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return max(waits)


def once(node: Machine, timeout: float = DEADLINE) -> None:
    """One request; while the front door is held, it takes until that opens."""
    Client(node.url, dict(node.cookies), timeout=timeout).call("Items.getList", query="", limit=1, offset=0)


def held(node: Machine, place: str) -> float:
    """A soft reboot: clients wait at the front door, and none is refused."""
    return wait_during(node, partial(install_and_restart, node, place))


def install_and_restart(node: Machine, place: str) -> None:
    """Install a bundle that restarts the node, and wait until the front door opens."""
    node.ssh(f"{TOOL} install {place} --yes; true")  # its status says that the node restarts
    once(node)


def refused(node: Machine, place: str) -> float:
    """A reboot: from the last answer to the next, for a client that tries again whenever it is refused or waits long.

    The machine is powered on as soon as it is down, see `Machine.end_at_restart`.
    """
    upgrade = threading.Thread(target=node.run, args=(f"{TOOL} install {place} --yes",))
    upgrade.start()
    longest, down = 0.0, 0.0
    began = answered = time.monotonic()
    while answered <= down or not down:
        if time.monotonic() - began > DEADLINE:
            raise BenchError("the node did not restart, or not come back")
        try:
            once(node, IMPATIENT)
        except Exception:  # refused, reset, held, or not ready
            if not down and TARGET.state(node.instance) == "stopped":
                node.power_on()
                down = time.monotonic()
            time.sleep(PAUSE)
        else:
            longest, answered = max(longest, time.monotonic() - answered), time.monotonic()
    upgrade.join()
    return longest


RESTARTS = (Restart("packages", "2.0", "soft reboot", held, 0.6), Restart("kernel", "3.0", "reboot", refused))


def cold_boot(node: Machine) -> float:
    """Seconds from the machine's power-on until the product answers through the front door.

    QEMU starts anew, since after a reset it is slowed down by what it translated before.
    """
    folder = node.instance.folder
    request = replace(load_request(folder), name=node.instance.name)
    TARGET.down(node.instance)
    began = time.monotonic()
    node.instance = qemu.start(request, folder, {"ssh.authorized_keys.root": (folder / "id_ed25519.pub").read_bytes()})
    while True:
        try:
            once(node, IMPATIENT)
            return time.monotonic() - began
        except Exception:  # refused, reset, or not ready: it is not there yet
            if time.monotonic() - began > 600:
                raise
            time.sleep(PAUSE)
