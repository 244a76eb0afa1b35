"""Keys and revocations with any content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.node import keys
from appliance.node.keys import KeyFileError
from appliance.node.refusals import Refusal
from tests.faults.formats.spoiling import FEW, spoiled
from tests.unit.releases import SIGNER

KEY = keys.dump_key(SIGNER.public, keys.PUBLIC, "the team")


@given(
    st.one_of(st.binary(max_size=90), spoiled(KEY)),
    st.one_of(st.binary(max_size=40), spoiled(b"# old\n" + b"0f" * 8)),
)
@FEW
def test_spoiled_keys_and_revocations_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory, key: bytes, revoked: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "keys"
    folder.mkdir(exist_ok=True)
    (folder / "team.pub").write_bytes(key)
    (folder / "revoked").write_bytes(revoked)
    try:
        trust = keys.load_trust(str(folder))
    except KeyFileError:
        return
    assert all(len(public) == 32 and keys.key_id(public) == name for name, public in trust.keys.items())
    with pytest.raises(Refusal):
        trust.verify(next(iter(trust.keys)), bytes(64), b"message")
