"""Whatever a signed bundle says, staging writes good files in their places and nothing else."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import delta as deltas
from appliance.node import bundle, signed
from appliance.node.refusals import Refusal
from appliance.node.upgrade import records, staging
from tests.faults.formats.sample import Sample
from tests.faults.formats.spoiling import FEW, as_json, bent
from tests.unit.releases import SIGNER, TRUST


def staged(sample: Sample, content: bytes, root: Path) -> None:
    with bundle.open_bundle(sample.write(content), TRUST) as opened:
        held = records.held_releases(str(root))
        bundle.check_fit(opened.info, sample.old.manifest, {one.digest: one.manifest.version for one in held.values()})
        staging.stage(str(root), opened, "one", held, lambda *_: None)


def with_manifest(sample: Sample, value: Any, header: Any = None) -> bytes:
    """A signed bundle that makes this manifest, and the files that the sample makes."""
    content = as_json(value)
    first = deltas.make_small(content, sample.old.content)
    made = json.loads(json.dumps(header or sample.header))
    old_first = made["parts"][0]["packed"]
    made["parts"][0] |= {"packed": len(first), "size": len(content), "digest": sha256(content).hexdigest()}
    to = made["to"]
    to["manifest"] = sha256(content).hexdigest()
    for key in ("version", "layout", "architecture"):
        if isinstance(value, dict) and isinstance(value.get(key), str):
            to[key] = value[key]
    payload = first + sample.payload[old_first:]
    made["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    return signed.seal(bundle.MAGIC, made, SIGNER) + payload


@given(st.data())
@settings(FEW, max_examples=100)
def test_whatever_a_bundle_says_staging_writes_only_good_files_in_their_places(
    sample: Sample, data: st.DataObject
) -> None:
    root = sample.state("staged")
    outside = {path for path in root.parent.rglob("*") if root not in path.parents}
    content = with_manifest(sample, data.draw(bent(json.loads(sample.new.content))))
    with suppress(Refusal, OSError):
        staged(sample, content, root)
    assert {path for path in root.parent.rglob("*") if root not in path.parents} == outside
    for path in (path for path in root.rglob("*") if path.is_file()):
        kind = path.relative_to(root).parts[0]
        assert kind in ("layers", "kernels", "releases")
        if kind == "layers":
            assert sha256(path.read_bytes()).hexdigest() in path.name


def test_the_good_bundle_is_staged(sample: Sample) -> None:
    root = sample.state("good")
    staged(sample, with_manifest(sample, json.loads(sample.new.content)), root)
    staged(sample, sample.bundle, root)
    assert sorted(records.held_releases(str(root))) == ["1.0", "1.1", f"1.1+{sample.new.digest[:8]}"]
