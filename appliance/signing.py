"""The builder's own signing key: made once, kept outside the project; its public half goes into the releases."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from appliance.errors import ApplianceError
from appliance.node.keys import PUBLIC, SECRET, KeyFileError, Signer, dump_key, parse_key

VARIABLE = "SAMEPAGE_SIGNING_KEY"
TRUSTED = "recipes/node-tools/files/etc/samepage/keys"
"""Folder of the public keys that every release trusts, relative to the project."""


def default_place() -> Path:
    """Where the secret key is looked for: SAMEPAGE_SIGNING_KEY, else the user's configuration."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return config / "samepage-appliance" / "signing.key"


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
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(dump_key(signer.secret, SECRET, name))
    public.parent.mkdir(parents=True, exist_ok=True)
    public.write_bytes(dump_key(signer.public, PUBLIC, name))
    return signer, public
