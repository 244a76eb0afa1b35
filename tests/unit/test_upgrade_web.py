"""Addresses of downloads: what is none, redirects, proxies, certificates, and files of this machine."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.node.upgrade import fetch as module
from appliance.node.upgrade.fetch import FetchError, fetch, read
from appliance.node.upgrade.web import shown
from tests.unit.downloads import broken, get, whole
from tests.webserver import CONTENT, SHA256, SIZE, Site, make_certificate, serving

pytestmark = pytest.mark.usefixtures("no_proxies")


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "begins with https://"), ("data:,x", "begins with https://"), ("/etc/passwd", "begins with"),
        ("", "begins with"), ("http:///x", "names no server"), ("http://host:port/x", "is no address"),
        ("http://[::1/x", "is no address"), ("http://host/a b", "only as %XX"), ("http://host/\n", "only as %XX"),
        ("http://h\xf6st/", "only as %XX"), ("file://elsewhere/x", "no file of this machine"),
        ("file:x", "no file of this machine"), ("https://me:secret@host/x", "^https://host/x .* not supported"),
    ],
)  # fmt: skip
def test_what_is_no_address(target: Path, url: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(url, str(target), pause=0)
    assert not target.exists()


def test_messages_show_no_secret(site: Site, target: Path) -> None:
    assert shown("https://me:word@host/a?sig=word#x") == "https://host/a"
    site.statuses = [403]
    with pytest.raises(FetchError, match=r"/a: the server answers 403") as caught:
        fetch(f"{site.url}/a?sig=word", str(target))
    assert "word" not in str(caught.value)
    assert site.asked[0][0] == "/a?sig=word"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_with_the_range(site: Site, target: Path, status: int) -> None:
    broken(site, target)
    site.statuses, site.location = [status], "/b.bundle"
    get(site, target)
    assert whole(target)
    assert site.asked == [("/a.bundle", "bytes=1000000-", '"one"'), ("/b.bundle", "bytes=1000000-", '"one"')]


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "http://a:b@127.0.0.1/"])
def test_redirects_lead_to_web_servers_only(site: Site, target: Path, location: str) -> None:
    site.statuses, site.location = [302], location
    with pytest.raises(FetchError):
        get(site, target, size=None, sha256=None)
    assert len(site.asked) == 1


def test_redirects_in_a_circle_end(site: Site, target: Path) -> None:
    site.statuses, site.location = [302] * 50, "/a.bundle"
    with pytest.raises(FetchError, match="302"):
        get(site, target)
    assert len(site.asked) < 15


def test_proxies_of_the_environment_are_used(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    fetch("http://bundles.invalid/a.bundle", str(target), size=SIZE, sha256=SHA256)
    assert whole(target)
    assert site.asked == [("http://bundles.invalid/a.bundle", "", "")]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(f"{site.url}/b", SIZE) == CONTENT
    assert site.asked[1][0] == "/b"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture
def secure(certificate: Path) -> Iterator[Site]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(Site(), context) as running:
        yield running


def test_https_goes_on_after_a_break(
    secure: Site, target: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.cuts = [1_000_000]
    get(secure, target)
    assert whole(target)
    assert secure.asked[1][1] == "bytes=1000000-"


def test_a_strange_certificate_is_not_accepted(secure: Site, target: Path) -> None:
    with pytest.raises(FetchError, match="certificate is not accepted: self-signed certificate"):
        get(secure, target)
    assert secure.asked == []


def test_https_is_never_left(
    site: Site, secure: Site, target: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.statuses, secure.location = [302], f"{site.url}/b"
    with pytest.raises(FetchError, match="which is not as safe"):
        get(secure, target)
    assert site.asked == []
    site.statuses, site.location = [302, 302], f"{secure.url}/c"
    get(site, target)
    assert whole(target)
    secure.statuses, secure.location = [302], f"{site.url}/b"
    with pytest.raises(FetchError, match="which is not as safe"):
        fetch(f"{site.url}/a", str(target))


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_this_machine(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "a file+.bundle"
    source.write_bytes(CONTENT)
    assert fetch(f"file://{tmp_path}/a%20file+.bundle", str(target), size=SIZE, sha256=SHA256) == SHA256
    assert target.read_bytes() == CONTENT
    assert read(f"file://localhost{tmp_path}/a%20file+.bundle", SIZE) == CONTENT
    with pytest.raises(FetchError, match="more than the 1000 bytes"):
        read(f"file://{tmp_path}/a%20file+.bundle", 1000)


def test_a_copy_goes_on_unless_the_file_changed(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    url = f"file://{source}"

    def interrupt() -> None:
        copied = 0

        def write(file: int, block: memoryview) -> int:
            nonlocal copied
            if copied >= 1_000_000:
                raise KeyboardInterrupt
            copied += len(block)
            return real(file, block)

        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(KeyboardInterrupt):
                fetch(url, str(target))

    def progress(done: int, _: int) -> None:
        steps.append(done)

    monkeypatch.setattr(module, "_BETWEEN", 0)
    for change, first in (False, 1_310_720), (True, 262_144):
        interrupt()
        steps: list[int] = []
        if change:
            source.write_bytes(CONTENT)
            os.utime(source, ns=(1, 1))
        assert fetch(url, str(target), progress=progress) == SHA256
        assert steps[0] == first
        target.unlink()


def test_what_is_no_file(tmp_path: Path, target: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in ("none", "No such file"), ("", "is no file"), ("pipe", "is no file"), ("a%00b", "null"):
        with pytest.raises(FetchError, match=message):
            fetch(f"file://{tmp_path}/{name}", str(target))
