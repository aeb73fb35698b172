"""Bring files of schema 1 into the form that qzoom reads today (`qzoom.store.log`): answers, steps and records.

    python benchmarks/convert_stores.py runs/scenes.jsonl out/steps labels/regions ...

Each path is an answer file, a step file, or a folder that is searched for them and for folders of records. Every file
is replaced at once and only after all of it was read; what is in schema 2 already is left alone. Ids do not change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qzoom.store.log import SCHEMA, write_atomic

Line = tuple[str, list[Any]]


def convert(path: Path) -> list[Path]:
    """Convert a file, or all files below a folder, and return what was rewritten."""
    done = []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        header = rows[0] if rows and isinstance(rows[0], dict) else {}
        records = file.with_name("store.json")
        if records.exists() and file.name.startswith("records-"):
            there = json.loads(records.read_text())
            settings = {"settings": there["settings"], "provenance": there["provenance"]}
            _write(file, {"purpose": there["purpose"], "settings": settings, "about": {}}, _samples(rows))
        elif header.get("schema") == 1 and "step" in header:
            lines = [(row["in"], row["out"]) for row in rows[1:]]
            _write(file, {"purpose": header["step"], "settings": header["settings"], "about": {}}, lines)
        elif header.get("schema") == 1 and "settings" in header:
            about = {"purpose": "answers", "settings": header["settings"], "about": header.get("about") or {}}
            _write(file, about, _pictures(rows[1:]))
        else:
            continue
        done.append(file)
    for folder in {file.parent for file in done}:
        (folder / "store.json").unlink(missing_ok=True)
    return done


def _samples(rows: list[dict[str, Any]]) -> Iterable[Line]:
    items: list[Any] = []
    for row in rows:
        items.append({name: row[name] for name in ("id", "kind", "tensors", "values")})
        if len(items) == row["part"][1]:
            yield row["sample"], items
            items = []


def _pictures(rows: list[dict[str, Any]]) -> Iterable[Line]:
    items: list[Any] = []
    for row in rows:
        items.append(row)
        if len(items) == row["count"]:
            yield row["picture"], items
            items = []


def _write(file: Path, header: dict[str, Any], lines: Iterable[Line]) -> None:
    out = [{"schema": SCHEMA} | header, *({"key": key, "items": items} for key, items in lines)]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in out)
    write_atomic(file, text.encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="+", type=Path, help="answer files, step files, or folders")
    for given in parser.parse_args().paths:
        for converted in convert(given):
            print(converted)
