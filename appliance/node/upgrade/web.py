"""What stands at an address: answers of web servers and of files. Part of the node's own code.

http and https take proxies from the usual variables (https_proxy, http_proxy, no_proxy).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from appliance.node.refusals import Ending

if TYPE_CHECKING:
    from email.message import Message
    from typing import IO
    from urllib.request import OpenerDirector, Request

# urllib and http.client are imported where they are used: under emulation that takes longer than many an upgrade.

_SCHEMES = ("https", "http", "file")
_AGENT = "samepage-upgrade-node"
_RETRIED = frozenset({408, 425, 429})  # and all from 500 on
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})\Z")


class FetchError(Ending):
    """A file cannot be fetched. What came of it is kept."""

    reason = "not-fetched"


class Broken(Exception):
    """One attempt came to nothing; another one may not."""


class Answer(NamedTuple):
    """A file's content from the byte `start` on. `total`: bytes of the whole file, None where the server is silent."""

    start: int
    total: int | None
    validator: str
    read: Callable[[int], bytes]  # nothing at the end; raises Broken
    close: Callable[[], None]


def ask(url: str, start: int, validator: str, timeout: float) -> Answer | None:
    """Ask for a file from the byte `start` on, if it still has the validator, and for all of it otherwise.

    None where the server does not make sense of that. Raises Broken, or FetchError where asking again leads nowhere.
    """
    if scheme(url) == "file":
        return _open_file(url, start, validator)
    return _open_http(url, start, validator, timeout)


def _open_http(url: str, start: int, validator: str, timeout: float) -> Answer | None:
    import ssl
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return None
        message = f"{shown(url)}: the server answers {error.code} {error.reason}"
        if error.code in _RETRIED or error.code >= 500:
            raise Broken(message) from error
        raise FetchError(message, hint="look at the address, and at what the server has there") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(
                f"{shown(url)}: the server's certificate is not accepted: {error.reason.verify_message}",
                hint="look at the node's clock, and at the certificates it trusts in /etc/ssl/certs",
            ) from error
        raise Broken(f"{shown(url)}: {_why(error.reason)}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise Broken(f"{shown(url)}: {_why(error)}") from error

    def read_some(count: int) -> bytes:
        try:
            content: bytes = response.read1(count)  # `read` would lose what came before a break
        except (OSError, HTTPException) as error:
            raise Broken(f"{shown(url)} breaks off: {_why(error)}") from error
        return content

    found = _validator(response.headers)
    if response.status == 200:
        return Answer(0, response.length, found, read_some, response.close)
    part = _RANGE.match(response.headers.get("Content-Range", ""))
    if response.status == 206 and part:
        return Answer(int(part[1]), int(part[2]), found, read_some, response.close)
    response.close()
    if response.status == 206:
        return None
    raise FetchError(f"{shown(url)}: the server answers {response.status} {response.reason}, which is no file")


def _opener() -> OpenerDirector:
    """An opener that obeys the proxy variables and follows redirects, but never away from https."""
    import urllib.request
    from http.client import HTTPMessage

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(
            self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
        ) -> Request | None:
            fp.close()  # its content, of any length, would be read otherwise
            if scheme(newurl) == "file" or (scheme(req.full_url), scheme(newurl)) == ("https", "http"):
                raise FetchError(f"{shown(req.full_url)}: the server sends to {shown(newurl)}, which is not as safe")
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), Redirects(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _open_file(url: str, start: int, validator: str) -> Answer:
    from urllib.parse import unquote, urlsplit

    try:  # without waiting for the other end of a pipe
        file = os.open(unquote(urlsplit(url).path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise FetchError(f"{shown(url)} cannot be read: {_why(error)}") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise FetchError(f"{shown(url)} is no file")
    mark = f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
    start = os.lseek(file, start if validator == mark else 0, os.SEEK_SET)

    def read_some(count: int) -> bytes:
        try:
            return os.read(file, count)
        except OSError as error:
            raise Broken(f"{shown(url)} cannot be read: {error.strerror}") from error

    return Answer(start, found.st_size, mark, read_some, lambda: os.close(file))


def _why(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _validator(headers: Message) -> str:
    """What If-Range takes: an ETag that is a strong one, or the time of the last change; empty where there is none."""
    tag = usable(headers.get("ETag"))
    return tag if tag.startswith('"') else usable(headers.get("Last-Modified"))


def usable(validator: object) -> str:
    """The validator, empty where it cannot stand in a header."""
    good = isinstance(validator, str) and validator.isascii() and validator.isprintable() and len(validator) < 1000
    return str(validator) if good else ""


def scheme(url: str) -> str:
    """The scheme of an address. Raises FetchError where it is no address of a file or a web server."""
    from urllib.parse import urlsplit

    if not url.isascii() or not url.isprintable() or " " in url:
        raise FetchError(f"{shown(url)!r} has characters that an address has only as %XX")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # each may raise
    except ValueError as error:
        raise FetchError(f"{shown(url)} is no address: {error}") from error
    if parts.scheme not in _SCHEMES:
        raise FetchError(f"{shown(url)} is no address that begins with https://, http:// or file://")
    if "@" in parts.netloc:
        raise FetchError(f"{shown(url)} was given with a user's name, which is not supported")
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise FetchError(f"{shown(url)} names no file of this machine")
    if parts.scheme != "file" and not host:
        raise FetchError(f"{shown(url)} names no server")
    return parts.scheme


def shown(url: str) -> str:
    """An address as messages show it: without what may be somebody's key to the server."""
    return re.sub("//[^/]*@", "//", url.partition("?")[0])


def inside(url: str, name: str) -> str:
    """The address of a file in the folder `url`; a query stays."""
    from urllib.parse import quote, urlsplit

    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment="").geturl()
