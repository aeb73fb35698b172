"""The receipts task for lmms-eval: the same file, questions and metrics as `qzoom eval receipts`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image, ImageOps

from qzoom.data.questions import read_receipts
from qzoom.errors import ConfigError
from qzoom.scoring.metrics import METRICS


class ReceiptsTask(ConfigurableMessagesTask):
    """A task whose rows come from the checked question file instead of the hub."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the file that QZOOM_RECEIPTS names, one row a question (ConfigError: the variable is not set; DataError:
        the file cannot be used)."""
        folder = os.environ.get("QZOOM_RECEIPTS")
        if not folder:
            raise ConfigError(
                "The task qzoom_receipts needs the environment variable QZOOM_RECEIPTS: the receipts' folder."
            )
        task = read_receipts(Path(folder), os.environ.get("QZOOM_RECEIPTS_SPLIT", "dev"))
        rows = [
            {"id": f"{s.id}-{i}", "picture": str(s.image), "field": q.field, "question": q.question, "answer": q.answer}
            for s in task
            for i, q in enumerate(s.questions)
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The receipt, turned upright."""
    with Image.open(doc["picture"]) as image:
        return [ImageOps.exif_transpose(image).convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question as it stands in the file."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match as in `qzoom eval`, and ANLS."""
    return {name: METRICS[name].strict(results[0], (doc["answer"],), ()) for name in ("exact_match", "anls")}
