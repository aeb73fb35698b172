"""Which of several engines a request goes to: the one that has its pictures, unless that one is overloaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from qzoom.engine.request import Request
from qzoom.images.load import pixel_digest

SLACK = 1.25
"""An engine is overloaded when it has more than so many times the mean of the jobs in flight."""
_LEAST = 2


def picture_key(request: Request, tenant: str = "") -> bytes:
    """The same for requests about the same pictures of the same tenant; of requests without one, by their text."""
    digest = hashlib.sha256(tenant.encode())
    for picture in request.pictures:
        digest.update(picture.digest or pixel_digest(picture.image))
    if not request.pictures:
        digest.update(repr(request.ids).encode())
    return digest.digest()


def rank(key: bytes, names: Iterable[str]) -> list[str]:
    """All engines in the order in which a key prefers them (rendezvous hashing: when one goes, only its keys move)."""
    return sorted(names, key=lambda name: hashlib.sha256(key + name.encode()).digest())


def choose(key: bytes, loads: Mapping[str, int]) -> str:
    """The first engine in a key's order that is not overloaded (consistent hashing with bounded loads)."""
    most = max(_LEAST, math.ceil(SLACK * (sum(loads.values()) + 1) / len(loads)))
    return next(name for name in rank(key, loads) if loads[name] < most)
