"""The same lock gives the same bytes: another path, user, umask, locale, time zone, host name, and a later time.

The clock is not set to another year: a preloaded clock does not reach through a chroot of another C library, and the
host's own is not ours to set. What tells the day of a build is looked for in the tree instead.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from appliance.pipeline import Output
from appliance.run import pasteable
from tests.artifact.rebuild import digests

PROJECT = Path(__file__).parents[2]
OTHER_USER = 4711

# As root: a user that the host does not have, with subordinate ids, in a home that nobody else may enter, and a host
# with another name. Bind mounts in a namespace of their own make all of it, so the host is left as it is.
OTHER_HOST = """
set -eu
umask 022
mount --make-rprivate /
for name in passwd group subuid subgid; do cp /etc/$name "$HOME_OF_OTHER/$name"; done
echo "other:x:$OTHER:$OTHER::$HOME_OF_OTHER:/bin/sh" >> "$HOME_OF_OTHER/passwd"
echo "other:x:$OTHER:" >> "$HOME_OF_OTHER/group"
echo "other:3000000:65536" | tee -a "$HOME_OF_OTHER/subuid" >> "$HOME_OF_OTHER/subgid"
for name in passwd group subuid subgid; do mount --bind "$HOME_OF_OTHER/$name" /etc/$name; done
mkdir -p "$HOME_OF_OTHER/python"
mount --bind "$SITE_PACKAGES" "$HOME_OF_OTHER/python"
mount -t tmpfs tmpfs /mnt
mkdir /mnt/other
mount --rbind "$HOME_OF_OTHER" /mnt/other
chmod 700 /mnt/other
cd /mnt/other
hostname another-host
umask 077
exec setpriv --reuid="$OTHER" --regid="$OTHER" --clear-groups "$@"
"""


@pytest.fixture(scope="module")
def first(output: Output) -> dict[str, str]:
    return digests(output)


@pytest.fixture(scope="module")
def other(output: Output, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the second build; it takes the fetched packages from the first one's cache and nothing else."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(PROJECT / "recipes", home / "project/recipes", symlinks=True)
    shutil.copytree(PROJECT / "appliance", home / "project/appliance")
    shutil.copytree(output.built.store.root / "packages", home / "cache/packages")
    (home / "dist").mkdir()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu",
        "LOGNAME": "other", "USER": "other",
    }  # fmt: skip
    script = PROJECT / "tests/artifact/rebuild.py"
    shutil.copy(script, home / script.name)
    if os.geteuid() == 0:
        for path in [home, *home.rglob("*")]:
            os.chown(path, OTHER_USER, OTHER_USER, follow_symlinks=False)
        place = Path("/mnt/other")
        environment |= {"HOME_OF_OTHER": str(home), "OTHER": str(OTHER_USER), "SITE_PACKAGES": _site_packages()}
        front = ["unshare", "--mount", "--uts", "sh", "-c", OTHER_HOST, "sh"]
        python = [_system_python()]
    else:
        place, front, python = home, [], [sys.executable]
    environment |= {"HOME": str(place), "PYTHONPATH": str(place / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [*front, *python, place / script.name, place / "project", place / "cache", place / "dist"]
    done = subprocess.run(
        words, cwd=home, env=environment, capture_output=True, text=True, umask=0o077, timeout=400, check=False
    )
    assert done.returncode == 0, f"{pasteable(words)}\n{done.stderr[-4000:]}"
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _site_packages() -> str:
    return next(path for path in sys.path if path.endswith("site-packages"))


def _system_python() -> str:
    """An interpreter that any user may run, of the version that the packages are for."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert Path(f"/usr/bin/{version}").exists(), f"this test as root needs /usr/bin/{version}"
    return f"/usr/bin/{version}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "part", ["tree", "base", "base packed", "app", "app packed", "kernel", "initrd", "release", "iso"]
)
def test_another_host_makes_the_same_bytes(first: dict[str, str], other: dict[str, str], part: str) -> None:
    assert other[part] == first[part]


@pytest.mark.timeout(600)
def test_every_nodes_configuration_too(first: dict[str, str], other: dict[str, str]) -> None:
    configs = {name for name in first if name.startswith("config")}
    assert configs
    assert {name: other[name] for name in configs} == {name: first[name] for name in configs}


def test_no_time_is_later_than_the_lock(output: Output, tree: tarfile.TarFile) -> None:
    assert max(member.mtime for member in tree) <= output.built.lock.epoch


def test_no_file_tells_the_day_or_the_host_of_the_build(output: Output, tree: tarfile.TarFile) -> None:
    """Texts of the tree that are no package's own: dates as people and programs write them, and the host's name."""
    built = datetime.fromtimestamp(output.built.tree.tar.stat().st_mtime, UTC)
    marks = [built.strftime(form) for form in ("%Y-%m-%d", "%d %b %Y", "%a %b %e", "%Y%m%d")]
    days = str(int(built.timestamp() // 86400))
    found = []
    for member in tree:
        if not member.isreg() or not member.name.startswith(("./etc/", "./usr/share/factory/", "./usr/lib/sysimage/")):
            continue
        stream = tree.extractfile(member)
        assert stream is not None
        text = stream.read().decode(errors="replace")
        found += [
            (member.name, mark) for mark in (*marks, socket.gethostname() + ".") if mark in text and len(mark) > 5
        ]
        if member.name.endswith("/shadow") and f":{days}:" in text:
            found.append((member.name, days))
    assert found == []
