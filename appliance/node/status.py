"""What the node tells about itself: gathered once, shown on the console, as a page and as JSON.

The first administrator's password is only ever part of the console's text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from appliance.node import addresses, health

RELEASE_FILE = "/run/samepage/release.json"
MODE_FILE = "/run/samepage/mode"
NODE_FILE = "/etc/samepage/node.json"
LOGIN_FILE = "/run/samepage-app/first-login.json"
HOST_KEY_FILE = os.environ.get("CREDENTIALS_DIRECTORY", "") + "/host-key"  # ssh's public key, by LoadCredential
HEALTH_SOCKET = "/run/samepage-console/health.sock"
HEALTH_SECONDS = 60.0
CACHE_SECONDS = 2.0
WIDTH = 78

Json = dict[str, object]


def read_text(path: str) -> str:
    """The stripped text of a small file; empty when there is none to read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 20).strip()
    except OSError:
        return ""


def read_json(path: str) -> Json:
    """The JSON object in a file; empty when there is none to read."""
    try:
        value = json.loads(read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def fingerprint(public_key: str) -> str:
    """The fingerprint that ssh shows for a public key line, such as `SHA256:...`; empty when it is no key."""
    words = public_key.split()
    try:
        blob = base64.b64decode(words[1], validate=True)
    except (IndexError, binascii.Error):
        return ""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def uptime_seconds() -> float:
    return round(health.seconds_since_boot(), 1)


def node_facts() -> Json:
    """Everything about the node but its health."""
    release, node = read_json(RELEASE_FILE), read_json(NODE_FILE)
    try:
        found = addresses.addresses()
    except OSError:
        found = []
    first = found[0] if found else ""
    bracketed = f"[{first}]" if ":" in first else first
    return {
        "node": node.get("name") or os.uname().nodename,
        "layout": node.get("layout") or release.get("layout") or "",
        "release": release.get("version") or "unknown",
        "mode": read_text(MODE_FILE) or "unknown",
        "addresses": found,
        "url": f"https://{bracketed}/" if first else "",
        "ssh": f"ssh root@{first}" if first else "",
        "host_key": fingerprint(read_text(HOST_KEY_FILE)),
    }


def ask_health(path: str = HEALTH_SOCKET, seconds: float = HEALTH_SECONDS) -> Json:
    """Have the probes run by the service behind the socket, which may ask the service manager. Raises OSError."""
    deadline = time.monotonic() + seconds
    data = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        while part := connection.recv(65536):
            data += part
            connection.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        found = json.loads(data)
        return {name: found[name] for name in ("healthy", "boot_seconds", "recipes", "system")}
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"the health probes answered {data[:80]!r}") from error


class HealthCache:
    """The node's health, probed at most once in `CACHE_SECONDS` however many ask at the same time."""

    def __init__(self, probe: Callable[[], Json] = ask_health) -> None:
        self._probe = probe
        self._lock = threading.Lock()
        self._when = float("-inf")
        self._found: Json = {}
        self.seconds = 0.0  # what the last probing took

    def get(self) -> Json:
        """A fresh enough result in the form of health.json, with the boot's length where that is known."""
        with self._lock:
            started = time.monotonic()
            if started - self._when >= CACHE_SECONDS:
                try:
                    found = self._probe()
                except OSError as error:
                    found = {"healthy": False, "boot_seconds": None, "recipes": {}, "system": [_broken(str(error))]}
                found["boot_seconds"] = read_json(health.HEALTH_FILE).get("boot_seconds")
                self._found, self._when = found, time.monotonic()
                self.seconds = self._when - started
            return self._found


def _broken(detail: str) -> Json:
    return {"name": "health probes", "ok": False, "detail": detail, "ms": 0.0}


def complaints(found: Mapping[str, object]) -> list[str]:
    """`recipe name: detail` of every probe that failed in a health.json."""
    groups: list[tuple[str, object]] = [("node", found.get("system"))]
    recipes = found.get("recipes")
    if isinstance(recipes, dict):
        groups += [(str(name), entry.get("probes")) for name, entry in recipes.items() if isinstance(entry, dict)]
    return [
        f"{name} {probe.get('name')}: {probe.get('detail')}"
        for name, probes in groups if isinstance(probes, list)
        for probe in probes if isinstance(probe, dict) and not probe.get("ok")
    ]


def health_lines(found: Mapping[str, object]) -> list[str]:
    """The health as the console shows it; an empty `found` means that the node is still starting."""
    if not found:
        return ["starting"]
    if found.get("healthy"):
        boot = found.get("boot_seconds")
        return [f"healthy, {boot:.0f} s after the start" if isinstance(boot, (int, float)) else "healthy"]
    bad = complaints(found)
    return ["NOT HEALTHY", *bad[:6], *([f"and {len(bad) - 6} more"] if len(bad) > 6 else [])]


def console_text(facts: Mapping[str, object], found: Mapping[str, object], login: Mapping[str, object]) -> str:
    """The block for tty1 and the serial line, at most 78 columns wide, without escape sequences."""
    shown = facts.get("addresses")
    rows: list[tuple[str, list[str]]] = [
        ("Node", [f"{facts['node']} ({facts['layout']}, {facts['mode']})"]),
        ("Web page", [str(facts["url"] or "no address yet")]),
        ("Addresses", [str(address) for address in shown] if isinstance(shown, list) and shown else ["none yet"]),
        ("Health", health_lines(found)),
        ("Log in", [f"{facts['ssh']}  (by key only)" if facts["ssh"] else "over ssh, when there is an address"]),
    ]
    if facts["host_key"]:
        rows.append(("Host key", [str(facts["host_key"])]))
    if login:
        rows.append(("First login", [f"{login.get('user', '')}  password  {login.get('password', '')}",
                                     "shown here only, until it has been used once"]))
    lines = [f"Samepage appliance {facts['release']}", ""]
    for label, values in rows:
        for index, value in enumerate(values):
            lines.append(f"  {label if index == 0 else '':<12}{printable(value)}"[:WIDTH])
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """Without control characters: details of probes come from programs, and the console obeys escape sequences."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def status_json(facts: Mapping[str, object], found: Mapping[str, object]) -> Json:
    """The document behind /status.json; docs/health.md describes it."""
    return {**facts, "uptime_seconds": uptime_seconds(), **found}


STYLE = """
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#cf222e}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:1.5rem 0 .3rem}
.pill{color:#fff;border-radius:1rem;padding:.15rem .8rem;font-size:1rem;vertical-align:middle}
.good{background:var(--good)}.bad{background:var(--bad)}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line)}
th{font-weight:500;width:12rem}td.ms{text-align:right;width:6rem;font-variant-numeric:tabular-nums}
.no{color:var(--bad);font-weight:600}code{font-size:.95em}
"""


def status_page(facts: Mapping[str, object], found: Mapping[str, object]) -> str:
    """The same as HTML that needs nothing else, and loads itself anew every 15 seconds."""
    quote = html.escape
    good = bool(found.get("healthy"))
    pill = f'<span class="pill {"good" if good else "bad"}">{"healthy" if good else "not healthy"}</span>'
    boot = found.get("boot_seconds")
    shown = facts.get("addresses")
    rows = {
        "Release": quote(str(facts["release"])),
        "Layout": quote(f"{facts['layout']} ({facts['mode']})"),
        "Addresses": quote(", ".join(shown) if isinstance(shown, list) else ""),
        "Log in": f"<code>{quote(str(facts['ssh']))}</code>",
        "Host key": f"<code>{quote(str(facts['host_key']))}</code>",
        "Up for": f"{uptime_seconds():.0f} s" + (f", healthy after {boot} s" if boot else ""),
    }
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="15">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{quote(str(facts['node']))}: {'healthy' if good else 'not healthy'}</title>",
        f"<style>{STYLE}</style></head><body><h1>{quote(str(facts['node']))} {pill}</h1><table>",
        *(f"<tr><th>{label}</th><td>{value}</td></tr>" for label, value in rows.items()),
        "</table>",
    ]
    recipes = found.get("recipes")
    groups = {"node": found.get("system")}
    if isinstance(recipes, dict):
        groups |= {str(name): entry["probes"] for name, entry in recipes.items()}
    for name, probes in groups.items():
        if not isinstance(probes, list) or not probes:
            continue
        parts.append(f"<h2>{quote(name)}</h2><table>")
        for probe in probes:
            mark = "ok" if probe["ok"] else '<span class="no">failed</span>'
            parts.append(
                f"<tr><th>{quote(str(probe['name']))}</th><td>{mark}, {quote(str(probe['detail']))}</td>"
                f'<td class="ms">{probe["ms"]:.0f} ms</td></tr>'
            )
        parts.append("</table>")
    return "".join(parts) + "</body></html>\n"
