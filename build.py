#!/usr/bin/env python3
"""Sets up what the builder needs, once, and hands over to the command line in appliance.cli.

Needs python3 only. Installs missing host packages through apt (listed in appliance/hostsetup.py) and the pinned Python
requirements into .venv; when nothing of that changed, it goes straight on.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - pathlib costs more than the rest of the fast path
VENV = os.path.join(ROOT, ".venv")  # noqa: PTH118 - as above
PYTHON = os.path.join(VENV, "bin", "python")  # noqa: PTH118 - as above
INPUTS = ("requirements.txt", "requirements-dev.txt", "appliance/hostsetup.py")
OPTIONS_WITH_VALUE = frozenset({"-C", "--project", "--progress", "--layout"})
SET_OF_VERB = {
    "iso": "build", "disk": "build", "lock": "build", "sbom": "build", "up": "boot", "test": "test", "bench": "test",
}  # fmt: skip


def wanted_set(arguments: list[str]) -> str:
    """Which set of host packages the verb on the command line needs."""
    if "--help" in arguments or any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ):
        return "python"
    words = iter(arguments)
    for word in words:
        if word in OPTIONS_WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return SET_OF_VERB.get(word, "python")
    return "python"


def state() -> str:
    """Everything the set-up depends on, as text."""
    parts = [sys.version]
    for name in INPUTS:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:  # noqa: PTH118, PTH123 - as above
            parts.append(file.read())
    return "\n".join(parts)


def ready(set_name: str) -> bool:
    """Whether the set-up was done for this very state."""
    try:
        with open(os.path.join(VENV, f"ready-{set_name}"), encoding="utf-8") as file:  # noqa: PTH118, PTH123 - as above
            return file.read() == state() and os.access(PYTHON, os.X_OK)
    except OSError:
        return False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> None:
    say(f"error: {text}")
    raise SystemExit(3)


def set_up(set_name: str) -> None:
    """Installs what is missing. Only one process at a time; the others wait and find it done."""
    import fcntl
    from pathlib import Path

    from appliance import hostsetup

    with Path(ROOT, ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready(set_name):
            return
        absent = hostsetup.missing(set_name)
        if absent:
            say("installing Debian packages that the builder needs:")
            for package in absent:
                say(f"  {package.name}: {package.purpose}")
            optional = {package.name for name in hostsetup.OPTIONAL_SETS for package in hostsetup.SETS[name]}
            for names in (
                [package.name for package in absent if package.name not in optional],
                [package.name for package in absent if package.name in optional],
            ):
                error = hostsetup.install(names) if names else ""
                if error and names[0] in optional:
                    say(f"warning: could not install {' '.join(names)}; tests that need them will be skipped\n{error}")
                elif error:
                    fail(
                        f"could not install {' '.join(names)}\n{error}\n  hint: run yourself: {hostsetup.advice(names)}"
                    )
        prepare_venv(hostsetup, with_dev=set_name == "test")
        Path(VENV, f"ready-{set_name}").write_text(state(), encoding="utf-8")


def prepare_venv(hostsetup, with_dev: bool) -> None:  # type: ignore[no-untyped-def]  # a module
    """Makes .venv hold exactly the pinned requirements."""
    import subprocess
    from pathlib import Path

    packages = Path(VENV, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    if not (Path(PYTHON).exists() and (packages / "pip").is_dir()):
        say("making the virtual environment .venv")
        try:
            import ensurepip  # noqa: F401 - Debian ships it apart, in python3-venv
        except ImportError:
            error = hostsetup.install(["python3-venv"])
            if error:
                advice = hostsetup.advice(["python3-venv"])
                fail(f"could not install python3-venv\n{error}\n  hint: run yourself: {advice}")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], stdout=2)
        if made.returncode != 0:
            fail("could not make the virtual environment .venv\n  hint: remove .venv and try again")
    with_dev = with_dev or Path(VENV, "ready-test").exists()  # do not leave old versions beside new ones
    files = ["requirements.txt", *(["requirements-dev.txt"] if with_dev else [])]
    say(f"installing the pinned requirements of {' and '.join(files)} into .venv")
    options = [word for name in files for word in ("-r", str(Path(ROOT, name)))]
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", *options]
    if subprocess.run(pip, stdout=2).returncode != 0:
        hint = "check the network, or set PIP_INDEX_URL to an index you can reach"
        fail(f"pip could not install the requirements\n  hint: {hint}")
    (packages / "samepage-appliance.pth").write_text(ROOT + "\n", encoding="utf-8")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - it is this check that says so
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}\n  hint: use Debian 12 or newer")
    set_name = wanted_set(sys.argv[1:])
    if not ready(set_name):
        set_up(set_name)
    os.execv(PYTHON, [PYTHON, "-P", "-m", "appliance", *sys.argv[1:]])


if __name__ == "__main__":
    main()
