"""Bundles with any content, also behind a good signature."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import bundle, signed
from appliance.node.refusals import Refusal
from tests.faults.formats.sample import Sample
from tests.faults.formats.spoiling import FEW, bent, spoiled
from tests.unit.releases import SIGNER, TRUST


def everything(path: str, sample: Sample) -> None:
    """All that is read of a bundle. Raises a Refusal."""
    with bundle.open_bundle(path, TRUST) as opened:
        bundle.check_fit(opened.info, sample.old.manifest, {sample.old.digest: "1.0"})
        opened.manifest(sample.old.content)
        for part in opened.info.parts[1:]:
            out = io.BytesIO()
            opened.extract(part, lambda digest: str(sample.old.files.get(digest, "/dev/null")), out)
            assert sha256(out.getvalue()).hexdigest() == part.digest


@given(st.data())
@FEW
def test_a_spoiled_bundle_is_refused(sample: Sample, data: st.DataObject) -> None:
    content = data.draw(spoiled(sample.bundle))
    if content == sample.bundle:
        return
    with pytest.raises(Refusal):
        everything(sample.write(content), sample)


@given(st.data())
@FEW
def test_a_bundle_whose_signed_header_is_bent_is_refused_or_read(sample: Sample, data: st.DataObject) -> None:
    header = data.draw(bent(sample.header))
    content = signed.seal(bundle.MAGIC, header, SIGNER) + sample.payload
    with suppress(Refusal):
        everything(sample.write(content), sample)


@given(st.data())
@FEW
def test_a_bundle_whose_signed_content_is_spoiled_is_refused_or_makes_the_same_files(
    sample: Sample, data: st.DataObject
) -> None:
    """The same, as when a bit changed that says how much memory unpacking may take."""
    payload = data.draw(spoiled(sample.payload))
    if payload == sample.payload:
        return
    header = json.loads(json.dumps(sample.header))
    header["payload"] = {"size": len(payload), "sha256": sha256(payload).hexdigest()}
    header["parts"][-1]["packed"] += len(payload) - len(sample.payload)
    with suppress(Refusal):
        everything(sample.write(signed.seal(bundle.MAGIC, header, SIGNER) + payload), sample)
