"""The node's own staging, on a small disk of this host: a file has its name only once its content is on the disk.

Otherwise a power cut leaves files that have their names and their sizes, but holes in place of their content.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from appliance.bundle import make
from appliance.node.bundle import open_bundle
from appliance.node.upgrade import records, staging
from tests.faults.power import exported
from tests.faults.power.test_harness import OLD, Range, Stage, logged, tools
from tests.faults.power.timeline import Mark
from tests.unit.releases import SIGNER, TRUST

__all__ = ["logged", "tools"]
pytestmark = [pytest.mark.fault, pytest.mark.skipif(bool(exported.missing_export()), reason=exported.missing_export())]

_FIEMAP, _COUNT, _DELAYED = 0xC020660B, 64, 0x4  # of linux/fiemap.h


def in_memory(path: Path) -> bool:
    """Whether the kernel has not yet written a part of a file."""
    buffer = bytearray(32 + 56 * _COUNT)
    struct.pack_into("<QQIIII", buffer, 0, 0, (1 << 64) - 1, 0, 0, _COUNT, 0)
    with path.open("rb") as file:
        fcntl.ioctl(file.fileno(), _FIEMAP, buffer)
    (count,) = struct.unpack_from("<I", buffer, 20)
    return any(struct.unpack_from("<I", buffer, 32 + 56 * number + 40)[0] & _DELAYED for number in range(count))


def silent(_done: int, _total: int) -> None:
    pass


def test_names_come_after_the_content(logged: Range, monkeypatch: pytest.MonkeyPatch) -> None:
    early = list[str]()
    rename = os.rename

    def watched(source: str, target: str) -> None:
        if Path(source).is_file() and in_memory(Path(source)):
            early.append(Path(target).name)
        rename(source, target)

    def upgrade(stage: Stage) -> list[Mark]:
        bundle = stage.log.parent / "bundle"
        make(stage.old, stage.new, SIGNER, bundle)
        monkeypatch.setattr(os, "rename", watched)
        with open_bundle(str(bundle), TRUST, silent) as opened:
            root = str(stage.root)
            staged = staging.stage(root, opened, "one", records.held_releases(root), silent)
        monkeypatch.undo()
        assert staged.release.id == "1.1"
        return []

    logged.run(upgrade, (OLD,))
    assert early == []
