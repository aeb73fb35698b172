"""Held-out synthetic images: documents and scenes from seeds that no training run may use.

Each image is drawn from its seed with the fonts that every installation has, so that a command asks the same questions
everywhere. An answer box that covers the whole image is ignored, so that such questions do not count in the hit rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qzoom.data.samples import Sample, SampleQuestion
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from qzoom.data.synthetic.page import SyntheticSample

SYNTHETIC_TASKS = ("documents", "scenes")


@dataclass(frozen=True, slots=True)
class SyntheticTask:
    """`count` held-out pictures from number `first` on; see `qzoom.data.samples.Task`."""

    name: str
    first: int
    count: int

    @property
    def fields(self) -> tuple[str, ...]:
        """None: the fields are those that the pictures happen to show."""
        return ()

    @property
    def ids(self) -> tuple[str, ...]:
        """The pictures' ids."""
        return tuple(f"{self.name}-{self.first + i}" for i in range(self.count))

    @property
    def identity(self) -> dict[str, Any]:
        """The task and its first number; more pictures may be added to a run."""
        return {"task": self.name, "seed": self.first}

    def sample(self, index: int) -> Sample:
        """Draw one picture."""
        from qzoom.data.synthetic.page import HELD_OUT_SEEDS

        drawn = _renderer(self.name)(HELD_OUT_SEEDS[self.first + index])
        whole = (0, 0, *drawn.image.size)
        questions = tuple(
            SampleQuestion(
                q.field,
                q.question,
                q.answer,
                tuple(box for box in q.boxes if box != whole),
                q.easy,
                negative=q.answer == "no" and not q.boxes,
            )
            for q in drawn.questions
        )
        return Sample(self.ids[index], drawn.image, drawn.image.size, questions)


def open_synthetic(name: str, seed: int, count: int) -> SyntheticTask:
    """The task of a name.

    Args:
        name: "documents" or "scenes".
        seed: number of the first held-out picture, from 0.
        count: how many pictures.

    Raises:
        ConfigError: numbers outside the held-out range.
    """
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    room = len(HELD_OUT_SEEDS)
    if seed < 0 or count < 1 or seed + count > room:
        raise ConfigError(
            f"Held-out pictures are numbered 0 to {room - 1}; seed {seed} with {count} pictures lies outside."
        )
    return SyntheticTask(name, seed, count)


def _renderer(name: str) -> Callable[[int], SyntheticSample]:
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.scenes import render_scene

    render = render_document if name == "documents" else render_scene
    return lambda seed: render(seed, font_set="core", reword=False)
