"""The settings that the recipe renders to /etc/samepage/samepage.json, and the release that is running."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/samepage/samepage.json")
SHARE = Path("/opt/samepage/share/samepage")


class ConfigError(Exception):
    """The settings cannot be used. The message is for the operator."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`listen_port` is 0 unless other nodes may connect; `*_socket` is empty when the service is on another node."""

    node: str
    listen_socket: str
    listen_port: int
    database_host: str
    database_port: int
    database_name: str
    database_user: str
    pool_size: int
    valkey_socket: str
    valkey_host: str
    valkey_port: int
    smtp_host: str
    smtp_port: int
    mail_from: str
    public_url: str
    release_file: str
    state_folder: str
    runtime_folder: str
    calls_folder: str
    calls_file_bytes: int
    calls_files: int
    console_group: str
    graceful_seconds: int

    @classmethod
    def load(cls, file: Path = SETTINGS) -> Settings:
        """Raises ConfigError for a missing, unknown or wrongly typed key."""
        try:
            given: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: {error}") from error
        fields = {name: str(kind) for name, kind in cls.__annotations__.items()}
        for name in fields.keys() ^ given.keys():
            raise ConfigError(f"{file}: {name} is {'not known' if name in given else 'missing'}")
        for name, kind in fields.items():
            if type(given[name]).__name__ != kind:
                raise ConfigError(f"{file}: {name} must be {kind}")
        return cls(**given)

    @property
    def first_login_kept(self) -> Path:
        """Where the first one-time password lies until it has been changed; it survives a reboot."""
        return Path(self.state_folder) / "first-login.json"

    @property
    def first_login_shown(self) -> Path:
        """The copy that the console may read."""
        return Path(self.runtime_folder) / "first-login.json"


def running_release(file: str) -> str:
    """The version in a release manifest; "unknown" outside an appliance."""
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return "unknown"
