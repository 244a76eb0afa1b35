"""The ASGI application: /api, /healthz and the web page. Small enough to need no framework, which halves start time."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import rpc
from .api import Api, Exchange
from .sessions import read_cookie

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Headers = Mapping[str, str]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGES = {"/": "index.html", "/invitation": "index.html", "/favicon.ico": "logo.svg"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_COMMON = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """A request that never becomes a call: HTTP status and the JSON-RPC error in its body."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.response = _json(status, rpc.encode(rpc.failure(None, rpc.RpcError(code, message))))


class Application:
    def __init__(self, api: Api, limits: rpc.Limits, web: Path) -> None:
        self._api = api
        self._limits = limits
        self._files = read_files(web)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, verb = scope["path"], scope["method"]
        if path == "/api":
            try:
                response = await self._call(verb, headers, receive)
            except Refused as refused:
                response = refused.response
        elif verb not in ("GET", "HEAD"):
            response = Response(405, b"", (("allow", "GET, HEAD"),))
        elif path == "/healthz":
            response = Response(200, b"ok\n", (("content-type", "text/plain"), ("cache-control", "no-store")))
        else:
            response = self._file(path, headers)
        await _send(response, send, with_body=verb != "HEAD")

    async def _call(self, verb: str, headers: Headers, receive: Receive) -> Response:
        if verb != "POST":
            response = Refused(405, rpc.INVALID_REQUEST, "calls are made with POST").response
            return Response(405, response.body, (*response.headers, ("allow", "POST")))
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, rpc.INVALID_REQUEST, "the content type must be application/json")
        origin = site(headers)
        body = await self._read(headers, receive)
        exchange = Exchange(client(headers), origin, read_cookie(headers.get("cookie", "")))
        answer = await rpc.answer(body, lambda request: self._api.serve(request, exchange), self._limits)
        cookie = (("set-cookie", exchange.set_cookie),) if exchange.set_cookie else ()
        response = Response(204) if answer is None else _json(200, answer)
        return Response(response.status, response.body, (*response.headers, *cookie))

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body:
            raise self._too_large()
        parts = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, rpc.INVALID_REQUEST, "the request ended early")
            parts += message.get("body", b"")
            if len(parts) > self._limits.body:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(parts)

    def _too_large(self) -> Refused:
        return Refused(413, rpc.TOO_LARGE, f"a request holds at most {self._limits.body} bytes")

    def _file(self, path: str, headers: Headers) -> Response:
        file = self._files.get(_PAGES.get(path, path.removeprefix("/")))
        if file is None:
            return Response(404, b"not found\n", (("content-type", "text/plain"),))
        tags = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
        if dict(file.headers)["etag"] in tags:
            return Response(304, b"", file.headers)
        return file


def read_files(folder: Path) -> dict[str, Response]:
    """Every file of the web page, ready to be sent. Browsers ask each time whether it changed (a release may)."""
    found = {}
    for file in sorted(folder.iterdir()):
        body = file.read_bytes()
        headers = (
            ("content-type", _TYPES[file.suffix]),
            ("cache-control", "no-cache"),
            ("etag", f'"{hashlib.sha256(body).hexdigest()[:32]}"'),
        )
        found[file.name] = Response(200, body, headers)
    return found


def site(headers: Headers) -> str:
    """The site that the browser shows, https://host[:port]. Raises Refused for a request sent by another site."""
    host = headers.get("host", "localhost")
    origin = headers.get("origin", "")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, rpc.NOT_ALLOWED, "calls from other sites are refused")
    if not origin:
        return f"https://{host}"
    try:
        # Host names only: a proxy in front may pass the host without its port.
        same = urlsplit(origin).hostname == urlsplit(f"//{host}").hostname
    except ValueError:
        same = False
    if not same:
        raise Refused(403, rpc.NOT_ALLOWED, "calls from other sites are refused")
    return origin


def client(headers: Headers) -> str:
    """The client's address as the front door saw it: the last entry, because clients can forge earlier ones."""
    return headers.get("x-forwarded-for", "").rpartition(",")[2].strip() or "local"


def _json(status: int, body: bytes) -> Response:
    return Response(status, body, (("content-type", "application/json"), ("cache-control", "no-store")))


async def _send(response: Response, send: Send, *, with_body: bool) -> None:
    headers = [*response.headers, *_COMMON.items()]
    if response.status not in (204, 304):
        headers.append(("content-length", str(len(response.body))))
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": response.status, "headers": encoded})
    await send({"type": "http.response.body", "body": response.body if with_body else b""})
