"""Carries out what retention.py decides. Part of the node's own code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress

from appliance.node.release import ReleaseError, parse_layers
from appliance.node.upgrade import journal, mounts, records, retention, staging
from appliance.node.upgrade.node import INCOMING, STATE, Node
from appliance.node.upgrade.records import BootRecord, Held
from appliance.node.upgrade.services import ServiceError, run

Report = Callable[[str, int, int], None]
_INCOMING = os.path.relpath(INCOMING, STATE) + "/"
_FOLDERS = (records.LAYERS, records.KERNELS, records.RELEASES, "boot", journal.FOLDER)


def decide(node: Node) -> retention.Plan:
    """What `cleanup` would do. Raises Damaged where the running or the previous release has no whole record."""
    begun = journal.read(node.root)
    named = [found for name in (records.SELECTED, records.PREVIOUS) if (found := records.read_record(node.root, name))]
    previous = next((one.release for one in named if one.release in node.held and one.release != node.running.id), "")
    protected = [begun.old, begun.new] if begun else []
    numbers = {one.data for one in named} | ({begun.old_data, begun.new_data, begun.spare_data} if begun else set())
    present = retention.Present(
        files=dict(_files(node.root)),
        data={number: _exclusive(node, number) for number in records.data_numbers(node.root) if number != node.data}
        | {node.data: 0},
        named_files=frozenset(path for one in named for path in _named_files(node.root, one)),
        named_data=frozenset(numbers),
    )
    counted = sum(present.files.values()) + sum(present.data.values())
    return retention.plan(
        [_release(node, one) for one in node.held.values()], present, running=node.running.id, running_data=node.data,
        previous=previous, keep=node.settings.keep,
        budget_bytes=(staging.free(node.root) + counted) * node.settings.budget // 100, used_bytes=counted,
        protected=protected,
    )  # fmt: skip


def clean(node: Node, report: Report) -> retention.Plan:
    """Remove what need not stay; records first, so that a power cut never leaves a release without its files."""
    wanted = decide(node)
    steps = len(wanted.remove) + len(wanted.files) + len(wanted.data)
    for name, _ in wanted.remove:
        shutil.rmtree(_going(node, name), ignore_errors=True)  # left by an earlier cleanup that did not end
        os.rename(os.path.join(node.root, records.RELEASES, name), _going(node, name))
    if wanted.remove:
        records.commit(node.root)
    for number, (name, _) in enumerate(wanted.remove):
        shutil.rmtree(_going(node, name))
        report("clean", number, steps)
    if wanted.files:
        mounts.forget_old_root()  # a file that is mounted would keep its room
    for path, _ in wanted.files:
        with suppress(FileNotFoundError):  # it was in one of the folders above
            os.unlink(os.path.join(node.root, path))
    for folder in (records.KERNELS, records.RELEASES):
        for name in os.listdir(os.path.join(node.root, folder)):
            with suppress(OSError):  # it is in use
                os.rmdir(os.path.join(node.root, folder, name))
    for data, _ in wanted.data:
        run("btrfs", "subvolume", "delete", os.path.join(node.root, records.DATA, str(data)))
    if not wanted.empty:
        records.commit(node.root)
        report("clean", steps, steps)
    return wanted


def _going(node: Node, name: str) -> str:
    return os.path.join(node.root, records.RELEASES, name + records.PARTIAL)


def _release(node: Node, one: Held) -> retention.Release:
    record = os.path.join(node.root, records.RELEASES, one.id, "release.json")
    files = retention.files_of(one.manifest, node.name)
    return retention.Release(one.id, one.manifest.version, os.stat(record).st_mtime, files, one.data)


def _named_files(root: str, record: BootRecord) -> Iterator[str]:
    """What a boot record needs, also where the release's own record cannot be read."""
    for name in records.KERNEL_FILES:
        yield records.kernel_path("", record.kernel, name)
    content = records.read_small(os.path.join(root, records.RELEASES, record.release, "layers"), 4096) or b""
    with suppress(ReleaseError):
        for kind, digest in parse_layers(content).items():
            yield records.layer_path("", kind, digest)


def _files(root: str) -> Iterator[tuple[str, int]]:
    """Layers, kernels, and what broken-off runs and finished downloads left; sizes by path."""
    for folder in _FOLDERS:
        for place, _, names in os.walk(os.path.join(root, folder)):
            for name in names:
                path = os.path.join(place, name)
                inside = os.path.relpath(path, root)
                layer = folder in (records.LAYERS, records.KERNELS)
                if layer or records.PARTIAL in inside or inside.startswith(_INCOMING):
                    yield inside, os.stat(path).st_size


def _exclusive(node: Node, number: int) -> int:
    """Bytes of a data subvolume that no other shares."""
    try:
        words = run("btrfs", "filesystem", "du", "-s", "--raw", os.path.join(node.root, records.DATA, str(number)))
        return int(words.splitlines()[-1].split()[1])
    except (ServiceError, ValueError, IndexError):
        return 0
