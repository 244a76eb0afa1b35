"""The node's network addresses, asked from the kernel over netlink: no program, no privilege, and news of changes."""

from __future__ import annotations

import socket
import struct

RTM_NEWADDR, RTM_GETADDR, NLMSG_ERROR, NLMSG_DONE = 20, 22, 2, 3
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
IFA_ADDRESS, IFA_LOCAL = 1, 2
SCOPE_GLOBAL = 0
GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
HEADER = struct.Struct("=IHHII")
ADDRESS = struct.Struct("=BBBBI")
ATTRIBUTE = struct.Struct("=HH")


def parse_addresses(data: bytes) -> tuple[list[str], bool]:
    """Addresses of global scope in a netlink answer, and whether the answer ends here."""
    found: list[str] = []
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, at)
        if length < HEADER.size or kind in (NLMSG_DONE, NLMSG_ERROR):
            return found, True
        if kind == RTM_NEWADDR:
            family, _, _, scope, _ = ADDRESS.unpack_from(data, at + HEADER.size)
            attributes = _attributes(data[at + HEADER.size + ADDRESS.size : at + length])
            address = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
            if address and scope == SCOPE_GLOBAL:
                found.append(socket.inet_ntop(family, address))
        at += length + 3 & ~3
    return found, False


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if length < ATTRIBUTE.size:
            break
        found[kind] = data[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found


def addresses() -> list[str]:
    """Global addresses of all interfaces, IPv4 first. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(5)
        request = ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        netlink.send(HEADER.pack(HEADER.size + len(request), RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + request)
        found: list[str] = []
        done = False
        while not done:
            part, done = parse_addresses(netlink.recv(65536))
            found += part
    return sorted(dict.fromkeys(found), key=lambda address: ":" in address)


def watch_addresses() -> socket.socket:
    """A socket that becomes readable whenever an address comes or goes."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    netlink.bind((0, GROUPS))
    return netlink
