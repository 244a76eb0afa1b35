"""The running node as an upgrade finds it, and its settings. Part of the node's own code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from appliance.node.refusals import Refusal
from appliance.node.upgrade import mounts, records
from appliance.node.upgrade.changes import read_node
from appliance.node.upgrade.records import Held

STATE = "/state"
RELEASE_FILE = "/run/samepage/release.json"
MODE_FILE = "/run/samepage/mode"
SETTINGS_FILE = "/etc/samepage/upgrade.json"
KEY_FOLDERS = ("/etc/samepage/keys", f"{STATE}/upgrade/keys")
KEY_CREDENTIAL = "/run/credentials/@system/samepage.upgrade-key"
COUNTER = f"{STATE}/upgrade/counter"
INCOMING = f"{STATE}/upgrade/incoming"
WATCHDOG_LIMIT = 65535  # seconds that the kernel's software watchdog can wait


class NotUpgradable(Refusal):
    """This system cannot be upgraded in place."""

    reason = "not-upgradable"
    hint = "install it on a disk first"


class Settings(NamedTuple):
    """`budget`: percent that releases and the data they left may fill of the room beside the data that runs."""

    channel: str = ""
    keep: int = 3
    budget: int = 80
    unattended: bool = False
    trial_seconds: int = 600
    hold_seconds: int = 25

    @property
    def gate_seconds(self) -> float:
        """How long a release may take to become healthy; the watchdog waits longer."""
        return 0.6 * self.trial_seconds


def read_settings(path: str = SETTINGS_FILE) -> Settings:
    """The node's settings; those that only another release knows are left out.

    Raises NotUpgradable where the file is not what it should be.
    """
    hint = "correct recipes/node-tools and push it"
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError) as error:
        raise NotUpgradable(f"{path} cannot be used: {error}", hint=hint) from error
    if not isinstance(found, dict):
        raise NotUpgradable(f"{path} is no object", hint=hint)
    known = Settings._field_defaults
    for name, default in known.items():
        if type(found.get(name, default)) is not type(default):
            raise NotUpgradable(f"{path}: {name} is no {type(default).__name__}", hint=hint)
    settings = Settings(**{name: value for name, value in found.items() if name in known})
    if not 0 < settings.trial_seconds <= WATCHDOG_LIMIT or settings.hold_seconds < 1 or not 0 <= settings.budget <= 100:
        raise NotUpgradable(f"{path}: a number is out of its range", hint=hint)
    return settings


class Node(NamedTuple):
    """`running` is the release that runs, `data` the subvolume that is /var, `description` is node.json."""

    name: str
    device: str  # of the state partition
    running: Held
    data: int
    held: Mapping[str, Held]
    settings: Settings
    description: Mapping[str, Any]
    root: str = STATE
    identity: str = f"{STATE}/identity"

    def layers(self, release: Held) -> dict[str, str]:
        """Digests of a release's layers by kind."""
        return {layer.kind: layer.digest for layer in release.manifest.layers_of(self.name)}

    def trees(self, release: Held) -> mounts.Trees:
        return mounts.Trees.of(self.root, self.layers(release))

    def manifest_bytes(self, release: Held) -> bytes:
        with open(os.path.join(self.root, records.RELEASES, release.id, "release.json"), "rb") as file:
            return file.read()


def look() -> Node:
    """The node this runs on. Raises NotUpgradable on a live system, in a container, or with damaged records."""
    mode = (records.read_small(MODE_FILE, 64) or b"").decode(errors="replace").strip()
    if mode != "installed":
        raise NotUpgradable(f"this system is {mode or 'no appliance'}: it runs from layers that it cannot replace")
    digest = hashlib.sha256(records.read_small(RELEASE_FILE, 16 << 20) or b"").hexdigest()
    held = records.held_releases(STATE)
    running = next((one for one in held.values() if one.digest == digest), None)
    if running is None:
        raise NotUpgradable("the record of the running release is damaged", hint="restart the node, or install it anew")
    try:
        device, _ = mounts.mounted(STATE)
        data = mounts.running_data()
    except mounts.MountError as error:
        raise NotUpgradable(str(error.strerror)) from error
    description = read_node("/")
    return Node(str(description.get("name", "")), device, running, data, held, read_settings(), description)
