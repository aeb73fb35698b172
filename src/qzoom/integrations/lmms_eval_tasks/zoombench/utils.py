"""ZoomBench for lmms-eval: the same table, prompts and metrics as `qzoom eval zoombench`.

A row that cannot be used is asked as an empty picture and scores 0, so that the denominator stays the table's length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from qzoom.data.benchmarks.table import open_table
from qzoom.data.benchmarks.zoombench import ZOOMBENCH
from qzoom.data.samples import Sample, Task
from qzoom.errors import ConfigError
from qzoom.evaluation.zoom_views import GapSettings, region_task
from qzoom.scoring.metrics import METRICS

_TIGHT = GapSettings(crop_margin=0.0, crop_min_px=1)


class ZoomBenchTask(ConfigurableMessagesTask):
    """A task whose rows are numbers of rows in the table, which stays where it is until a row is asked."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Open the table from the hub or the folder QZOOM_ZOOMBENCH (ConfigError: an unknown view; DataError: no such
        table)."""
        _view()
        rows = [_row(number) for number in range(len(_table().ids))]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture, or its region; an empty one for a row that cannot be used."""
    sample = _shown(int(doc["number"]))
    return [sample.image if isinstance(sample.image, Image.Image) else Image.new("RGB", (64, 64), "white")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The prompt, with one instruction for all rows of a kind."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, tuple[str, float]]:
    """(kind, score) as strict and as the release reads the answer; `mcq` and `blank` are the strict one again."""
    strict = harness = 0.0
    if not doc["error"]:
        metric = METRICS[doc["metric"]]
        answers, choices = (doc["answer"],), tuple(doc["choices"])
        strict = metric.strict(results[0], answers, choices)
        harness = metric.harness(results[0], answers, choices)
    kind = str(doc["kind"])
    return {
        "strict": (kind, strict),
        "harness": (kind, harness),
        "mcq": ("mcq" if kind == "mcq" else "", strict),
        "blank": ("blank" if kind == "blank" else "", strict),
    }


def mean_of_all(items: Sequence[tuple[str, float]]) -> float:
    """Mean over every row of the table."""
    return sum(value for _, value in items) / len(items) if items else 0.0


def mean_of_kind(items: Sequence[tuple[str, float]]) -> float:
    """Mean over the rows of one kind, those that name it."""
    return mean_of_all([item for item in items if item[0]])


def _row(number: int) -> dict[str, Any]:
    """What is asked; the picture is made too, so that a damaged one and an empty region are known before."""
    sample = _shown(number)
    question = sample.questions[0]
    return {
        "number": number,
        "question": question.question or "?",
        "answer": question.answer,
        "kind": question.field,
        "metric": question.metric,
        "choices": list(question.choices),
        "error": sample.error or "",
    }


def _shown(number: int) -> Sample:
    """A row in the view asked for; with a reason where its picture or region cannot be used."""
    sample = _table().sample(number)
    if _view() == "region" and sample.error is None and sample.questions[0].boxes:
        return region_task(_table(), "region", ((sample.id, number, 0),), _TIGHT, 1).sample(0)
    return sample


@cache
def _table() -> Task:
    folder = os.environ.get("QZOOM_ZOOMBENCH")
    revision = os.environ.get("QZOOM_ZOOMBENCH_REVISION")
    return open_table(ZOOMBENCH, data=Path(folder) if folder else None, revision=revision)


def _view() -> str:
    view = os.environ.get("QZOOM_ZOOMBENCH_VIEW", "full")
    if view not in ("full", "region"):
        raise ConfigError(f"QZOOM_ZOOMBENCH_VIEW must be full or region, not {view!r}.")
    return view
