"""Pictures from the web, in bounded time and size. A server fetches only from hosts that are listed, by default none.

There is one URL parser: what it returns is what is looked up, dialled, named in TLS and sent as Host, so that no second
reading of the same text can differ. A name is looked up once; every address that it has is checked, and a checked one
is dialled, so that a name server that changes its answer gains nothing. Redirects start over with all checks.
Environment proxies are not used. The bytes are not looked at here: `load_image` recognises and checks them like those
of any other picture.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urljoin, urlsplit

from qzoom.errors import ConfigError, FetchFailedError, FetchRefusedError, FetchTimeoutError
from qzoom.images.limits import refuse
from qzoom.settings import Between, settings

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
    """A parsed address."""

    scheme: str  # "https" or "http"
    host: str  # lower-case name or IPv4 address
    port: int  # to dial
    path: str  # path and query, as sent

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
    """The parts of an http(s) URL (FetchRefusedError: another scheme, a user name or password, characters that URLs do
    not have, or no plain host)."""
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
    """What the system's resolver says a host is, as texts (OSError: it does not know)."""
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


_CHUNK_BYTES = 1 << 16
_MAX_TRIES = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRY = (408, 425, 429, 500, 502, 503, 504)
_LOOKUPS = threading.BoundedSemaphore(32)


@settings
class FetchPolicy:
    """What may be fetched (ConfigError: a malformed host or a limit out of range)."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from: "host" (the scheme's default port) or "host:port", without wildcards.
    Empty: no image is fetched."""
    allow_http: bool = False
    """Also fetch from these hosts without TLS (http)."""
    max_redirects: Annotated[int, Between(0, 10)] = 3
    """Hops that are followed, each with all checks."""
    timeout_s: Annotated[float, Between(0.001, 600)] = 15.0
    """Seconds for the whole fetch, redirects included."""
    read_timeout_s: Annotated[float, Between(0.001, 600)] = 5.0
    """Seconds for each single wait: connecting, the TLS handshake, the next bytes."""
    max_bytes: Annotated[int, Between(1, 2**32)] = 16 * 2**20
    """Most bytes of the picture."""
    allow_private: bool = False
    """Also dial addresses that are not public; for tests only, no command line or variable sets it."""
    any_host: bool = False
    """Fetch from every public host, whatever `allowed_hosts` says. For a person who names an address at a command line
    or in Python; a server never sets it."""

    def __post_init__(self) -> None:
        for text in self.allowed_hosts:
            if parse_host(text) is None:
                raise ConfigError(f"Allowed host {text!r} is not a host or host:port, as images.example.com.")


def fetch_image(
    url: str, policy: FetchPolicy, *, resolve: Resolve = numeric_addresses, tls: ssl.SSLContext | None = None
) -> bytes:
    """The bytes behind a web address. Blocks; call it in a bounded pool.

    Args:
        resolve: (host, port) to numeric addresses; raises OSError.
        tls: None for the system's certificates.

    Returns:
        The body, at most `max_bytes`.

    Raises:
        FetchRefusedError: permanent: not allowed, not found, too large.
        FetchFailedError: transient: no answer, broken off, the host is busy.
        FetchTimeoutError: transient: not in time.
    """
    if not policy.allowed_hosts and not policy.any_host:
        raise refused("this server fetches no pictures from the web", "send the picture as a data URL")
    deadline = _Deadline(policy)
    target = _check(parse_url(url), policy)
    for _ in range(policy.max_redirects + 1):
        addresses = _look_up(target, policy, resolve, deadline)
        got = _get(target, addresses, policy, tls, deadline)
        if isinstance(got, bytes):
            return got
        target = got
    raise refused("it redirects too often", "give the picture's final address")


def _check(target: Target, policy: FetchPolicy) -> Target:
    if target.scheme == "http" and not policy.allow_http:
        raise refused("it is not https", "give an https address or a data URL")
    if not policy.any_host and not is_allowed(target, policy.allowed_hosts):
        what = "its host or port, or one that it redirects to, is not on this server's list"
        raise refused(what, "send the picture as a data URL")
    return target


class _Deadline:
    """The time left, for the whole fetch and for one wait."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._end = time.monotonic() + policy.timeout_s
        self._each = policy.read_timeout_s

    def wait_s(self) -> float:
        """How long the next wait may be (TimeoutError: no time is left)."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, self._each)


def _look_up(target: Target, policy: FetchPolicy, resolve: Resolve, deadline: _Deadline) -> list[IpAddress]:
    """The host's addresses, all of them checked."""
    addresses = []
    for text in _resolve_in_time(target, resolve, deadline):
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise _failed("its host cannot be found") from error
        if not policy.allow_private and not is_public(address):
            raise refused("its host has an address that is not public", "send the picture as a data URL")
        addresses.append(address)
    if not addresses:
        raise _failed("its host cannot be found")
    return addresses


def _resolve_in_time(target: Target, resolve: Resolve, deadline: _Deadline) -> list[str]:
    """The resolver's answer; the system's own cannot be given a time limit, so it runs beside."""
    answer: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(list(resolve(target.host, target.port)))
        except Exception as error:  # a resolver that fails in any way must not leave the caller waiting
            answer.put(error)
        finally:
            _LOOKUPS.release()

    try:
        if not _LOOKUPS.acquire(timeout=deadline.wait_s()):
            raise _too_slow()
        threading.Thread(target=ask, name="qzoom-lookup", daemon=True).start()
        got = answer.get(timeout=deadline.wait_s())
    except (TimeoutError, queue.Empty) as error:
        raise _too_slow() from error
    if isinstance(got, Exception):
        raise _failed("its host cannot be found") from got
    return got


def _get(
    target: Target, addresses: list[IpAddress], policy: FetchPolicy, tls: ssl.SSLContext | None, deadline: _Deadline
) -> bytes | Target:
    """One request: the picture, or where it redirects to."""
    connection = http.client.HTTPConnection(target.host, target.port)
    headers = {"Host": target.netloc, "User-Agent": "qzoom", "Accept": "image/*", "Accept-Encoding": "identity"}
    raw: socket.socket | None = None
    try:
        raw = _dial(target, addresses, tls, deadline)
        most = 2 * policy.max_bytes + 2**20  # headers and chunk sizes included
        connection.sock = _TimedSocket(raw, deadline, most)
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        for name, value in {**headers, "Connection": "close"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return _check(_redirect(target, response), policy)
        _check_response(response, policy)
        return _read(response, policy)
    except TimeoutError as error:
        raise _too_slow() from error
    except ssl.SSLCertVerificationError as error:
        raise refused("its host's certificate cannot be verified", "give another address or a data URL") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed("the connection to its host failed or was broken off") from error
    finally:
        if raw is not None:
            raw.close()


def _dial(target: Target, addresses: list[IpAddress], tls: ssl.SSLContext | None, deadline: _Deadline) -> socket.socket:
    """A connection to the first checked address that takes it, with TLS for the name where asked (OSError: none)."""
    raw = _connect(addresses, target.port, deadline)
    if target.scheme == "http":
        return raw
    try:
        context = tls or _system_tls()
        raw.settimeout(deadline.wait_s())
        return context.wrap_socket(raw, server_hostname=target.host)
    except BaseException:
        raw.close()
        raise


@functools.cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(addresses: list[IpAddress], port: int, deadline: _Deadline) -> socket.socket:
    failure: OSError = OSError("no address")
    for address in addresses[:_MAX_TRIES]:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        raw = socket.socket(family, socket.SOCK_STREAM)
        try:
            raw.settimeout(deadline.wait_s())
            raw.connect((str(address), port))
        except OSError as error:
            raw.close()
            failure = error
        else:
            return raw
    raise failure


class _TimedSocket(io.RawIOBase):
    """What `http.client` needs of a socket, with the deadline and a ceiling on all received bytes at every read."""

    def __init__(self, raw: socket.socket, deadline: _Deadline, most_bytes: int) -> None:
        self._raw = raw
        self._deadline = deadline
        self._left = most_bytes

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(self._deadline.wait_s())
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, _CHUNK_BYTES)

    def close(self) -> None:
        """Nothing: `http.client` closes sockets whose answer it still reads; `_get` closes this one in the end."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(self._deadline.wait_s())
        count = self._raw.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError("more bytes than any allowed answer has")
        return count


def _redirect(target: Target, response: http.client.HTTPResponse) -> Target:
    location = response.getheader("Location")
    if not location:
        raise refused("it redirects to nowhere", "give the picture's final address")
    if not location.isascii() or not location.isprintable() or "\\" in location or " " in location:
        raise refused("it redirects to a malformed address", "give the picture's final address")
    try:
        return parse_url(urljoin(target.url, location))
    except ValueError as error:
        raise refused("it redirects to a malformed address", "give the picture's final address") from error


def _check_response(response: http.client.HTTPResponse, policy: FetchPolicy) -> None:
    if response.status in _RETRY:
        raise _failed("its host is busy or failing")
    if response.status != 200:
        raise refused("its host does not give the picture", "check the address, or send the picture as a data URL")
    if response.getheader("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise refused("its host sends it compressed a second time", "send the picture as a data URL")
    if response.length is not None and response.length > policy.max_bytes:
        raise _too_large(policy)


def _read(response: http.client.HTTPResponse, policy: FetchPolicy) -> bytes:
    body = bytearray()
    while True:
        part = response.read(_CHUNK_BYTES)
        body += part
        if len(body) > policy.max_bytes:
            raise _too_large(policy)
        if not part:
            break
    if response.length:
        raise _failed("the connection to its host was broken off")
    return bytes(body)


def _too_large(policy: FetchPolicy) -> Exception:
    return refused(f"it is larger than the limit of {policy.max_bytes / 2**20:.4g} MiB", "shrink or compress it")


def _too_slow() -> FetchTimeoutError:
    return FetchTimeoutError(str(refuse(NAME, "its host did not deliver it in time", "try again or send a data URL")))


def _failed(what: str) -> FetchFailedError:
    return FetchFailedError(str(refuse(NAME, what, "try again or send the picture as a data URL")))
