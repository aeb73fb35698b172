"""Freshly drawn pictures with questions of their own, mixed in so that a small student does not forget.

They are drawn from seeds that training may use; held-out seeds stay unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qzoom.training.tasks import TaskContext

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["draw_replay"]


def draw_replay(seed: int, most: int = 6) -> tuple[PIL.Image.Image, list[tuple[str, str]]]:
    """A document or a scene with some of its questions.

    Args:
        seed: decides the picture, its questions and their order.
        most: questions.

    Returns:
        The picture and its (question, answer) pairs.
    """
    rng = np.random.default_rng(seed)
    context = TaskContext(rng, rng, held_out=False)
    sample = context.document() if rng.random() < 0.5 else context.scene()
    asked = context.some(list(sample.questions), most)
    return sample.image, [(question.question, question.answer) for question in asked]
