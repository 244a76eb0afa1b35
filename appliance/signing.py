"""The builder's own signing keys, kept outside the project, in the user's configuration.

`signing.key` signs what others install: it is made on purpose, and its public half goes into the releases. Where there
is none, `personal.key` signs what its owner pushes to nodes of their own; it is made when it is first needed.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from appliance.errors import ApplianceError, HostError
from appliance.node.keys import PUBLIC, SECRET, KeyFileError, Signer, dump_key, parse_key

VARIABLE = "SAMEPAGE_SIGNING_KEY"
TRUSTED = "recipes/node-tools/files/etc/samepage/keys"
"""Folder of the public keys that every release trusts, relative to the project."""


def default_place() -> Path:
    """Where the secret key is looked for: SAMEPAGE_SIGNING_KEY, else the user's configuration."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return _folder() / "signing.key"


def personal_place() -> Path:
    """Where the key of this user's own nodes is kept."""
    return _folder() / "personal.key"


def _folder() -> Path:
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return config / "samepage-appliance"


def load(place: Path | None = None) -> Signer:
    """The signing key. Raises ApplianceError where there is none, or others may read it."""
    place = place or default_place()
    try:
        if place.stat().st_mode & 0o077:
            raise ApplianceError(f"others may read the signing key {place}", hint=f"chmod 600 {place}")
        return Signer(parse_key(place.read_bytes(), SECRET))
    except FileNotFoundError as error:
        hint = f"make one with ./build.py key new NAME, or name another with --key or {VARIABLE}"
        raise ApplianceError(f"there is no signing key {place}", hint=hint) from error
    except KeyFileError as error:
        raise ApplianceError(f"{place}: {error}", hint="name another with --key") from error


def find() -> Signer | None:
    """The user's signing key, else the personal one, if there is any. Raises ApplianceError where others may read it,
    or where SAMEPAGE_SIGNING_KEY names none."""
    if os.environ.get(VARIABLE) or default_place().exists():
        return load()
    return load(personal_place()) if personal_place().exists() else None


def ensure(notify: Callable[[str], None]) -> Signer:
    """Like `find`, but makes a personal key where there is none, and says so. Raises ApplianceError."""
    found = find()
    if found is None:
        place = personal_place()
        try:
            _write(place, dump_key(secrets.token_bytes(32), SECRET, _user()))
        except FileExistsError:
            pass  # another builder made it just now
        except OSError as error:
            hint = f"name a key in another place with {VARIABLE}"
            raise HostError(f"cannot write the signing key {place}: {error.strerror}", hint=hint) from error
        else:
            notify(f"made a personal signing key, {place}; only nodes that you start or push to trust it")
        found = load(place)
    return found


def public_line(signer: Signer) -> bytes:
    """The public half as the one line of a .pub file, which names the user."""
    return dump_key(signer.public, PUBLIC, _user())


def _user() -> str:
    try:
        return re.sub(r"[^A-Za-z0-9._-]", "_", getpass.getuser())
    except (KeyError, OSError):  # a user without a name, as in containers
        return "builder"


def create(name: str, project: Path, place: Path | None = None) -> tuple[Signer, Path]:
    """Make a secret key, and write its public half into the project; returns it with the public file.

    Raises ApplianceError where either file is there already.
    """
    place = place or default_place()
    public = project / TRUSTED / f"{name}.pub"
    for path in (place, public):
        if path.exists():
            raise ApplianceError(f"{path} is there already", hint="remove it first if it is not needed any more")
    signer = Signer(secrets.token_bytes(32))
    _write(place, dump_key(signer.secret, SECRET, name))
    public.parent.mkdir(parents=True, exist_ok=True)
    public.write_bytes(dump_key(signer.public, PUBLIC, name))
    return signer, public


def _write(place: Path, content: bytes) -> None:
    """Write a secret that only the user may read, whole or not at all. Raises FileExistsError where it is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, place)
    finally:
        Path(partial).unlink()
