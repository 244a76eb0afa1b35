"""Does what the README asks of a newcomer, on a machine that has nothing: `make iso` in a minimal Debian.

    sudo .venv/bin/python tests/fresh/fresh.py                  # Debian 12 and 13, as root and as a user with sudo
    sudo .venv/bin/python tests/fresh/fresh.py trixie --as user
    sudo -E PIP_CONFIG_FILE=/srv/pip.conf .venv/bin/python tests/fresh/fresh.py --share /srv/pip.conf

Not a part of `make test`: it downloads half a gigabyte and takes some minutes per machine. What it finds is mostly a
package that a developer's machine happens to have and the builder forgot to ask for. A machine is a root tree, entered
in a mount namespace of its own; it has git, make, python3 and sudo, and a clone of this checkout's last commit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from appliance.apt import find_mirrors
from bench.debian import source_lines
from bench.measure import remove_tree

PROJECT = Path(__file__).resolve().parents[2]
ENTER = PROJECT / "bench/guest/enter.sh"
SUITES = ("bookworm", "trixie")
USERS = ("root", "user")
PACKAGES = ("git", "make", "python3", "sudo", "ca-certificates")
USER = "newcomer"

COMMANDS = """\
set -eu
git config --global --add safe.directory '*'
git clone -q /work checkout
cd checkout
make iso
cd dist
sha256sum --check --strict ./*.iso.sha256
ls -l
cd ..
test -z "$(git status --porcelain)" || { git status --short; echo "the build changed the checkout"; exit 1; }
./build.py doctor || [ $? -eq 3 ]  # what only booting needs is not there yet
"""


def make_machine(suite: str, tree: Path) -> None:
    """A minimal Debian whose apt knows the host's mirrors, with a user who may use sudo."""
    options = ["--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    subprocess.run(["mmdebstrap", *options, suite, str(tree), *source_lines(find_mirrors(suite), suite)], check=True)
    subprocess.run(["chroot", tree, "useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
    (tree / f"etc/sudoers.d/{USER}").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    (tree / "work").mkdir()


def share(paths: Sequence[Path], tree: Path) -> None:
    """Make files and folders of the host visible at the same paths; copies, so that the machine may replace them."""
    for path in paths:
        place = tree / path.absolute().relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--recursive", "--no-target-directory", path, place], check=True)


def environment() -> dict[str, str]:
    """A login's environment, with the caller's settings of pip and of proxies."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **kept}


def build_in(tree: Path, user: str) -> None:
    """`make iso` in the machine. Raises CalledProcessError when anything of it fails."""
    home = "/root" if user == "root" else f"/home/{USER}"
    login = [] if user == "root" else ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
    words = ["env", f"HOME={home}", *login, "sh", "-c", f"cd {home}\n{COMMANDS}"]
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", str(ENTER), str(tree), str(PROJECT)]
    subprocess.run([*namespace, *words], check=True, env=environment())


def hash_of_iso(tree: Path) -> str:
    """SHA-256 of the ISO that was built."""
    (iso,) = (iso for place in ("root", f"home/{USER}") for iso in (tree / place).glob("checkout/dist/*.iso"))
    with iso.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def try_machine(suite: str, user: str, shared: Sequence[Path]) -> str:
    """Make a machine, build in it, and remove it. Returns the hash of its ISO."""
    with tempfile.TemporaryDirectory(prefix="fresh-", dir="/var/tmp") as folder:
        tree = Path(folder) / "tree"
        make_machine(suite, tree)
        share(shared, tree)
        try:
            build_in(tree, user)
            return hash_of_iso(tree)
        finally:
            remove_tree(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the ISO on machines that have nothing.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; both by default")
    parser.add_argument("--as", dest="user", choices=USERS, action="append", help="both by default")
    parser.add_argument("--share", type=Path, action="append", default=[], help="copy this in (not of /tmp)")
    arguments = parser.parse_args()
    hashes: dict[str, str] = {}
    for suite in arguments.suites or SUITES:
        for user in arguments.user or USERS:
            started = time.monotonic()
            try:
                found = try_machine(suite, user, arguments.share)
            except subprocess.CalledProcessError as error:
                found = f"FAILED with status {error.returncode}"
            hashes[f"{suite} as {user}"] = found
            print(f"== {suite} as {user}: {found} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    print("\n".join(f"{name}: {found}" for name, found in hashes.items()))
    different = len(set(hashes.values())) > 1
    if different:
        print("the machines did not build the same ISO")
    return 1 if different or any(found.startswith("FAILED") for found in hashes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
