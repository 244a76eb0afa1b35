"""Runs on the host's Python as root of the build's namespace, beside the chroot whose path is the second argument.

    stage.py prepare ROOT    before packages are installed: dpkg's rules, fixed users, no secrets made by packages
    stage.py core ROOT       after the core: kernel modules made plain
    stage.py builds ROOT     after all packages: the recipes' own steps
    stage.py finish ROOT     at the end: everything that must not be in an immutable, reproducible layer leaves or moves

Standard library only, and no imports from the builder: the namespace's user may not be able to read its folder. Reads
config.json beside itself: {"users": [{name, uid, home, groups, group_only}], "modules": [names], "exclude": [globs],
"builds": [paths beside this file], "omitted": [dpkg stanzas], "epoch": seconds}. What it can name ends with status 3
and one line per fault on stderr.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Config = dict[str, Any]

SYSTEM_IDS = range(101, 1000)

# Made by maintainer scripts unless they exist already: a secret, or different in every build. Removed again at the end.
DECOYS = (
    "etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_ecdsa_key", "etc/ssh/ssh_host_ed25519_key",
)  # fmt: skip

# Answers for packages that would write this host's name into their configuration, which the recipe writes anyway.
ANSWERS = "postfix postfix/main_mailer_type select No configuration\n"

# Left by the tools that built the tree, or different in every build.
LEFTOVERS = (
    "boot/*", "initrd.img*", "vmlinuz*", "etc/hostname", "etc/aliases.db", "etc/machine-id", "etc/.pwd.lock",
    "etc/*-", "etc/apt", "etc/dpkg", "etc/kernel/postinst.d", "etc/initramfs-tools", "etc/ssh/ssh_host_*",
    "etc/ssl/private/ssl-cert-snakeoil.key", "etc/ssl/certs/ssl-cert-snakeoil.pem", "usr/share/doc-base",
    "usr/lib/udev/hwdb.d", "var/cache/*", "var/log/*", "var/backups/*", "var/lib/apt", "var/lib/ucf", "var/lib/pam",
    "var/lib/initramfs-tools", "var/lib/systemd/deb-systemd-*", "var/lib/systemd/catalog", "var/lib/dbus",
    "var/lib/python", "var/tmp/*", "var/lib/polkit-1", "var/lib/misc/*", "var/lib/shells.state", "var/lib/vim",
    "var/lib/man-db", "var/mail/*",
)  # fmt: skip

# Programs that raise privileges and may stay; any other is a surprise that a person must look at.
SETUID = {
    "usr/bin/chage", "usr/bin/chfn", "usr/bin/chsh", "usr/bin/expiry", "usr/bin/gpasswd", "usr/bin/mount",
    "usr/bin/newgrp", "usr/bin/passwd", "usr/bin/ssh-agent", "usr/bin/su", "usr/bin/umount",
    "usr/lib/dbus-1.0/dbus-daemon-launch-helper", "usr/lib/openssh/ssh-keysign", "usr/lib/postfix/sbin/postdrop",
    "usr/sbin/postdrop", "usr/sbin/postqueue", "usr/sbin/postlog", "usr/sbin/unix_chkpwd", "usr/bin/wall",
    "usr/bin/write", "usr/bin/crontab",
}  # fmt: skip

DPKG_STATE = "usr/lib/sysimage/dpkg"


def main() -> int:
    """Run the stage named on the command line."""
    stage, root = sys.argv[1], Path(sys.argv[2])
    config = json.loads(Path(__file__).with_name("config.json").read_text())
    faults = {"prepare": prepare, "core": core, "builds": builds, "finish": finish}[stage](root, config)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 3 if faults else 0


# --- before the packages ---------------------------------------------------------------------------------------------


def prepare(root: Path, config: Config) -> list[str]:
    """Set the rules for dpkg and the maintainer scripts."""
    rules = Path(__file__).with_name("dpkg.cfg").read_text()
    rules += "".join(
        f"path-include=/usr/lib/modules/*/{pattern}\n"
        for name in config["modules"]
        for pattern in _module_patterns(name)
    )
    rules += "".join(f"path-exclude={glob}\npath-exclude={glob}/*\n" for glob in config["exclude"])
    write(root / "etc/dpkg/dpkg.cfg.d/90-samepage", rules)
    register(root, config["omitted"])
    write(root / "etc/postgresql-common/createcluster.conf", "create_main_cluster = false\nstart_conf = manual\n")
    for name in DECOYS:
        if not (root / name).exists():
            write(root / name, "")
    add_users(root, config["users"])
    subprocess.run(["chroot", root, "debconf-set-selections"], input=ANSWERS.encode(), check=True)
    return []


def register(root: Path, stanzas: list[str]) -> None:
    """Let dpkg take packages that are left out for installed. They have no files."""
    state = root / "var/lib/dpkg"
    with (state / "status").open("a") as status:
        status.writelines("\n" + stanza for stanza in stanzas)
    for stanza in stanzas:
        name, architecture = re.findall(r"^(?:Package|Architecture): (.*)$", stanza, re.MULTILINE)
        write(state / f"info/{name}:{architecture}.list", "/.\n")


def _module_patterns(name: str) -> list[str]:
    """dpkg patterns for a module or a folder of modules, as a recipe names it: kernel/drivers/net/can or .../can.ko"""
    name = name.strip("/").removesuffix(".xz").removesuffix(".ko")
    return [f"{name}/*", f"{name}.ko*"]


def add_users(root: Path, users: list[Config]) -> None:
    """Add users and groups with their fixed numbers; one that exists keeps its entry and gains memberships."""
    files = {name: read_table(root / "etc" / name) for name in ("passwd", "group", "shadow", "gshadow")}
    for user in users:
        name, number = user["name"], str(user["uid"])
        files["group"].setdefault(name, [name, "x", number, ""])
        files["gshadow"].setdefault(name, [name, "!", "", ""])
        if not user["group_only"]:
            files["passwd"].setdefault(name, [name, "x", number, number, "", user["home"], "/usr/sbin/nologin"])
            files["shadow"].setdefault(name, [name, "!*", "", "", "", "", "", "", ""])
    for user in users:
        for group in user["groups"]:
            for table in ("group", "gshadow"):
                if group in files[table]:  # a package may bring it later: finish comes here again
                    members = [member for member in files[table][group][3].split(",") if member]
                    files[table][group][3] = ",".join(dict.fromkeys([*members, user["name"]]))
    for name, rows in files.items():
        write(root / "etc" / name, "".join(":".join(row) + "\n" for row in rows.values()))


def read_table(file: Path) -> dict[str, list[str]]:
    """passwd, group and their shadows by name."""
    rows = [line.split(":") for line in file.read_text().splitlines() if line] if file.exists() else []
    return {row[0]: row for row in rows}


def write(file: Path, text: str) -> None:
    """Write a file; one that exists keeps its mode and owner."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


# --- after the core --------------------------------------------------------------------------------------------------


def core(root: Path, config: Config) -> list[str]:
    """Make kernel modules plain: they compress better inside the layer, and deltas between kernels stay small."""
    del config
    packed = sorted(root.glob("usr/lib/modules/*/kernel/**/*.ko.xz"))
    with ProcessPoolExecutor() as pool:
        list(pool.map(unpack_module, packed, chunksize=32))
    for kernel in sorted((root / "usr/lib/modules").iterdir()):
        subprocess.run(["chroot", root, "depmod", kernel.name], check=True)
    return []


def builds(root: Path, config: Config) -> list[str]:
    """Run the recipes' own build steps inside the chroot. One that fails is named."""
    here = Path(__file__).parent
    faults = []
    for name in config["builds"]:
        done = subprocess.run(["chroot", root, f"/{here.name}/{name}"], cwd="/")
        if done.returncode != 0:
            faults.append(f"the build step {name} ended with status {done.returncode}")
    return faults


def unpack_module(file: Path) -> None:
    """Replace x.ko.xz by x.ko, with its time."""
    status = file.stat()
    plain = file.with_suffix("")
    plain.write_bytes(lzma.decompress(file.read_bytes()))
    os.utime(plain, ns=(status.st_atime_ns, status.st_mtime_ns))
    file.unlink()


# --- the end ---------------------------------------------------------------------------------------------------------


def finish(root: Path, config: Config) -> list[str]:
    """Turn an installed tree into an immutable one."""
    add_users(root, config["users"])
    tidy_accounts(root)
    for name in (*LEFTOVERS, *(glob.lstrip("/") for glob in config["exclude"])):
        for path in root.glob(name):
            remove(path)
    for link in (root / "etc/ssl/certs").glob("*.0"):  # called by a hash of the host's name
        if link.is_symlink() and link.readlink().name == "ssl-cert-snakeoil.pem":
            link.unlink()
    documents(root)
    move_dpkg(root)
    links(root)
    faults = undeclared(root, config["users"]) + surprises(root)
    skeleton(root)
    for path in [root / "etc", *(root / "etc").rglob("*")]:  # some tell when a maintainer script ran
        os.utime(path, (config["epoch"], config["epoch"]), follow_symlinks=False)
    return faults


def tidy_accounts(root: Path) -> None:
    """Forget when a password was last changed: that is the day of the build."""
    table = read_table(root / "etc/shadow")
    for row in table.values():
        row[2] = ""
    write(root / "etc/shadow", "".join(":".join(row) + "\n" for row in table.values()))


def documents(root: Path) -> None:
    """Remove what dpkg's rules exclude but mmdebstrap had extracted before they were there."""
    for folder in (
        "man",
        "info",
        "bug",
        "lintian",
        "locale",
        "i18n",
        "bash-completion",
        "zsh",
        "fish",
        "vim",
        "pixmaps",
    ):
        remove(root / "usr/share" / folder)
    for path in sorted((root / "usr/share/doc").rglob("*"), reverse=True):
        if path.name == "copyright":
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink()


def move_dpkg(root: Path) -> None:
    """dpkg's database describes the layer, so it lies in it; a link leads there from /var."""
    state = root / DPKG_STATE
    state.parent.mkdir(parents=True, exist_ok=True)
    remove(state)
    shutil.move(root / "var/lib/dpkg", state)
    for name in (
        "lock",
        "lock-frontend",
        "triggers/Lock",
        "status-old",
        "available-old",
        "diversions-old",
        "statoverride-old",
        "available",
    ):
        remove(state / name)
    remove(state / "updates")
    remove(state / "parts")
    status = state / "status"
    stanzas = sorted(stanza.strip("\n") for stanza in status.read_text().split("\n\n") if stanza.strip())
    status.write_text("\n\n".join(stanzas) + "\n")


def links(root: Path) -> None:
    """Names that must lead to a writable place, or to another layer; mount points."""
    (root / "usr/share/factory/var").mkdir(parents=True, exist_ok=True)
    remove(root / "usr/share/factory/var/roothome")
    shutil.copytree(root / "root", root / "usr/share/factory/var/roothome", symlinks=True)
    targets = {
        "root": "var/roothome",
        "usr/local/bin": "/opt/samepage/bin",
        "usr/local/sbin": "/opt/samepage/bin",
        "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    }
    for name, target in targets.items():
        remove(root / name)
        (root / name).symlink_to(target)
    for name in (
        "state", "opt/samepage", "usr/lib/samepage/old-root", "boot", "dev", "proc", "sys", "run", "tmp", "home", "srv",
        "mnt", "media",
    ):  # fmt: skip
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    write(root / "etc/machine-id", "")


def undeclared(root: Path, users: list[Config]) -> list[str]:
    """Users and groups whose number is not fixed by a recipe: data on a node outlives the layer."""
    declared = {user["name"]: user["uid"] for user in users}
    found = []
    for table, kind in (("passwd", "user"), ("group", "group")):
        for name, row in read_table(root / "etc" / table).items():
            number = int(row[2])
            if name in declared and number != declared[name]:
                found.append(
                    f"the {kind} {name} has number {number} in Debian, not {declared[name]} as its recipe says"
                )
            elif name not in declared and number in SYSTEM_IDS:
                found.append(f"no recipe declares the {kind} {name}, which a package made as number {number}")
    return found


def surprises(root: Path) -> list[str]:
    """Programs that raise privileges by mode or by file capabilities and are not known to."""
    found = []
    for parent, _, files in os.walk(root / "usr"):
        for path in (Path(parent, name) for name in files):
            status = path.lstat()
            inside = path.relative_to(root)
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_mode & (stat.S_ISUID | stat.S_ISGID) and str(inside) not in SETUID:
                mode = f"{stat.S_IMODE(status.st_mode):04o}"
                found.append(f"/{inside} raises privileges (mode {mode}) and is not known to")
            elif status.st_mode & 0o111 and "security.capability" in os.listxattr(path):
                found.append(f"/{inside} raises privileges (file capabilities), which a layer does not carry")
    return found


def skeleton(root: Path) -> None:
    """Replace /var by tmpfiles.d lines that make it again on an empty one; files with content come from the factory."""
    names = {
        kind: {row[2]: name for name, row in read_table(root / "etc" / kind).items()} for kind in ("passwd", "group")
    }
    known = tmpfiles_paths(root)
    factory = root / "usr/share/factory/var"
    lines = []
    for parent, folders, files in os.walk(root / "var"):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            inside = "/" + str(path.relative_to(root))
            status = path.lstat()
            mode, owner = f"{stat.S_IMODE(status.st_mode):04o}", names["passwd"][str(status.st_uid)]
            group = names["group"][str(status.st_gid)]
            if inside in known:
                continue
            if path.is_symlink():
                lines.append(f"L {inside} - - - - {path.readlink()}")
            elif path.is_dir():
                lines.append(f"d {inside} {mode} {owner} {group} -")
            elif status.st_size == 0:
                lines.append(f"f {inside} {mode} {owner} {group} -")
            else:
                kept = factory / path.relative_to(root / "var")
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, kept)
                lines.append(f"C {inside} {mode} {owner} {group} -")
    lines.append("d /var/roothome 0700 root root -")
    for path in sorted((factory / "roothome").rglob("*")):
        inside = f"/var/roothome/{path.relative_to(factory / 'roothome')}"
        lines.append(f"{'d' if path.is_dir() else 'C'} {inside} {stat.S_IMODE(path.stat().st_mode):04o} root root -")
    lines.append(f"L /var/lib/dpkg - - - - ../../{DPKG_STATE}")
    write(root / "usr/lib/tmpfiles.d/samepage-var.conf", "\n".join(lines) + "\n")
    for path in (root / "var").iterdir():
        remove(path)


def tmpfiles_paths(root: Path) -> set[str]:
    """Paths that a package's own tmpfiles.d makes already; a second line for one is a warning at every boot."""
    found = set()
    for file in (root / "usr/lib/tmpfiles.d").glob("*.conf"):
        if file.name == "samepage-var.conf":
            continue
        for line in file.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0].rstrip("!+-=~^$?")[:1] in set("dDvqQfFLC") and "%" not in words[1]:
                found.add(words[1].rstrip("/"))
    return found


def remove(path: Path) -> None:
    """Remove a file, link or tree; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
