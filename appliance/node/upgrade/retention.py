"""What stays on the state partition and what goes, and the room an upgrade needs. Part of the node's own code.

`plan` only decides. Whoever carries it out removes the folders of the releases first, then the files, then the data:
a power cut in between leaves files that no release has, which the next plan names, and never a release without files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from appliance.node.refusals import Damaged, NoRoom
from appliance.node.release import Manifest
from appliance.node.upgrade.records import KERNEL_FILES, KERNELS, LAYERS, kernel_path, layer_path
from appliance.node.versions import order

MARGIN = 256_000_000  # bytes to spare: what btrfs needs to write at all, and data that changes during the upgrade


class Release(NamedTuple):
    """A release on the state partition. `files`: see `files_of`; `data`: the data it left behind, if any."""

    id: str
    version: str
    installed_at: float  # seconds since 1970
    files: frozenset[str]
    data: int | None = None


class Present(NamedTuple):
    """What is there: bytes of files by path in the state partition, bytes of data by number.

    `files` are layers, kernels and whatever upgrades and downloads left; `data` counts the bytes that no other
    subvolume shares. What the journal or a boot record names stays: `named_files`, `named_data`.
    """

    files: Mapping[str, int]
    data: Mapping[int, int]
    named_files: frozenset[str] = frozenset()
    named_data: frozenset[int] = frozenset()


class Plan(NamedTuple):
    """Each entry with its reason in words. `frees`: bytes; `over`: bytes above the budget that no cleanup frees."""

    keep: tuple[tuple[str, str], ...]  # ids of releases, the newest first
    remove: tuple[tuple[str, str], ...]  # ids of releases, the oldest first
    files: tuple[tuple[str, str], ...]  # paths in the state partition
    data: tuple[tuple[int, str], ...]
    frees: int
    over: int

    @property
    def empty(self) -> bool:
        return not (self.remove or self.files or self.data)

    def lines(self) -> list[str]:
        """The plan as `cleanup` prints it."""
        rows = [("keep", name, why) for name, why in self.keep]
        rows += [("remove", name, why) for name, why in self.remove]
        rows += [("remove", name, why) for name, why in self.files]
        rows += [("remove", f"data {number}", why) for number, why in self.data]
        width = max((len(name) for _, name, _ in rows), default=0)
        text = [f"{verb:<6}  {name:<{width}}  {why}" for verb, name, why in rows]
        text.append(f"frees {figure(self.frees)}" if not self.empty else "nothing to remove")
        if self.over:
            text.append(f"still {figure(self.over)} over the space budget")
        return text


def files_of(manifest: Manifest, node: str) -> frozenset[str]:
    """Paths in the state partition of a release's files on one node. Raises ReleaseError."""
    layers = {layer_path("", layer.kind, layer.digest) for layer in manifest.layers_of(node)}
    return frozenset(layers | {kernel_path("", manifest.kernel.id, name) for name in KERNEL_FILES})


def plan(
    releases: Collection[Release], present: Present, *, running: str, running_data: int, previous: str, keep: int,
    budget_bytes: int | None, used_bytes: int, protected: Collection[str] = (),
) -> Plan:  # fmt: skip
    """Decide what goes: all but `keep` releases, more of them while over the budget, and what belongs to none.

    `running` and `previous`, the one that a rollback goes back to (empty: none), always stay, and so do `protected`
    ones. `running_data` is the data that runs. `used_bytes` is what the budget is compared with; None is no budget.
    Raises Damaged where the record of the running or the previous release is not among `releases`: its files would
    count as nobody's.
    """
    by_id = {one.id: one for one in releases}
    for name in (running, previous) if previous else (running,):
        if name not in by_id:
            raise Damaged(f"the record of release {name or '?'} cannot be read", hint="nothing is removed without it")
    reasons = dict.fromkeys((name for name in protected if name in by_id), "an unfinished upgrade needs it")
    if previous:
        reasons[previous] = "a rollback goes back to it"
    reasons[running] = "it runs"
    most = max(keep, len(reasons))
    others = sorted((one for one in by_id.values() if one.id not in reasons), key=_age)
    spare = others[max(0, len(others) - (most - len(reasons))) :]
    going = others[: len(others) - len(spare)]
    remove = {one.id: f"only {most} {'release is' if most == 1 else 'releases are'} kept" for one in going}
    staying = [one for one in by_id.values() if one.id not in remove]

    def leave() -> tuple[tuple[str, ...], tuple[int, ...], int]:
        needed = present.named_files.union(*(one.files for one in staying))
        data = present.named_data | {running_data} | {one.data for one in staying}
        files = tuple(sorted(present.files.keys() - needed))
        numbers = tuple(sorted(present.data.keys() - data))
        return files, numbers, sum(present.files[one] for one in files) + sum(present.data[one] for one in numbers)

    files, numbers, frees = leave()
    for one in spare:
        over = _over(budget_bytes, used_bytes - frees)
        if not over:
            break
        remove[one.id] = f"{figure(over)} over the space budget"
        staying.remove(one)
        files, numbers, frees = leave()
    reasons |= {one.id: f"one of the newest; {most} are kept" for one in staying if one.id not in reasons}
    gone = [by_id[name] for name in remove]
    return Plan(
        keep=tuple((one.id, reasons[one.id]) for one in sorted(staying, key=_age, reverse=True)),
        remove=tuple(remove.items()),
        files=tuple((path, _why_file(path, [one.id for one in gone if path in one.files])) for path in files),
        data=tuple((number, _why_data([one.id for one in gone if one.data == number])) for number in numbers),
        frees=frees,
        over=_over(budget_bytes, used_bytes - frees),
    )


def need(sizes: Iterable[int], free: int, *, margin: int = MARGIN) -> int:
    """Bytes that must be free to make files of these sizes, in bytes. Raises NoRoom where `free` is less."""
    files = sum(sizes)
    if free < files + margin:
        raise NoRoom(
            f"the upgrade needs {figure(files + margin)} ({figure(files)} of files and {figure(margin)} to spare), "
            f"but {figure(free)} are free"
        )
    return files + margin


def figure(size: int) -> str:
    """A size as people read it, in decimal units."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _age(one: Release) -> tuple[object, ...]:
    return one.installed_at, order(one.version), one.id


def _over(budget: int | None, used: int) -> int:
    return max(0, used - budget) if budget is not None else 0


def _why_file(path: str, owners: list[str]) -> str:
    if owners:
        return f"only {' and '.join(owners)} needed it"
    if path.startswith((LAYERS + "/", KERNELS + "/")):
        return "no release needs it"
    return "left behind by a download or an upgrade that did not end"


def _why_data(owners: list[str]) -> str:
    return f"the data that {' and '.join(owners)} left behind" if owners else "no release needs it"
