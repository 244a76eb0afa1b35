"""Manifests with any content: no name in one leads outside."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import release
from appliance.node.release import ReleaseError
from appliance.node.upgrade import records, retention, staging
from appliance.node.versions import order
from tests.faults.formats.sample import Sample
from tests.faults.formats.spoiling import FEW, NASTY, as_json, bent, spoiled, stays


def check_names(manifest: release.Manifest) -> None:
    """Nothing that is made of a manifest's words leads outside the state partition, or is no word for GRUB."""
    name = records.release_id({}, manifest, "f" * 64)
    assert stays("/state/releases", name)
    assert "/" not in name
    for file in records.KERNEL_FILES:
        assert stays("/state/kernels", records.kernel_path("/state", manifest.kernel.id, file))
    for layer in manifest.layers:
        assert stays("/state/layers", records.layer_path("/state", layer.kind, layer.digest))
    record = records.parse_record(release.boot_record(manifest, 1, name))
    assert record is not None
    assert (record.release, record.kernel) == (name, manifest.kernel.id)
    assert order(manifest.version)
    assert retention.figure(sum(layer.size for layer in manifest.layers))
    with suppress(ReleaseError):
        assert len(release.parse_layers(release.dump_layers(manifest.layers_of("one")))) == 3
        assert all(stays("/state", file.path) for file in staging.wanted_files("/state", manifest, "one").values())
        assert all(stays("/state", file) for file in retention.files_of(manifest, "one"))


@given(st.data())
@FEW
def test_a_bent_manifest_is_refused_or_names_nothing_outside(sample: Sample, data: st.DataObject) -> None:
    try:
        manifest = release.parse(as_json(data.draw(bent(json.loads(sample.old.content)))))
    except ReleaseError:
        return
    check_names(manifest)


@given(st.data())
@FEW
def test_a_spoiled_manifest_is_refused_or_a_manifest(sample: Sample, data: st.DataObject) -> None:
    try:
        manifest = release.parse(data.draw(spoiled(sample.old.content)))
    except ReleaseError:
        return
    check_names(manifest)


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("where", [("version",), ("kernel", "id"), ("layers", 0, "kind"), ("layers", 0, "digest")])
def test_names_that_lead_elsewhere_are_refused(sample: Sample, where: tuple[Any, ...], name: str) -> None:
    value = json.loads(sample.old.content)
    place = value
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = name
    if name in ("CON", "1.0.partial", "x" * 300) and where[0] != "layers":
        check_names(release.parse(as_json(value)))  # words like others
        return
    with pytest.raises(ReleaseError):
        release.parse(as_json(value))
