"""Ask a model every question of a task and keep what it says.

Each picture is looked at once and all its questions are asked in one session; its questions share the time of that
look. A question that fails is a wrong answer with its reason, never a missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom.errors import ConfigError, HeadsMissingError, QZoomError
from qzoom.evaluation.asking import EvalOptions, ask_many, ask_sample
from qzoom.evaluation.identity import describe_model, describe_software
from qzoom.evaluation.records import AnswerRow, EvalQuestion, EvalSample, Task
from qzoom.evaluation.store import AnswerFile

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["EvalOptions", "run"]


def run(
    model: QZoom,
    task: Task,
    options: EvalOptions,
    *,
    limit: int | None = None,
    output: Path | None = None,
    fresh: bool = False,
    on_picture: Callable[[int, int], None] | None = None,
    batch_size: int = 1,
    all_branches: bool = False,
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
        batch_size: questions answered together; 1 asks picture by picture, each in a session of its own.
        all_branches: see `ask_sample`.

    Returns:
        One row per question, in the task's order.

    Raises:
        HeadsMissingError: zooming was asked of a model that cannot.
        ConfigError, DataError: `output` holds something else.
        QZoomError: not one question could be asked.
    """
    _check(model, options, batch_size)
    ids = task.ids if limit is None else task.ids[:limit]
    store = None
    rows: dict[str, list[AnswerRow]] = {}
    if output is not None:
        settings = {"questions": task.identity, "options": asdict(options), "model": describe_model(model)}
        store = AnswerFile(output, settings, about=describe_software(model), fresh=fresh)
        for row in store.rows:
            rows.setdefault(row.picture, []).append(row)
    done = sum(name in rows for name in ids)
    missing = [index for index, name in enumerate(ids) if name not in rows]
    if on_picture is not None and done:
        on_picture(done, len(ids))
    for samples in _groups(task, missing, batch_size):
        many = _ask(model, samples, options, batch_size, all_branches)
        if store is not None:
            store.append([row for answered in many for row in answered])
        for sample, answered in zip(samples, many, strict=True):
            rows[sample.id] = answered
            done += 1
            if on_picture is not None:
                on_picture(done, len(ids))
    chosen = [row for name in ids for row in rows[name]]
    if chosen and all(row.error for row in chosen):
        raise QZoomError(f"None of {len(chosen)} questions could be asked; the first failed so: {chosen[0].error}")
    return chosen


def _ask(
    model: QZoom, samples: Sequence[EvalSample], options: EvalOptions, batch_size: int, all_branches: bool
) -> list[list[AnswerRow]]:
    """The answers about each picture: of one in a session of its own, of several together."""
    if batch_size > 1:
        return ask_many(model, samples, options)
    return [ask_sample(model, samples[0], options, all_branches=all_branches)]


def _check(model: QZoom, options: EvalOptions, batch_size: int) -> None:
    """Find what is wrong with the settings before the first question."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    needs = options.way.needs_region and options.look != "never"
    if needs and not model.has_region:
        raise HeadsMissingError(
            "This model has no region branch, so it cannot zoom: measure it with zoom 'never', or load a model that "
            "has one."
        )
    model.make_options(coarse_tokens=options.coarse_tokens, **options.of_question())


def _groups(task: Task, indices: Sequence[int], batch_size: int) -> Iterator[list[EvalSample]]:
    """Pictures with at least `batch_size` questions together, the last ones with what is left."""
    group: list[EvalSample] = []
    for index in indices:
        group.append(_sample(task, index))
        if sum(len(sample.questions) for sample in group) >= batch_size:
            yield group
            group = []
    if group:
        yield group


def _sample(task: Task, index: int) -> EvalSample:
    """A picture and its questions; one that cannot be made is a wrong answer with its reason."""
    try:
        return task.sample(index)
    except Exception as problem:  # whatever it is, it must be counted
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        nothing = EvalQuestion("unusable", "", "")
        return EvalSample(task.ids[index], None, (0, 0), (nothing,), reason)
