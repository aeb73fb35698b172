"""Which web addresses may be dialled: the parts of a URL, and the network addresses that its host stands for.

There is one parser. What it returns is what is looked up, dialled, named in TLS and sent as Host, so that no second
reading of the same text can differ.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qzoom.errors import FetchRefusedError
from qzoom.images.limits import refuse

__all__ = ["Resolve", "Target", "is_allowed", "is_public", "numeric_addresses", "parse_host", "parse_url", "refused"]

Resolve = Callable[[str, int], Sequence[str]]
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

NAME = "the picture's web address"
_MAX_CHARS = 2048
_PORTS = {"https": 443, "http": 80}
_CHARS = re.compile(r"[A-Za-z0-9:/?#\[\]@!$&'()*+,;=._~%-]+")  # RFC 3986; no backslash, space or control character
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"({_LABEL}(?:\.{_LABEL})*)(?::([0-9]{{1,5}}))?")

# Not for strangers to name, though `ipaddress` counts some of them as global (which ones depends on Python's version).
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # a cloud's own services
        "2001::/23",  # protocol assignments, Teredo among them
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
_UNICAST_V6 = ipaddress.ip_network("2000::/3")  # mapped, NAT64, local and multicast addresses lie outside


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed address.

    Args:
        scheme: "https" or "http".
        host: lower-case name or IPv4 address.
        port: to dial.
        path: path and query, as sent.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The address again, e.g. as the base of a relative redirect."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def netloc(self) -> str:
        """The value of the Host header."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def refused(what: str, remedy: str) -> FetchRefusedError:
    """The error for an address that will not be fetched; both clauses are fixed texts, never addresses or names."""
    return FetchRefusedError(str(refuse(NAME, what, remedy)))


def parse_host(text: str) -> tuple[str, int | None] | None:
    """An allowed host as operators write it: "images.example.com" or "images.example.com:8443"; None if malformed."""
    found = _HOST.fullmatch(text.lower())
    if found is None or len(found[1]) > 253 or (found[2] is not None and not 1 <= int(found[2]) <= 65535):
        return None
    return found[1], None if found[2] is None else int(found[2])


def parse_url(url: str) -> Target:
    """The parts of an http(s) URL.

    Raises:
        FetchRefusedError: another scheme, a user name or password, characters that URLs do not have, or no plain host.
    """
    if len(url) > _MAX_CHARS or not _CHARS.fullmatch(url):
        raise refused(
            f"it is longer than {_MAX_CHARS} characters or has characters that addresses do not have",
            "percent-encode it",
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise refused("it is malformed", "check it") from error
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise refused("it is neither https nor http", "give an https address or a data URL")
    if "@" in parts.netloc:
        raise refused("it holds a user name or password", "leave them out")
    found = parse_host(parts.netloc)
    if found is None:
        raise refused("its host is not a plain name with at most a port", "write https://host/path")
    host, port = found
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(scheme, host, port or _PORTS[scheme], path)


def is_allowed(target: Target, allowed_hosts: Sequence[str]) -> bool:
    """Whether host and port are listed; an entry without a port stands for the scheme's own port."""
    entries = {parse_host(text) for text in allowed_hosts}
    standard = target.port == _PORTS[target.scheme]
    return (target.host, target.port) in entries or (standard and (target.host, None) in entries)


def numeric_addresses(host: str, port: int) -> list[str]:
    """What the system's resolver says a host is, as texts.

    Raises:
        OSError: it does not know.
    """
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: IpAddress) -> bool:
    """Whether an address is an ordinary one of the internet.

    Not so: private, local, shared, reserved and multicast ones, and those that carry another address inside (mapped,
    6to4, NAT64, Teredo).
    """
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    if address.version == 6 and address not in _UNICAST_V6:
        return False
    return not any(address.version == network.version and address in network for network in _SPECIAL)
