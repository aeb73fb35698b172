"""The items that all steps kept, on the disk, given back in the order of the exported rows.

Workers finish in any order and a rerun skips what is done; sorted by picture and id, the data is the same after all of
it. Memory holds 48 bytes an item.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qzoom.distill.items import Item, item_from_json

__all__ = ["KeptItems"]

_KEY = 40


class KeptItems:
    """A file of items; a context manager that removes it at the end.

    Args:
        path: of the file; replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = bytearray()
        self._places = array("q")

    def __enter__(self) -> KeptItems:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, item: Item) -> None:
        """Note a kept item."""
        self._keys += (item.picture.digest + item.id).encode()
        self._places.append(self._file.tell())
        self._file.write(item.to_json().encode("utf-8", "surrogatepass") + b"\n")

    def in_order(self) -> Iterator[Item]:
        """All items, by the digest of their picture and then by id; of equal ids the first that was noted."""
        self._file.flush()
        keys = np.frombuffer(bytes(self._keys), f"S{_KEY}")
        last = b""
        with self._path.open("rb") as file:
            for index in np.argsort(keys, kind="stable"):
                if keys[index] == last:
                    continue
                last = keys[index]
                file.seek(self._places[int(index)])
                line = file.readline().decode("utf-8", "surrogatepass")
                yield item_from_json(line, str(self._path))
