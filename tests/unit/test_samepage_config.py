"""The product's settings as the recipe renders them, time zones and mails."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from samepage.config import ConfigError, Settings, running_release
from samepage.mail import UnknownMail, build
from samepage.timezones import detect

from appliance.errors import Faults
from appliance.layout import load_layout
from appliance.recipes import load_recipes
from appliance.render import render

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rendered() -> str:
    faults = Faults()
    model = load_layout(PROJECT, "private-cloud", load_recipes(PROJECT, faults), faults, "1.0")
    assert model is not None, faults.found
    tree = render(model, model.nodes[0])
    return next(one.content.decode() for one in tree.config if one.path == "/etc/samepage/samepage.json")


def test_the_rendered_settings_are_complete(rendered: str, tmp_path: Path) -> None:
    file = tmp_path / "samepage.json"
    file.write_text(rendered)
    settings = Settings.load(file)
    assert settings.listen_socket == "/run/samepage-app/api.sock"
    assert settings.listen_port == 0, "on one node nothing but the socket is served"
    assert settings.database_host == "/run/postgresql"
    assert settings.valkey_socket == "/run/valkey/valkey.sock"
    assert (settings.smtp_host, settings.smtp_port) == ("127.0.0.1", 25)
    assert settings.calls_file_bytes * (settings.calls_files + 1) <= 64 * 1024 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_size": "8"}, "pool_size must be int"),
        ({"pool_size": True}, "pool_size must be int"),
        ({"colour": 1}, "colour is not known"),
        ({"node": None}, "node must be str"),
    ],
)
def test_wrong_settings_are_named(rendered: str, tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "samepage.json"
    file.write_text(json.dumps({**json.loads(rendered), **change}))
    with pytest.raises(ConfigError, match=message):
        Settings.load(file)


def test_missing_settings_are_named(rendered: str, tmp_path: Path) -> None:
    file = tmp_path / "samepage.json"
    values = json.loads(rendered)
    del values["mail_from"]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="mail_from is missing"):
        Settings.load(file)
    with pytest.raises(ConfigError, match=r"no\.json"):
        Settings.load(tmp_path / "no.json")
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"samepage\.json"):
        Settings.load(file)


def test_the_running_release(tmp_path: Path) -> None:
    file = tmp_path / "release.json"
    assert running_release(str(file)) == "unknown"
    file.write_text('{"version": "1.2.3"}')
    assert running_release(str(file)) == "1.2.3"


@pytest.mark.parametrize(
    ("zone", "january", "july", "found"),
    [
        ("Europe/Prague", 0, 0, "Europe/Prague"),
        ("", 60, 120, "Europe/Prague"),
        ("", -300, -240, "America/New_York"),
        ("", -420, -420, "America/Phoenix"),
        ("", 330, 330, "Asia/Kolkata"),
        ("", 660, 600, "Australia/Sydney"),
        ("No/Where", 540, 540, "Asia/Tokyo"),
        ("../../etc/passwd", 0, 0, "UTC"),
        ("/etc/localtime", 1, 2, "UTC"),
        ("Europe", 1, 2, "UTC"),
        ("\x00", 0, 60, "Europe/London"),
    ],
)
def test_time_zones(zone: str, january: int, july: int, found: str) -> None:
    assert detect(zone, january, july) == found


MOMENT = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
PAYLOAD = {"to": "ann@example.com", "name": "Änn O'Neil, PhD", "from_name": "Bob", "link": "https://x/i#t", "days": 7}


def test_the_invitation() -> None:
    mail = build("invitation", PAYLOAD, sender="samepage@node", message_id="<job-1@node>", at=MOMENT)
    assert mail["To"].addresses[0].addr_spec == "ann@example.com"
    assert mail["To"].addresses[0].display_name == "Änn O'Neil, PhD"
    assert mail["Message-ID"] == "<job-1@node>"
    assert mail["Date"] == "Wed, 06 May 2026 07:08:09 +0000"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert "https://x/i#t" in mail.get_content().splitlines()
    assert mail.as_bytes()


def test_names_cannot_add_headers_or_fields() -> None:
    forged = PAYLOAD | {"from_name": "B\nBcc: eve@example.com"}
    with pytest.raises(ValueError, match="linefeed"):
        build("invitation", forged, sender="s@n", message_id="<1@n>", at=MOMENT)
    mail = build("invitation", PAYLOAD | {"name": "{link} {0}"}, sender="s@n", message_id="<1@n>", at=MOMENT)
    assert "Hello {link} {0}," in mail.get_content()


def test_an_unknown_kind_of_mail_is_refused() -> None:
    with pytest.raises(UnknownMail, match="no mail of kind newsletter"):
        build("newsletter", {}, sender="s@n", message_id="<1@n>", at=MOMENT)
