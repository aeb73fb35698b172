"""Held-out synthetic images: documents and scenes from seeds that no training run may use.

Each image is drawn from its seed with the fonts that every installation has, so that a command asks the same questions
everywhere. An answer box that covers the whole image is ignored, so that such questions do not count in the hit rate.
"""

from __future__ import annotations

from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.errors import ConfigError

SYNTHETIC_TASKS = ("documents", "scenes")


def open_synthetic(name: str, first: int, count: int) -> Task:
    """Held-out pictures from number `first` on; more may be added to a run (ConfigError: numbers outside the held-out
    range)."""
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    room = len(HELD_OUT_SEEDS)
    if first < 0 or count < 1 or first + count > room:
        raise ConfigError(
            f"Held-out pictures are numbered 0 to {room - 1}; seed {first} with {count} pictures lies outside."
        )
    ids = tuple(f"{name}-{first + i}" for i in range(count))
    return Task(name, ids, {"task": name, "seed": first}, lambda number: _draw(name, first + number))


def _draw(name: str, number: int) -> Sample:
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS
    from qzoom.data.synthetic.scenes import render_scene

    render = render_document if name == "documents" else render_scene
    drawn = render(HELD_OUT_SEEDS[number], font_set="core", reword=False)
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
    return Sample(f"{name}-{number}", drawn.image, drawn.image.size, questions)
