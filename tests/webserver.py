"""A web server whose connections break, stall, trickle and lie as told, for the tests of downloads."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CONTENT = random.Random(3).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)


@dataclass
class Site:
    """What the server does. `cuts`: for each request in turn, after how many bytes of content the connection breaks."""

    content: bytes = CONTENT
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True  # whether Range is obeyed
    conditions: bool = True  # whether If-Range is obeyed
    cuts: list[int] = field(default_factory=list)
    stall: bool = False  # a cut does not close the connection
    trickle: bool = False
    statuses: list[int] = field(default_factory=list)  # answers to the first requests
    location: str = ""
    length: bool = True  # whether the length is told
    chunked: bool = False
    after: Callable[[Site], None] | None = None  # called after each request
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, If-Range
    end: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site = self.server.site
        self.close_connection = True
        asked, condition = self.headers.get("Range", ""), self.headers.get("If-Range", "")
        site.asked.append((self.path, asked, condition))
        try:
            self.answer(site, asked, condition)
        finally:
            if site.after:
                site.after(site)

    def answer(self, site: Site, asked: str, condition: str) -> None:
        status = site.statuses.pop(0) if site.statuses else 200
        if status != 200:
            self.send_response(status)
            if site.location:
                self.send_header("Location", site.location)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"sorry")
            return
        start = 0
        if asked and site.ranges and (not site.conditions or condition in (site.etag, site.modified)):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(site.content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        else:
            self.send_response(200)
        body = site.content[start:]
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified)):
            if value:
                self.send_header(name, value)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif site.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = site.cuts.pop(0) if site.cuts else None
        if site.chunked:
            self.wfile.write(b"%x\r\n%b" % (len(body), body[:cut]) + (b"\r\n0\r\n\r\n" if cut is None else b""))
        elif site.trickle:
            for start in range(0, len(body), 10):
                self.wfile.write(body[start : start + 10])
                if site.end.wait(0.02):
                    break
        else:
            self.wfile.write(body[:cut])
        if cut is not None and site.stall:
            site.end.wait(60)


class Server(ThreadingHTTPServer):
    site: Site

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away: some tests mean that."""


@contextlib.contextmanager
def serving(site: Site, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site = site
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        site.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            site.end.set()
            server.shutdown()
            thread.join()


def make_certificate(file: Path) -> Path:
    """Certificate and key of a server at 127.0.0.1, an authority of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    public = key.public_key()
    identity = x509.SubjectKeyIdentifier.from_public_key(public)
    built = (
        x509.CertificateBuilder(name, name, public, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True)
        .add_extension(identity, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    file.write_bytes(built.public_bytes(pem) + secret)
    return file
