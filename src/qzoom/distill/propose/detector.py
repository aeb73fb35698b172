"""Any object detector of transformers: those that take words, and those with classes of their own."""

from __future__ import annotations

import threading
from typing import Any

from qzoom.distill.propose.base import DetectorSettings, Proposal
from qzoom.distill.records import Item
from qzoom.distill.steps import Views
from qzoom.errors import CheckpointError

__all__ = ["DetectorProposer"]


class DetectorProposer:
    """See `qzoom.distill.propose.base.Proposer`. The model is loaded at the first picture; one picture at a time.

    Args:
        settings: with phrases, a zero-shot detector (OWL-ViT, Grounding DINO); without, a plain one (DETR, RT-DETR).
    """

    name = "detector"

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._detect: Any = None
        self._lock = threading.Lock()

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """What is found, the best first.

        Raises:
            CheckpointError: the detector cannot be loaded.
        """
        image = views.whole(item)
        options: dict[str, Any] = {"threshold": self.settings.threshold}
        if self.settings.phrases:
            options["candidate_labels"] = list(self.settings.phrases)
        with self._lock:
            found = self._loaded()(image, **options)
        proposals = [
            Proposal(tuple(entry["box"][side] for side in _SIDES), float(entry["score"]), str(entry["label"]))
            for entry in found
        ]
        return tuple(sorted(proposals, key=lambda one: (-one.score, one.box, one.phrase)))

    def _loaded(self) -> Any:
        if self._detect is None:
            import torch
            import transformers

            settings = self.settings
            device = settings.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            task = "zero-shot-object-detection" if settings.phrases else "object-detection"
            try:
                make: Any = transformers.pipeline
                self._detect = make(
                    task, model=settings.model, revision=settings.revision, device=device, trust_remote_code=False
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(
                    f"The detector {settings.model} cannot be loaded for {task} ({reason}); name one of that kind, "
                    "with phrases only where it takes words."
                ) from error
        return self._detect


_SIDES = ("xmin", "ymin", "xmax", "ymax")
