"""Where things stand on a node, on the medium and on the state partition. Part of the node's own code."""

from __future__ import annotations

from pathlib import Path

# Labels. A FAT label has at most 11 characters, and the config drive may be FAT.
MEDIUM_LABEL = "SAMEPAGE"
STATE_LABEL = "SAMEPAGE-STATE"
CONFIG_DRIVE_LABEL = "SAMEPAGECFG"

# A running node
STATE = Path("/state")
RUN = Path("/run/samepage")
MEDIUM = RUN / "medium"  # live only: the mounted medium
PACKED = RUN / "packed"  # live only: one mounted squashfs per layer kind
CONFIG = RUN / "config"  # the mounted config layer
RELEASE = RUN / "release.json"  # manifest of the booted release
MODE = RUN / "mode"  # "live" or "installed"
INITRD_CREDENTIALS = Path("/run/credentials/@initrd")
APP = Path("/opt/samepage")

# Relative to the state partition, and to /samepage on the medium
LAYERS = "layers"
KERNELS = "kernels"
RELEASES = "releases"
# State partition only
BOOT = "boot"
SELECTED = "boot/selected.cfg"  # the release to boot
PREVIOUS = "boot/previous.cfg"  # the last good one before it
TRY = "boot/try.cfg"  # booted once when GRUB's environment says so
IDENTITY = "identity"
CREDENTIALS = "identity/credentials"  # *.cred files that every boot hands to systemd
DATA = "data"
# Medium only
MEDIUM_ROOT = "samepage"
MEDIUM_BOOT = "boot"  # esp.img, boot.img and core.img


def image_name(kind: str, digest: str) -> str:
    """File name of a layer's image."""
    return f"{kind}-{digest}.erofs"


def packed_name(kind: str, digest: str) -> str:
    """File name of the squashfs around a layer's image."""
    return f"{kind}-{digest}.squashfs"
