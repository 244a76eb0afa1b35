"""Talking to the service manager: readiness, status, and the listening sockets that it keeps over a restart."""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path

_FIRST_PASSED = 3  # by the protocol of sd_listen_fds(3)


def notify(*lines: str, descriptors: tuple[int, ...] = ()) -> None:
    """Send lines such as READY=1 to the service manager; nothing happens when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendmsg(["\n".join(lines).encode()], ancillary)


def listen_unix(path: str, name: str) -> socket.socket:
    """A listening unix socket that survives a restart of the service, so that no connection is refused meanwhile.

    Everybody on the node may connect: the folder decides who reaches it.
    """
    kept = _kept(name)
    if kept is not None:
        if kept.getsockname() == path and Path(path).is_socket():
            return kept
        kept.close()
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    Path(path).chmod(0o666)
    return _keep(listener, name)


def listen_tcp(port: int, name: str) -> socket.socket:
    """The same for a TCP port on all addresses; the node's firewall decides who reaches it."""
    kept = _kept(name)
    if kept is not None:
        if kept.getsockname()[1] == port:
            return kept
        kept.close()
    return _keep(socket.create_server(("", port)), name)


def _keep(listener: socket.socket, name: str) -> socket.socket:
    listener.listen(512)
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")
    notify("FDSTORE=1", f"FDNAME={name}", descriptors=(listener.fileno(),))
    return listener


def _kept(name: str) -> socket.socket | None:
    """The socket that the service manager kept for this process under `name`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")[: int(os.environ.get("LISTEN_FDS", "0"))]
    if name not in names:
        return None
    descriptor = _FIRST_PASSED + names.index(name)
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
