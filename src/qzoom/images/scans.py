"""How often a JPEG has its decoder pass over the picture.

A progressive JPEG refines all its pixels scan by scan. A scan may take a few bytes, so a small file can keep a decoder
busy for hours; ordinary ones have a dozen.
"""

from __future__ import annotations

import re

__all__ = ["MAX_SCANS", "count_scans"]

MAX_SCANS = 64
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside a scan: neither a stuffed byte, a restart nor padding
_SCAN, _END, _BARE = 0xDA, 0xD9, 0x01  # _BARE has no length field


def count_scans(data: bytes, most: int = MAX_SCANS) -> int:
    """Scans of the first picture in a JPEG file; thumbnails and what follows its end are not counted.

    Args:
        data: the file's bytes.
        most: counting stops one above this.

    Returns:
        The number of scan headers up to the end marker or the end of the data.
    """
    scans, at = 0, 2
    while scans <= most:
        found = _MARKER.search(data, at)
        if found is None:
            break
        marker, start = data[found.end() - 1], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        at = start if marker == _BARE else start + max(2, int.from_bytes(data[start : start + 2], "big"))
    return scans
