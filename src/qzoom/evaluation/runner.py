"""Ask a model every question of a task and keep what it says.

Each picture is looked at once and all its questions are asked in one session; its questions share the time of that
look. A question that fails is a wrong answer with its reason, never a missing one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.config import TokenBudget
from qzoom.errors import HeadsMissingError, QZoomError
from qzoom.evaluation.identity import describe_model, describe_software
from qzoom.evaluation.records import AnswerRow, EvalSample, Task
from qzoom.evaluation.store import AnswerFile
from qzoom.types import ZoomMode

if TYPE_CHECKING:
    from qzoom.engine.session import Session
    from qzoom.model import QZoom

__all__ = ["EvalOptions", "run"]


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How every question is asked.

    Args:
        zoom: "auto", "never" or "always".
        coarse_tokens: limits of the coarse look; None for the model's own.
        region_tokens: limits of all regions together; None for the model's own.
        gate_threshold: None for the checkpoint's.
        region_threshold: None for the checkpoint's.
        max_new_tokens: most tokens of an answer.
    """

    zoom: ZoomMode = "auto"
    coarse_tokens: TokenBudget | None = None
    region_tokens: TokenBudget | None = None
    gate_threshold: float | None = None
    region_threshold: float | None = None
    max_new_tokens: int = 128

    def of_question(self) -> dict[str, Any]:
        """Keyword arguments of `Session.ask`."""
        return {
            "zoom": self.zoom,
            "region_tokens": self.region_tokens,
            "gate_threshold": self.gate_threshold,
            "region_threshold": self.region_threshold,
            "max_new_tokens": self.max_new_tokens,
        }


def run(
    model: QZoom,
    task: Task,
    options: EvalOptions,
    *,
    limit: int | None = None,
    output: Path | None = None,
    fresh: bool = False,
    on_picture: Callable[[int, int], None] | None = None,
) -> list[AnswerRow]:
    """Ask everything, or what is left of it.

    Args:
        model: the model under test.
        task: pictures, questions and right answers.
        options: how to ask.
        limit: the first so many pictures only.
        output: file of the raw answers; a rerun with the same settings continues it.
        fresh: start `output` anew.
        on_picture: told (pictures done, pictures in all) after each.

    Returns:
        One row per question, in the task's order.

    Raises:
        HeadsMissingError: zooming was asked of a model that cannot.
        ConfigError, DataError: `output` holds something else.
        QZoomError: not one question could be asked.
    """
    if options.zoom != "never" and not model.has_region:
        raise HeadsMissingError(
            "This model has no region branch, so it cannot zoom: measure it with zoom 'never', or load a model that "
            "has one."
        )
    model.make_options(coarse_tokens=options.coarse_tokens, **options.of_question())
    ids = task.ids if limit is None else task.ids[:limit]
    store = None
    rows: dict[str, list[AnswerRow]] = {}
    if output is not None:
        settings = {"questions": task.identity, "options": asdict(options), "model": describe_model(model)}
        store = AnswerFile(output, settings, about=describe_software(model), fresh=fresh)
        for row in store.rows:
            rows.setdefault(row.picture, []).append(row)
    for done, name in enumerate(ids, start=1):
        if name not in rows:
            rows[name] = answer_sample(model, task.sample(done - 1), options)
            if store is not None:
                store.append(rows[name])
        if on_picture is not None:
            on_picture(done, len(ids))
    chosen = [row for name in ids for row in rows[name]]
    if chosen and all(row.error for row in chosen):
        raise QZoomError(f"None of {len(chosen)} questions could be asked; the first failed so: {chosen[0].error}")
    return chosen


def answer_sample(model: QZoom, sample: EvalSample, options: EvalOptions) -> list[AnswerRow]:
    """All questions about one picture; errors become rows too."""
    session: Session | None = None
    error = None
    start = time.perf_counter()
    try:
        session = model.session(sample.image, coarse_tokens=options.coarse_tokens)
    except Exception as problem:  # whatever it is, it must be counted
        error = _reason(problem)
    share = (time.perf_counter() - start) / len(sample.questions)
    return [_answer(session, error, sample, index, options, share) for index in range(len(sample.questions))]


def _answer(
    session: Session | None, error: str | None, sample: EvalSample, index: int, options: EvalOptions, share_s: float
) -> AnswerRow:
    asked = sample.questions[index]
    known: dict[str, Any] = {
        "picture": sample.id,
        "index": index,
        "count": len(sample.questions),
        "field": asked.field,
        "question": asked.question,
        "answer": asked.answer,
        "boxes": asked.boxes,
        "easy": asked.easy,
        "size_px": sample.size_px,
    }
    if session is None:
        return AnswerRow(**known, seconds=round(share_s, 6), error=error)
    start = time.perf_counter()
    try:
        said = session.ask(asked.question, **options.of_question())
    except Exception as problem:  # whatever it is, it must be counted
        return AnswerRow(**known, seconds=round(share_s + time.perf_counter() - start, 6), error=_reason(problem))
    return AnswerRow(
        **known,
        seconds=round(share_s + time.perf_counter() - start, 6),
        prediction=said.text,
        finish_reason=said.finish_reason,
        gate=said.gate,
        regions=said.regions,
        usage=said.usage,
        timing_ms={name: round(ms, 2) for name, ms in said.timing_ms.items()},
    )


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, QZoomError) else f"{type(problem).__name__}: {text}"
