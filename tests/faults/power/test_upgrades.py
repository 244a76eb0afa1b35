"""Power cuts during upgrades: after every flush of the disk, and with writes lost, torn and in another order.

`SAMEPAGE_POWER_CUTS=full ./build.py test tests/faults/power` does the whole promise: every class of upgrade, rollbacks,
failures and the clean-up, at least 1,000 cuts besides those after flushes, and at least 25 boots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.faults.power import boots, cuts
from tests.faults.power.boots import Expected
from tests.faults.power.checks import Look, Viewer
from tests.faults.power.conftest import MODE, SEED, Recorded
from tests.faults.power.cuts import Cut
from tests.faults.power.replay import Disk
from tests.faults.power.scenario import Step
from tests.faults.power.timeline import index_at, prove

every_step = pytest.mark.parametrize("step", MODE.steps, ids=lambda step: step.name)
AT_ONCE = 2  # boots
Record = Callable[[str, object], None]


@every_step
def test_every_cut_leaves_the_old_or_the_new_release(
    step: Step, recorded: Recorded, viewer: Viewer, record_property: Record
) -> None:
    operation, log = recorded.operation(step.name), recorded.entries
    near = [index_at(log, mark.offset) for mark in operation.marks]
    others = cuts.reordered(log, MODE.others, SEED, first=operation.first, last=operation.last, near=near)
    seen: list[tuple[Cut, Look]] = []
    findings = prove(viewer.disk, viewer, log, operation, others, lambda cut, look: seen.append((cut, look)))
    record_property("cuts", f"seed {SEED}: {findings}")
    print(f"{step.name}, seed {SEED}: {findings}")
    assert [state for _flushed, state in findings.changes] == list(step.states)
    assert findings.flushes > len(step.states)
    assert findings.others == len(others)
    if step.tried:
        assert findings.tried > 0
    recorded.seen[step.name], recorded.findings[step.name] = seen, findings


@pytest.mark.parametrize("step", [one for one in MODE.steps if one.name in MODE.boots], ids=lambda step: step.name)
def test_cuts_boot_to_health_with_every_acknowledged_row(
    step: Step, recorded: Recorded, second: Disk, record_property: Record
) -> None:
    if step.name not in recorded.seen:
        pytest.skip("its cuts were not all good")
    looks = {id(cut): look for cut, look in recorded.seen[step.name]}
    chosen = boots.choose(recorded.seen[step.name], recorded.findings[step.name], MODE.boots[step.name], SEED)
    began: list[tuple[Cut, Future[str]]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, cut in enumerate(cuts.replay(second, recorded.entries, chosen)):
            while sum(not one.done() for _cut, one in began) >= AT_ONCE:
                next(one for _cut, one in began if not one.done()).exception()
            image = boots.copy_disk(second.image, recorded.folder / f"{step.name}-{number}.raw")
            began.append((cut, pool.submit(boots.boot, image, expected(step, recorded, cut, looks[id(cut)]))))
    reports = []
    for cut, one in began:
        assert one.exception() is None, f"{step.name}, {cut}: {one.exception()}"
        reports.append(f"{cut}: {one.result()}")
    recorded.boots += len(reports)
    record_property("boots", "\n".join(reports))
    print("\n".join(reports))


@pytest.mark.skipif(MODE.again is False, reason="only with SAMEPAGE_POWER_CUTS=full")
def test_the_whole_promise_was_looked_at(recorded: Recorded) -> None:
    found = recorded.findings.values()
    assert {one.name for one in MODE.steps} == recorded.findings.keys()
    assert sum(one.others for one in found) >= 1000
    assert sum(one.newer for one in found) > 0
    assert recorded.boots >= 25


def expected(step: Step, recorded: Recorded, cut: Cut, look: Look) -> Expected:
    offset = recorded.entries[cut.position - 1].end if cut.position else 0

    def rows(release: str) -> frozenset[str]:
        ended = release == step.states[-1].release
        return frozenset(recorded.recording.rows_at(offset, step.name, ended=ended))

    releases = {look.choice.release, *([look.tried.release] if look.tried else [])}
    early = boots.is_early(cut, recorded.findings[step.name])
    again: Sequence[str] = ()
    goal = ""
    if MODE.again and not look.tried and step.bundle[0] and step.outcome == "committed" and early:
        again, goal = step.command(), step.states[-1].release
    return Expected({release: rows(release) for release in releases}, again, goal)
