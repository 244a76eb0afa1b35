"""A release's trees: mounted for the next root, or swapped beneath the running one. Part of the node's own code.

The swap uses Linux' new mount interface (fsopen(2), move_mount(2)): the new tree is put beneath the old one, then the
old one is detached, so that there is no moment without /etc. Both changes propagate to the services' own mount
namespaces. `mount` of util-linux 2.41 cannot do this, so the calls are made through ctypes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from appliance.node.upgrade.records import layer_path

RUN = "/run/samepage"
CONFIG = f"{RUN}/config"  # the config layer of the running release
APP = "/opt/samepage"
NEXT = f"{RUN}/next"  # layers of another release, while it is looked at
NEXT_ROOT = "/run/nextroot"  # where systemd looks for the root of a soft reboot
OLD_ROOT = "/usr/lib/samepage/old-root"  # after a soft reboot: the base layer of before

# linux/mount.h, and the numbers that all 64-bit architectures but alpha share
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_CLONE, _FLAG, _STRING, _CREATE = 1, 0, 1, 6
_RDONLY, _NOSUID, _NODEV, _NOATIME = 0x1, 0x2, 0x4, 0x10  # MOUNT_ATTR_*
_FROM_DESCRIPTOR, _BENEATH = 0x4, 0x200
_HERE = -100  # AT_FDCWD
_EMPTY_PATH = 0x1000
_PRIVATE = struct.pack("=4Q", 0, 0, 1 << 18, 0)  # struct mount_attr: no flags; propagation
_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(OSError):
    """The kernel refused to mount something; the message names it."""


class Trees(NamedTuple):
    """Layer images of one release, by path."""

    base: str
    app: str
    config: str

    @staticmethod
    def of(root: str, layers: Mapping[str, str]) -> Trees:
        """`layers`: digest by kind."""
        return Trees(*(layer_path(root, kind, layers[kind]) for kind in ("base", "app", "config")))


# --- calls -----------------------------------------------------------------------------------------------------------


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    words = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    found: int = _libc.syscall(ctypes.c_long(number), *words)
    if found < 0:
        error = ctypes.get_errno()
        raise MountError(error, f"{what}: {os.strerror(error)}")
    return found


def _made(kind: str, attributes: int = _RDONLY, **options: str) -> int:
    """A file system as a mount that stands nowhere yet."""
    what = " ".join([kind, *options.values()])
    context = _call(what, _FSOPEN, kind.encode(), 1)
    try:
        for key, value in options.items():
            _call(what, _FSCONFIG, context, _STRING, key.encode(), value.encode(), 0)
        if attributes & _RDONLY:
            _call(what, _FSCONFIG, context, _FLAG, b"ro", None, 0)
        _call(what, _FSCONFIG, context, _CREATE, None, None, 0)
        return _call(what, _FSMOUNT, context, 1, attributes)
    finally:
        os.close(context)


def _copy(place: str) -> int:
    """The one mount at a place, without those below it, as a mount that stands nowhere yet.

    What is mounted on the one, or unmounted from it, stays unknown to the other.
    """
    mount = _call(place, _OPEN_TREE, _HERE, place.encode(), _CLONE)
    try:
        _call(place, _MOUNT_SETATTR, mount, b"", _EMPTY_PATH, _PRIVATE, len(_PRIVATE))
    except MountError:
        os.close(mount)
        raise
    return mount


def _attach(mount: int, place: str, flags: int = 0) -> None:
    try:
        _call(f"mount at {place}", _MOVE_MOUNT, mount, b"", _HERE, place.encode(), _FROM_DESCRIPTOR | flags)
    finally:
        os.close(mount)


def _replace(mount: int, place: str) -> None:
    """Put a mount in the place of the one at `place`, with no moment in between."""
    if not os.path.ismount(place):
        _attach(mount, place)
        return
    _attach(mount, place, _BENEATH)
    _detach(place)


def _detach(place: str) -> None:
    if _libc.umount2(place.encode(), _DETACH) < 0:
        error = ctypes.get_errno()
        raise MountError(error, f"detach {place}: {os.strerror(error)}")


def clear(*places: str) -> None:
    """Unmount whatever is mounted at the places."""
    for place in places:
        while os.path.ismount(place):
            _detach(place)


def _image(path: str) -> int:
    return _made("erofs", source=path)


def _etc(identity: str, config: str, base: str) -> int:
    """The overlay that is /etc: this machine's identity over the config layer over the base layer."""
    return _made("overlay", source="etc", lowerdir=f"{identity}/etc:{config}/etc:{base}/etc", xino="off")


# --- what the upgrade does -------------------------------------------------------------------------------------------


def show(trees: Trees, kinds: Sequence[str]) -> dict[str, str]:
    """Mount layers of a release to read them; their places by kind. `hide` ends that."""
    hide()
    places = {kind: f"{NEXT}/{kind}" for kind in kinds}
    for kind, place in places.items():
        os.makedirs(place, exist_ok=True)
        _attach(_image(getattr(trees, kind)), place)
    return places


def keep_config(trees: Trees) -> None:
    """Mount the running config layer where it can be looked at: a soft reboot drops the mounts below /run."""
    if not os.path.ismount(CONFIG):
        os.makedirs(CONFIG, exist_ok=True)
        _attach(_image(trees.config), CONFIG)


def hide() -> None:
    clear(*(f"{NEXT}/{kind}" for kind in ("base", "app", "config")))


def swap(old: Trees, new: Trees, identity: str) -> None:
    """Exchange /etc and /opt/samepage of the running system for another release's on the same base layer.

    Everything is made before the first exchange, so what cannot be mounted changes nothing. Raises MountError.
    """
    ready: list[tuple[int, str]] = []
    base, config = f"{NEXT}/base", f"{NEXT}/swap"
    try:
        if new.config != old.config:
            for place, mount in ((base, _copy("/")), (config, _image(new.config))):
                os.makedirs(place, exist_ok=True)
                _attach(mount, place)
            ready += [(_etc(identity, config, base), "/etc"), (_image(new.config), CONFIG)]
        if new.app != old.app:
            ready.append((_image(new.app), APP))
    except MountError:
        for mount, _ in ready:
            os.close(mount)
        raise
    finally:
        clear(base, config)
    for mount, place in ready:
        _replace(mount, place)


def build_next_root(trees: Trees, identity: str, state: str, device: str, data: int) -> None:
    """Mount another release with data subvolume `data` where a soft reboot looks for its root. Raises MountError.

    This release's base layer stays mounted in it, so that the kernel keeps what it has read. Otherwise all of that is
    free at once, and the next programs get the memory that the last ones ran from: on an emulated processor, every
    write to it costs a search for what was translated of these.
    """
    drop_next_root()
    os.makedirs(NEXT_ROOT, exist_ok=True)
    _attach(_base(trees.base), NEXT_ROOT)
    with suppress(MountError):  # of a release without that folder: it is only slower
        _attach(_copy("/"), NEXT_ROOT + OLD_ROOT)
    _attach(_image(trees.app), NEXT_ROOT + APP)
    _replace(_image(trees.config), CONFIG)
    _attach(_etc(identity, CONFIG, NEXT_ROOT), f"{NEXT_ROOT}/etc")
    _attach(_copy(state), f"{NEXT_ROOT}/state")
    var = _made("btrfs", _NOSUID | _NODEV | _NOATIME, source=device, subvol=f"data/{data}")
    _attach(var, f"{NEXT_ROOT}/var")


def _base(path: str) -> int:
    """A base layer; the mount there is where there is one, so that what was read of it need not be read again."""
    for place in ("/", OLD_ROOT):
        with suppress(MountError):
            if os.path.basename(mounted(place)[0]) == os.path.basename(path):
                return _copy(place)
    return _image(path)


def forget_old_root() -> None:
    """Keep nothing of the base layer of before: its file shall go, or the room is wanted for another."""
    clear(OLD_ROOT)


def drop_next_root() -> None:
    """A next root that stays behind would become the root of the next restart."""
    clear(*(NEXT_ROOT + place for place in ("/var", "/state", "/etc", APP, OLD_ROOT, "")))


# --- what is mounted -------------------------------------------------------------------------------------------------


def mounted(place: str, mountinfo: str = "/proc/self/mountinfo") -> tuple[str, str]:
    """The device and the path inside it of the mount at a place, such as /dev/vda3 and /data/1. Raises MountError."""
    found = ("", "")
    with open(mountinfo, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if words[4] == place:
                found = (words[words.index("-") + 2], words[3])
    if not found[0]:
        raise MountError(2, f"nothing is mounted at {place}")
    return found


def running_data() -> int:
    """The number of the data subvolume that is /var. Raises MountError where it is none."""
    _, path = mounted("/var")
    name = path.removeprefix("/data/")
    if not name.isdigit():
        raise MountError(2, f"/var is {path}, not a data subvolume")
    return int(name)
