"""Which network interface leads to another machine of the job: gloo and NCCL have to be told, and would else look this host's own
name up, which stands for 127.0.1.1 on many machines, or wait 10-20 s for a name server that does not answer."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

_ELSEWHERE = "203.0.113.1"
"""An address that belongs to nobody (RFC 5737), in the direction of the default route."""


def interface_to(host: str) -> str | None:
    """Name of the interface by which this machine reaches `host`; None where it has no name. Nothing is sent.

    Raises OSError where `host` is unknown or no route leads there.
    """
    address = own_address(host)
    if is_loopback(address) and not _is_this_machine_alone(host):  # a host's own name, which may be known to it as 127.0.1.1
        with contextlib.suppress(OSError):
            address = own_address(_ELSEWHERE)
    return interface_of(address)


def own_address(host: str) -> str:
    """This machine's address as `host` sees it. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        found: str = probe.getsockname()[0]
    return found.partition("%")[0]


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the interface that has `address`."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return None


def _is_this_machine_alone(host: str) -> bool:
    """Whether `host` is meant to stand for this machine: no other could reach it."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"
