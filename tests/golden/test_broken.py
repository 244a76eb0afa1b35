"""Every kind of broken tree and lock gives its complete message: file, line, key, what is wrong, nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import cli, lock
from appliance.check import check_project
from appliance.errors import LockError
from appliance.model import Lock, Package
from tests.conftest import Golden
from tests.trees import BROKEN, BROKEN_LOCK, layout_of

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEAMCITY_VERSION", raising=False)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tree(kind: str, project: Path, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    for change in BROKEN[kind]:
        change(project)
    status = cli.main(["-C", str(project), "--layout", layout_of(kind), "check"])
    out, err = capsys.readouterr()
    golden(f"broken/{kind}.txt", err)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", BROKEN_LOCK)
def test_broken_lock(kind: str, project: Path, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = check_project(project, "one", "1.0")
    file = project / "recipes" / "packages.lock"
    path = "pool/main/s/systemd/systemd_257-1_amd64.deb"
    package = Package("systemd", "257-1", "amd64", "debian", path, 1, "b" * 64)
    packages = dict.fromkeys(lock.SETS, (package,))
    lock.write_lock(Lock(lock.SUITE, 1, lock.wanted(model), packages), file)
    lock.check(lock.read_lock(file), model)  # the lock is good until it is broken

    old, new = BROKEN_LOCK[kind]
    text = file.read_text()
    assert old == "*" or old in text
    file.write_text(new if old == "*" else text.replace(old, new))
    with pytest.raises(LockError) as caught:
        lock.check(lock.read_lock(file), model)
    status = cli.report(caught.value, cli.Settled())
    golden(f"broken/{kind}.txt", capsys.readouterr().err.replace(str(project), "PROJECT"))
    assert status == 2


def test_every_golden_file_has_its_kind() -> None:
    files = {file.stem for file in (HERE / "broken").glob("*.txt")}
    assert files == {*BROKEN, *BROKEN_LOCK}
    assert len(files) >= 34
