"""A running Samepage as its tests see it: its address, a JSON-RPC client, and commands on its node.

The site is the booted node's. With SAMEPAGE_URL in the environment it is the one at that address, and SAMEPAGE_SHELL is
the command (such as `ssh root@host`) that gets shell commands for its node as its last argument.
"""

from __future__ import annotations

import email
import email.policy
import http.client
import http.cookies
import json
import os
import re
import secrets
import shlex
import ssl
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

TIMEOUT = 60  # seconds; a node under emulation is slow
_MAILS = "cd /var/mail-catcher/Maildir/new && for mail in $(ls -tr); do cat $mail; echo; echo '%%'; done"


class Failed(Exception):
    """The API answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: int = error["code"]
        self.data: Any = error.get("data")


class Unavailable(Failed):
    """The API answered that it waits for a service."""


@dataclass
class Client:
    """One browser without a page: keeps its cookie."""

    url: str
    cookies: dict[str, str] = field(default_factory=dict)
    headers: http.client.HTTPMessage | None = None
    timeout: float = TIMEOUT  # seconds of silence after which a request has failed

    def send(self, body: bytes, verb: str = "POST", path: str = "/api", **headers: str) -> tuple[int, bytes]:
        """Status and body of one request; `headers` are named with _ for -."""
        parts = urlsplit(self.url)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host = parts.hostname or ""
        connection = http.client.HTTPSConnection(host, parts.port, timeout=self.timeout, context=context)
        wanted = {"Content-Type": "application/json"}
        wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            wanted["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            connection.request(verb, path, body, wanted)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        self.headers = response.headers
        for header in response.headers.get_all("Set-Cookie", []):
            for name, cookie in http.cookies.SimpleCookie(header).items():
                self.cookies[name] = cookie.value
        return response.status, content

    def post(self, document: Any) -> Any:
        """The answer to a JSON document; None for an empty one."""
        status, content = self.send(json.dumps(document).encode())
        assert status in (200, 204), (status, content)
        return json.loads(content) if content else None

    def call(self, method: str, *positional: Any, **named: Any) -> Any:
        """The result of one call. Raises Failed."""
        params = list(positional) if positional else named
        answer = self.post({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        if "error" in answer:
            raise (Unavailable if answer["error"]["code"] == -32010 else Failed)(answer["error"])
        return answer["result"]


@dataclass(frozen=True)
class Site:
    url: str
    run: Callable[[str], str]  # a shell command on the node, as root; its output

    def client(self) -> Client:
        return Client(self.url)

    def one_time_password(self, login: str = "admin") -> str:
        return self.run(f"/opt/samepage/bin/samepage-reset-password {shlex.quote(login)}").strip()

    def administrator(self) -> Client:
        """A client signed in as the administrator, under a new password."""
        client, one_time, password = self.client(), self.one_time_password(), secrets.token_urlsafe(12)
        client.call("Session.login", login="admin", password=one_time)
        client.call("Session.changePassword", current=one_time, password=password)
        return client

    def mails(self, recipient: str, count: int = 1) -> list[EmailMessage]:
        """The mails that came for a recipient, as soon as there are `count`."""

        def arrived() -> list[EmailMessage]:
            texts = self.run(_MAILS).split("%%\n")
            parsed = [email.message_from_string(text.lstrip(), policy=email.policy.default) for text in texts]
            return [mail for mail in parsed if recipient in str(mail.get("To", ""))]

        return wait_for(lambda: found if len(found := arrived()) >= count else None)

    def invitation(self, recipient: str, count: int = 1) -> str:
        """The link in the latest invitation."""
        found = re.search(r"https://\S+", self.mails(recipient, count)[-1].get_content())
        assert found is not None
        return found[0]


T = TypeVar("T")


def wait_for(look: Callable[[], T | None], seconds: float = TIMEOUT) -> T:
    """What `look` gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds} seconds in vain"
        time.sleep(0.5)


@pytest.fixture(scope="package")
def site(request: pytest.FixtureRequest) -> Site:
    url = os.environ.get("SAMEPAGE_URL", "")
    if not url:
        node = request.getfixturevalue("node")
        return Site(node.url, node.ssh)
    shell = shlex.split(os.environ["SAMEPAGE_SHELL"])

    def run(command: str) -> str:
        return subprocess.run([*shell, command], check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout

    return Site(url, run)


@pytest.fixture(scope="package")
def clients() -> dict[str, Client]:
    return {}


@pytest.fixture
def administrator(site: Site, clients: dict[str, Client]) -> Client:
    """A signed-in administrator, the same as long as no test has changed the password: signing in costs seconds."""
    try:
        clients["administrator"].call("Members.get")
    except (KeyError, Failed):
        clients["administrator"] = site.administrator()
    return clients["administrator"]
