"""Processes of the store's tests: a writer that adds samples with tensors until it is killed or done, saying each
sample's number, and one that only waits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from qzoom.store.records import RecordWriter, start_store
from qzoom.store.schema import Attention, Provenance, Skip


def records_of(number: int):
    """Two records of a sample, one with tensors that depend on its number."""
    maps = {"grounding": np.full((3, 4), number, np.float32), "sink": np.full((3, 4), -number, np.float32)}
    return [(Skip(f"q{number}", "none"), {}), (Attention(f"r{number}", ((1, number),)), maps)]


def until_told(pipe, *_) -> None:
    """Say that the process is there, and end when told to."""
    pipe.send("started")
    pipe.recv()


def main(folder: Path, count: int, writer: int) -> None:
    start_store(folder, "regions", {"a": 1}, Provenance("m"))
    with RecordWriter(folder, writer) as out:
        for number in range(count):
            if f"s{number}" not in out.done:
                out.append(f"s{number}", records_of(number))
                print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
