"""Debian packages become one tree, as a tar: mmdebstrap from nothing but the locked files.

Two steps: the core (recipe base, with the kernel), and the rest installed on top of it, so that a package added to any
other recipe costs the second step only. Root and ordinary users (in a user namespace) get the same bytes: all that an
ordinary user cannot see is read from file descriptors that are opened outside of the namespace.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from appliance.apt import file_name, local_index
from appliance.errors import ApplianceError, CommandError, HostError
from appliance.lock import CORE_RECIPE, OMITTED, omitted_stanza
from appliance.model import Lock, Model, Package, Recipe, User
from appliance.run import run, stream
from appliance.store import Store, digest_of_files
from appliance.tools import Obtain
from appliance.workfolder import work_folder

SCRIPTS = Path(__file__).parent / "chroot"
_PLACE = "samepage-build"  # in the chroot, while it is built

BOOT_PATTERNS = ("./boot/vmlinuz-*", "./usr/lib/modules", "./usr/bin/busybox", "./usr/lib/klibc", "./usr/lib/klibc-*")


@dataclass(frozen=True, slots=True)
class Rootfs:
    """The built tree: `tar` (uncompressed, sorted) is the base layer's content; `boot` a folder with what the boot
    chain takes from the core, at its path in the tree: boot/vmlinuz-*, usr/lib/modules/<kernel>/, usr/bin/busybox,
    usr/lib/klibc*.
    """

    tar: Path
    boot: Path
    key: str  # changes whenever the tree may

    @property
    def kernel(self) -> str:
        """Version of the kernel, as its modules' folder is called."""
        return next(folder.name for folder in sorted((self.boot / "usr/lib/modules").iterdir()))


class Inputs(NamedTuple):
    """Everything that the core, and that the whole tree depends on."""

    core: Mapping[str, str]
    tree: Mapping[str, str]


def build(lock: Lock, model: Model, inputs: Inputs, store: Store, obtain: Obtain) -> Rootfs:
    """Build, or find in the store, the tree of all packages of the model.

    Raises CommandError when a package does not install, ApplianceError when the tree breaks a promise (a user nobody
    declared, a program that raises privileges), HostError when the host lets the user build nothing.
    """

    def build_core(folder: Path) -> None:
        _build_core(lock, model, obtain, folder, _report(store, len(lock.sets["core"])))

    def build_tree(folder: Path) -> None:
        _build_tree(lock, model, obtain, core, folder, _report(store, len(lock.sets["full"]) - len(lock.sets["core"])))

    core = store.step("core", inputs.core, build_core)
    tree = store.step("tree", inputs.tree, build_tree)
    return Rootfs(tree / "tree.tar", core / "boot", tree.name)


Report = Callable[[int], None]
"""Told how many packages are set up."""


def _report(store: Store, total: int) -> Report:
    return lambda done: store.report(min(done, total), total, "packages")


# --- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(lock: Lock, model: Model) -> Inputs:
    """What both are made from. It asks the host's package manager, so once per build is enough."""
    core = {
        "scripts": _scripts_digest(),
        "host tools": _host_tools(),
        "clock": str(lock.epoch),
        "users": json.dumps(_users(model, core=True)),
        "kernel modules": json.dumps(_modules(model)),
        "excluded files": json.dumps(_excluded(model, core=True)),
        **{f"package {package.name}": f"{package.version} {package.sha256}" for package in lock.sets["core"]},
    }
    tree = core | {
        "users": json.dumps(_users(model, core=True) + _users(model, core=False)),
        "excluded files": json.dumps(_excluded(model, core=False)),
        "build steps": digest_of_files(_builds(model)),
        "omitted": json.dumps(lock.wanted.get(OMITTED, ())),
        **{f"package {package.name}": f"{package.version} {package.sha256}" for package in lock.sets["full"]},
    }
    return Inputs(core, tree)


def _scripts_digest() -> str:
    files = {file.name: file for file in SCRIPTS.iterdir() if file.is_file()}
    return digest_of_files({**files, "rootfs.py": Path(__file__)})


def _host_tools() -> str:
    """Versions of the host's programs that lay out the tree."""
    form = "${Package} ${Version}\n"
    found = run(["dpkg-query", "--show", f"--showformat={form}", "apt", "dpkg", "mmdebstrap", "tar"], check=False)
    return ", ".join(sorted(found.stdout.decode().splitlines()))


def _users(model: Model, *, core: bool) -> list[dict[str, object]]:
    recipes = [recipe for recipe in model.recipes if (recipe.name == CORE_RECIPE) is core]
    return [
        _user(user) for user in sorted((user for recipe in recipes for user in recipe.users), key=lambda user: user.uid)
    ]


def _user(user: User) -> dict[str, object]:
    entry = {"name": user.name, "uid": user.uid, "home": user.home, "group_only": user.group_only}
    return {**entry, "groups": list(user.groups)}


def _modules(model: Model) -> list[str]:
    return sorted({name for recipe in model.recipes for name in recipe.modules})


def _excluded(model: Model, *, core: bool) -> list[str]:
    recipes = [recipe for recipe in model.recipes if recipe.name == CORE_RECIPE or not core]
    return sorted({glob for recipe in recipes for glob in recipe.exclude})


def _build_files(recipe: Recipe) -> dict[str, Path]:
    """A recipe's build step and what lies beside it, by the path it gets beside the stage scripts."""
    script = recipe.folder / recipe.build
    around = [script] if script.parent == recipe.folder else sorted(script.parent.rglob("*"))
    return {f"recipes/{recipe.name}/{file.relative_to(recipe.folder)}": file for file in around if file.is_file()}


def _builds(model: Model) -> dict[str, Path]:
    return {name: file for recipe in model.recipes if recipe.build for name, file in _build_files(recipe).items()}


# --- the two steps ---------------------------------------------------------------------------------------------------


def _build_core(lock: Lock, model: Model, obtain: Obtain, folder: Path, report: Report) -> None:
    packages = lock.sets["core"]
    config = {
        "users": _users(model, core=True),
        "modules": _modules(model),
        "exclude": _excluded(model, core=True),
        "builds": [],
        "omitted": [],
    }
    tar = folder / "core.tar"
    with work_folder() as work:
        _pack_repository(packages, obtain(packages), config, lock, work / "packages.tar")
        _mmdebstrap(
            lock,
            work,
            tar,
            None,
            report,
            "--variant=essential",
            f"--include={','.join(package.name for package in packages)}",
            f"--setup-hook={_UNPACK}",
            f"--essential-hook={_STAGE.format(stage='prepare')}",
            f"--customize-hook={_STAGE.format(stage='core')}",
            f'--customize-hook=rm -r "$1/{_PLACE}"',
        )
    boot = folder / "boot"
    boot.mkdir()
    run(
        [
            "tar",
            "-xf",
            tar,
            "-C",
            boot,
            "--no-same-owner",
            "--no-same-permissions",
            "--wildcards",
            *_present(tar, BOOT_PATTERNS),
        ]
    )


def _present(tar: Path, patterns: Sequence[str]) -> list[str]:
    """tar refuses patterns that match nothing; klibc's library lies in another place on other releases."""
    names = run(["tar", "-tf", tar]).stdout.decode().splitlines()
    return [
        pattern
        for pattern in patterns
        if any(re.match(re.escape(pattern).replace(r"\*", ".*"), name) for name in names)
    ]


def _build_tree(lock: Lock, model: Model, obtain: Obtain, core: Path, folder: Path, report: Report) -> None:
    inside = {package.name for package in lock.sets["core"]}
    packages = [package for package in lock.sets["full"] if package.name not in inside]
    users = _users(model, core=True) + _users(model, core=False)
    config = {
        "users": users, "modules": _modules(model), "exclude": _excluded(model, core=False),
        "builds": [f"recipes/{recipe.name}/{recipe.build}" for recipe in model.recipes if recipe.build],
        "omitted": [omitted_stanza(name) for name in lock.wanted.get(OMITTED, ())],
    }  # fmt: skip
    with work_folder() as work:
        _pack_repository(packages, obtain(packages), config, lock, work / "packages.tar", _builds(model))
        _mmdebstrap(
            lock,
            work,
            folder / "tree.tar",
            core / "core.tar",
            report,
            "--variant=custom",
            "--skip=update,cleanup/mmdebstrap",
            f'--setup-hook={_FROM.format(99)} tar -x --numeric-owner -C "$1" && mkdir -p "$1/dev"',
            f"--setup-hook={_UNPACK}",
            f"--customize-hook={_STAGE.format(stage='prepare')}",
            *(
                [f"--customize-hook={_INSTALL.format(names=' '.join(package.name for package in packages))}"]
                if packages
                else []
            ),
            f"--customize-hook={_STAGE.format(stage='builds')}",
            f"--customize-hook={_STAGE.format(stage='finish')}",
            f'--customize-hook=rm -r "$1/{_PLACE}"',
        )


# Hooks get the chroot as $1. Descriptor 98 is the packages' tar, 99 the core's: the namespace's user may not be able to
# open what belongs to the builder's user. Low numbers are mmdebstrap's: it hands one of its own to a sh that knows only
# those below 10, as plain sh does, so bash reads these.
_FROM = "bash -c 'exec \"$@\" <&{}' bash"
_UNPACK = (
    f'mkdir "$1/{_PLACE}" && {_FROM.format(98)} tar -x --no-same-owner -C "$1/{_PLACE}" && '
    f'echo "deb [trusted=yes] file:$1/{_PLACE} ./" > "$1/etc/apt/sources.list"'
)
_STAGE = f'/usr/bin/python3 -I "$1/{_PLACE}/stage.py" {{stage}} "$1"'
_INSTALL = (
    'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && apt-get --quiet=2 update && '
    "apt-get --quiet=2 --yes -o Dir::Bin::dpkg=env -o DPkg::Options::=--unset=TMPDIR -o DPkg::Options::=dpkg "
    '-o DPkg::Chroot-Directory="$1" -o DPkg::Use-Pty=false install {names} >&2'
)


# The shell ends everything in its session when the builder does, even by SIGKILL.
_GUARD = """\
umask 022
trap 'kill -KILL 0' TERM
"$@" 98<"$SAMEPAGE_PACKAGES" 99<"$SAMEPAGE_CORE" >"$SAMEPAGE_OUT" &
wait "$!"
"""


def _mmdebstrap(lock: Lock, work: Path, out: Path, core: Path | None, report: Report, *arguments: str) -> None:
    # root's mmdebstrap mounts into the host's namespace and outlives its parent: it gets namespaces that die with us
    root = os.geteuid() == 0
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"] if root else []
    mode = "root" if root else "unshare"
    skip = f"--skip=check/empty,check/signed-by,cleanup/apt{',output/dev' if core is None else ''}"
    source = f"deb [trusted=yes] file:/{_PLACE} ./"
    argv = [
        *apart,
        "mmdebstrap",
        "--verbose",
        f"--mode={mode}",
        "--format=tar",
        skip,
        *arguments,
        lock.suite,
        "-",
        source,
    ]
    keep = ("PATH", "HOME", "USER", "LOGNAME")
    env = {name: os.environ[name] for name in keep if name in os.environ} | {
        "SOURCE_DATE_EPOCH": str(lock.epoch),
        "TMPDIR": str(work),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "SAMEPAGE_PACKAGES": str(work / "packages.tar"),
        "SAMEPAGE_CORE": str(core or os.devnull),
        "SAMEPAGE_OUT": str(out),
    }
    lines: list[str] = []
    configured = 0

    def on_line(line: str) -> None:
        nonlocal configured
        lines.append(line)
        if line.startswith("Setting up "):
            configured += 1
            report(configured)

    status = stream(
        ["setpriv", "--pdeathsig", "TERM", "bash", "-c", _GUARD, "bash", *argv],
        env=env,
        cwd=work,
        check=False,
        on_line=on_line,
    )
    if status != 0:
        _explain("\n".join(lines), status, lock.suite)


def _explain(output: str, status: int, suite: str) -> None:
    """Raise for a failed mmdebstrap: faults that the stage scripts named, what the host lacks, or the log's tail."""
    faults = re.findall(r"^fault: (.*)$", output, re.MULTILINE)
    if faults:
        raise ApplianceError(
            "the packages break a promise of the base layer:\n  " + "\n  ".join(faults),
            hint="correct the recipe that brings the package: its users and groups stand, with numbers, under users",
        )
    if re.search(r"newuidmap|subuid|unshare|user namespace", output) and "installing essential" not in output:
        raise HostError(
            "this host lets its users make no user namespace:\n" + _tail(output),
            hint="run ./build.py doctor for the command that allows it, or build as root",
        )
    if "No space left on device" in output:
        raise HostError(
            "the disk is full:\n" + _tail(output),
            hint="free some space with ./build.py clean, or set TMPDIR to a roomier folder",
        )
    raise CommandError(
        f"mmdebstrap of {suite} ended with status {status}\n{_tail(output)}",
        hint="the package named above does not install; take today's versions with ./build.py lock --update",
    )


def _tail(output: str) -> str:
    return "\n".join("  | " + line for line in output.strip().splitlines()[-25:])


def _pack_repository(
    packages: Sequence[Package],
    files: Mapping[str, Path],
    config: Mapping[str, object],
    lock: Lock,
    out: Path,
    more: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """A tar with the packages as a local apt repository, the stage scripts, their configuration, and `more` files."""
    index = local_index(packages, files, out.parent)
    release = f"Suite: {lock.suite}\nCodename: {lock.suite}\n"
    texts = {"Packages": index, "Release": release, "config.json": json.dumps({**config, "epoch": lock.epoch})}
    scripts = {file.name: file for file in SCRIPTS.iterdir() if file.is_file()}
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        for package in packages:
            tar.add(files[package.sha256], file_name(package), filter=_plain)
        for name, file in sorted({**scripts, **more}.items()):
            tar.add(file.resolve(), name, filter=_plain)
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Readable for whoever the namespace's root is; what is executable stays so."""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member
