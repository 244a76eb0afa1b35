"""The host's apt as a library: where Debian's archives are, a private apt that knows only the appliance's suite, and
what apt reads of a local folder with packages.

apt brings what a build needs of a downloader: signature checks, proxies and credentials of the host, parallel fetches.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from appliance.errors import CommandError, HostError
from appliance.model import ARCHITECTURE, Package
from appliance.run import run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MAIN, SECURITY = "debian", "debian-security"

Mirrors = Mapping[str, str]
"""Base URI, without a slash at the end, of each archive ("debian", "debian-security")."""


def find_mirrors(
    suite: str, *, mirror: str = "", security: str = "", environ: Mapping[str, str] = os.environ
) -> Mirrors:
    """Where to get packages from, first found first: the arguments, SAMEPAGE_MIRROR and SAMEPAGE_SECURITY_MIRROR, the
    Debian entries of the host's apt configuration, mmdebstrap's own default for the suite.

    A mirror given for Debian alone leaves the security archive to the other sources. Raises HostError when none knows.
    """
    found = {
        MAIN: mirror or environ.get("SAMEPAGE_MIRROR", ""),
        SECURITY: security or environ.get("SAMEPAGE_SECURITY_MIRROR", ""),
    }
    for source in (_host_mirrors, lambda: _default_mirrors(suite)):
        if all(found.values()):
            break
        for archive, uri in source().items():
            found[archive] = found[archive] or uri
    missing = [archive for archive, uri in found.items() if not uri]
    if missing:
        raise HostError(
            f"no mirror is known for {' and '.join(missing)}",
            hint="name one with --mirror or SAMEPAGE_MIRROR and SAMEPAGE_SECURITY_MIRROR",
        )
    return {archive: uri.rstrip("/") for archive, uri in found.items()}


def _host_mirrors() -> dict[str, str]:
    """Debian's entries of the host's apt; the suite does not matter, an archive holds all of them.

    Entries whose lists were never fetched do not tell their origin; then the address is all there is to go by.
    """
    fetched = _apt_says("indextargets", "--format", "'$(REPO_URI)dists/$(RELEASE)/$(CREATED_BY)/$(ORIGIN)'")
    configured = _apt_says("update", "--print-uris")
    origins = re.findall(r"^'(\S+?)/?dists/(\S+)/Packages/Debian'", fetched, re.MULTILINE)
    addresses = re.findall(r"^'(\S+/debian(?:-security)?)/dists/(\S+)/InRelease'", configured, re.MULTILINE)
    found: dict[str, str] = {}
    for uri, release in (*origins, *addresses):
        found.setdefault(SECURITY if "-security" in release else MAIN, uri)
    return found


def _apt_says(*arguments: str) -> str:
    try:
        return run(["apt-get", *arguments], check=False).stdout.decode()
    except HostError:  # no apt on this host
        return ""


def _default_mirrors(suite: str) -> dict[str, str]:
    """What mmdebstrap would use: it writes its sources into the chroot, where a hook reads them and the run ends."""
    done = run(
        [
            "mmdebstrap",
            "--quiet",
            "--variant=custom",
            "--format=null",
            "--skip=update,download,cleanup",
            '--setup-hook=cat "$1"/etc/apt/sources.list >&2',
            suite,
            os.devnull,
        ],
        check=False,
    )
    found: dict[str, str] = {}
    for line in done.stderr.decode().splitlines():
        words = [word for word in line.split() if not word.startswith("[") and not word.endswith("]")]
        if len(words) > 2 and words[0] == "deb":
            found.setdefault(SECURITY if words[2].endswith("-security") else MAIN, words[1])
    return found


@dataclass(frozen=True, slots=True)
class Apt:
    """An apt with its own lists and an empty dpkg status; it obeys the host's proxies and credentials only."""

    folder: Path
    mirrors: Mirrors

    @property
    def options(self) -> list[str]:
        return ["-c", str(self.folder / "apt.conf")]

    def call(self, program: str, *arguments: str, hint: str = "") -> str:
        """Output of apt-get, apt-cache or apt-helper (full path) with this configuration. Raises CommandError."""
        env = {**os.environ, "LC_ALL": "C.UTF-8"}
        return run([program, *self.options, *arguments], env=env, hint=hint).stdout.decode()

    def pretend(self, stanzas: Iterable[str]) -> None:
        """Let dpkg's status, which is empty otherwise, hold these stanzas."""
        (self.folder / "status").write_text("\n".join(stanzas))

    def release_files(self) -> list[str]:
        """Texts of the release files that `update` fetched, whose signatures apt has checked."""
        return [file.read_text() for file in sorted((self.folder / "lists").glob("*Release"))]


@contextmanager
def private_apt(
    suite: str, mirrors: Mirrors, *, keyring: Path | None = KEYRING, cache: Path | None = None
) -> Iterator[Apt]:
    """A private apt for the suite, its updates and its security archive.

    Its lists stay in `cache`, so that unchanged ones are not fetched again; one user of them at a time, others wait.
    `keyring` None trusts the mirrors without a signature: for the tests' own archives only.
    """
    if keyring is not None and not keyring.is_file():
        raise HostError(
            f"Debian's archive keys are missing ({keyring})", hint="install the package debian-archive-keyring"
        )
    identity = hashlib.sha256(repr((suite, sorted(mirrors.items()), keyring)).encode()).hexdigest()[:16]
    with _folder(cache / "apt" / identity if cache else None) as folder:
        (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "status").write_text("")
        trust = f"signed-by={keyring}" if keyring else "trusted=yes"
        suites = [(MAIN, suite), (MAIN, f"{suite}-updates"), (SECURITY, f"{suite}-security")]
        (folder / "sources.list").write_text(
            "".join(f"deb [{trust}] {mirrors[archive]} {name} main\n" for archive, name in suites)
        )
        (folder / "apt.conf").write_text(_CONFIGURATION.format(folder=folder, architecture=ARCHITECTURE))
        yield Apt(folder, mirrors)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The kept folder, locked, or one that is removed at the end."""
    if kept is None:
        with TemporaryDirectory(prefix="samepage-apt-") as name:
            yield Path(name)
        return
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield kept


def update(apt: Apt) -> None:
    """Fetch the lists and check their signatures. Raises CommandError also where apt would only warn."""
    apt.call(
        "apt-get",
        "update",
        "--error-on=any",
        hint="name another mirror with --mirror; proxies and credentials come from the host's apt configuration",
    )
    if not apt.release_files():
        raise CommandError("apt fetched no release file", hint="name another mirror with --mirror")


# ForceEssential: apt counts itself as essential, and the appliance has no use for it
_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear APT::NeverAutoRemove;
#clear Acquire::IndexTargets::deb::Contents-deb;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Retries "3";
pkgCacheGen::ForceEssential ",";
Dir::State "{folder}";
Dir::State::Lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::State::extended_states "{folder}/extended_states";
Dir::Cache "{folder}";
Dir::Cache::archives "{folder}/archives";
Dir::Cache::pkgcache "{folder}/pkgcache.bin";
Dir::Cache::srcpkgcache "{folder}/srcpkgcache.bin";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Log "{folder}";
"""


def file_name(package: Package) -> str:
    """What the package's file is called, in its archive and in a local folder."""
    return package.path.rpartition("/")[2]


def local_index(packages: Iterable[Package], files: Mapping[str, Path], work: Path) -> str:
    """The Packages file (see apt-ftparchive(1)) of a folder with these packages, each under its `file_name`.

    `files` are theirs by sha256. dpkg-deb unpacks below `work`, and leaves that behind when it is killed.
    """
    scratch = {**os.environ, "TMPDIR": str(work)}

    def stanza(package: Package) -> str:
        control = run(["dpkg-deb", "--field", files[package.sha256]], env=scratch).stdout.decode().rstrip()
        return f"{control}\nFilename: ./{file_name(package)}\nSize: {package.size}\nSHA256: {package.sha256}\n"

    with ThreadPoolExecutor() as pool:
        return "\n".join(pool.map(stanza, packages))
