"""Ask a model every question of a task and store the answers.

Each image is encoded once, and all its questions are asked in one session and share the time of that pass. Questions
may also be asked in batches. A question that fails becomes a wrong answer with its reason; a rerun asks it again where
that reason may pass (`qzoom.errors.may_pass`). Only errors that concern the whole run are raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

import qzoom
from qzoom.checkpoints.weights import weights_digest
from qzoom.config import TokenBudget
from qzoom.data.samples import ANSWERS, AnswerRow, Sample, SampleQuestion, Task, rows_of
from qzoom.engine.chat import read_conversation
from qzoom.engine.request import Options
from qzoom.errors import ConfigError, HeadsMissingError, QZoomError, may_pass
from qzoom.evaluation.flops import shape_of
from qzoom.evaluation.methods import METHODS, Method
from qzoom.evaluation.methods.base import Answered, ask_kwargs, with_needed_branches
from qzoom.model import QZoom
from qzoom.settings import Between, Share, settings
from qzoom.store.log import LogWriter
from qzoom.types import SamplingParams, ZoomMode


def describe_model(model: QZoom) -> dict[str, Any]:
    """Fingerprint of what decides a model's answers: weights, arithmetic, number format, kind of device, attention."""
    backbone = model.engine.backbone
    return {
        "weights": weights_digest(model.engine),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "attention": str(backbone.model.config._attn_implementation),
        "config": model.config.to_dict(),
    }


def describe_software(model: QZoom) -> dict[str, Any]:
    """What ran, for the reader: the model's name and sizes and the versions of the libraries."""
    import transformers

    try:
        shape = shape_of(model.engine).to_dict()
    except ConfigError:  # a family whose operations are not counted
        shape = None
    config = model.config
    costs = {"decide_by": config.decide_by, "answer_tokens": config.answer_tokens, "sparse": config.box.sparse}
    return {
        "model": model.name,
        "shape": shape,
        "qzoom": qzoom.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    } | ({} if (config.decide_by, config.box.sparse) == ("gate", None) else costs)


@settings(prefix=False)
class EvalOptions:
    """How every question of a run is asked; stored with its answers."""

    zoom: ZoomMode = "auto"
    """Mode of the method "qzoom"."""
    coarse_tokens: TokenBudget | None = None
    """Limits of the coarse view; None for the model's own."""
    region_tokens: TokenBudget | None = None
    """Limits of all regions together; None for the model's own."""
    gate_threshold: Share | None = None
    """Zoom from this score on; None for the checkpoint's."""
    region_threshold: Share | None = None
    """See `ZoomConfig.region_threshold`; None for the checkpoint's."""
    max_new_tokens: Annotated[int, Between(1, 10**6)] = 128
    """Maximum number of tokens of an answer."""
    method: str = "qzoom"
    """Name in `qzoom.evaluation.methods.METHODS`."""
    temperature: Annotated[float, Between(0, 100)] = 0.0
    """0 is greedy; otherwise answers are sampled."""
    seed: int = 0
    """Of everything sampled: answers with a temperature, boxes of the method "random"."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"No method {self.method!r}; known methods: {', '.join(METHODS)}.")
        if self.temperature and not self.is_engine:
            raise ConfigError(f"The method {self.method!r} answers greedily; leave out temperature.")

    @property
    def is_engine(self) -> bool:
        """Whether the engine itself answers, so that questions can be batched and sampled."""
        return METHODS[self.method].run is None

    @property
    def answerer(self) -> Method:
        """The method, with this seed where it samples."""
        method = METHODS[self.method]
        if not method.draws or method.run is None:
            return method
        return dataclasses.replace(method, run=functools.partial(method.run, seed=self.seed))

    @property
    def zoom_mode(self) -> ZoomMode:
        """Zoom mode to assume when a token budget is split; "never" if the method reads no region."""
        method = METHODS[self.method]
        if method.run is None:
            return method.zoom or self.zoom
        return "always" if method.zooms else "never"

    @property
    def is_random(self) -> bool:
        """Whether another seed may give other answers."""
        return self.temperature > 0 or METHODS[self.method].draws

    def to_engine(self, seed: int | None = None) -> Options:
        """The same as the engine's options. `seed`: of the question, see `question_seed`."""
        return Options(
            zoom=self.zoom_mode,
            sampling=SamplingParams(self.max_new_tokens, self.temperature, seed=seed),
            gate_threshold=self.gate_threshold,
            region_threshold=self.region_threshold,
            coarse_tokens=self.coarse_tokens,
            region_tokens=self.region_tokens,
        )

    def question_seed(self, picture: str, index: int) -> int | None:
        """A question's own seed, whatever it is asked together with; None without a temperature."""
        if not self.temperature:
            return None
        digest = hashlib.sha256(f"{self.seed}|{picture}|{index}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


@dataclasses.dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why a question has no answer."""

    reason: str
    passing: bool  # the reason may pass

    @classmethod
    def of(cls, problem: Exception) -> NoAnswer:
        """What an exception says; its kind too where it is none of qzoom's."""
        text = " ".join(str(problem).split())
        text = text if isinstance(problem, QZoomError) else f"{type(problem).__name__}: {text}"
        return cls(text, may_pass(problem))

    @classmethod
    def in_sample(cls, sample: Sample) -> NoAnswer | None:
        """What makes a picture unusable; None for one that can be asked about."""
        return None if sample.error is None else cls(sample.error or _NOT_ASKED.reason, sample.passing)


_NOT_ASKED = NoAnswer("The question was not asked.", passing=False)


def ask_sample(model: QZoom, sample: Sample, options: EvalOptions, *, all_branches: bool = False) -> list[AnswerRow]:
    """All questions about one picture in one session; they share the time of the coarse pass. `all_branches`: run gate
    and region branch in the session's prefix even if the method does not use them."""
    if not all_branches:
        model = with_needed_branches(model, options.answerer, options.zoom_mode)
    session = None
    failure = NoAnswer.in_sample(sample)
    start = time.perf_counter()
    if failure is None:
        try:
            session = model.session(sample.image, coarse_tokens=options.coarse_tokens)
        except Exception as problem:  # whatever it is, it must be counted
            failure = NoAnswer.of(problem)
    share = (time.perf_counter() - start) / len(sample.questions)
    rows = []
    for index, question in enumerate(sample.questions):
        values = _question_values(model, sample, index, options)
        start = time.perf_counter()
        answer: Answered | NoAnswer = failure or _NOT_ASKED
        if session is not None:
            try:
                engine_options = options.to_engine(options.question_seed(sample.id, index))
                answer = options.answerer.answer(model, session, question, engine_options)
            except Exception as problem:  # whatever it is, it must be counted
                answer = NoAnswer.of(problem)
        rows.append(_row(values, answer, share + time.perf_counter() - start))
    return rows


def ask_many(model: QZoom, samples: Sequence[Sample], options: EvalOptions) -> list[list[AnswerRow]]:
    """The questions about several pictures as one batch, whose time they share.

    Where the batch fails, each picture is asked alone to find the question that failed; so are those of other methods.
    """
    questions = [(s, i) for s in samples if s.error is None for i in range(len(s.questions))]
    if len(questions) < 2 or not options.is_engine:
        return [ask_sample(model, sample, options) for sample in samples]
    values = ask_kwargs(options.to_engine()) | {
        "coarse_tokens": options.coarse_tokens,
        "seed": [options.question_seed(sample.id, index) for sample, index in questions],
    }
    start = time.perf_counter()
    try:
        answers = model.ask_batch([(s.image, s.questions[i].question) for s, i in questions], **values)
    except Exception:
        return [ask_sample(model, sample, options) for sample in samples]
    share = (time.perf_counter() - start) / len(questions)
    by_question: dict[tuple[str, int], Answered] = {
        (s.id, i): (answer, {}) for (s, i), answer in zip(questions, answers, strict=True)
    }
    return [
        [
            _row(
                _question_values(model, s, i, options),
                by_question.get((s.id, i)) or NoAnswer.in_sample(s) or _NOT_ASKED,
                share if s.error is None else 0.0,
            )
            for i in range(len(s.questions))
        ]
        for s in samples
    ]


def _question_values(model: QZoom, sample: Sample, index: int, options: EvalOptions) -> dict[str, Any]:
    """The fields of a row that do not depend on the answer."""
    question = sample.questions[index]
    values = {f.name: getattr(question, f.name) for f in dataclasses.fields(question)}
    values |= {"picture": sample.id, "index": index, "count": len(sample.questions), "size_px": sample.size_px}
    if sample.error is None:
        values |= {"prompt": _prompt(model, question.question), "coarse_size_px": _coarse_size(model, sample, options)}
    return values


def _prompt(model: QZoom, question: str) -> str:
    """The rendered conversation, one placeholder per picture; empty for a question that cannot be encoded."""
    try:
        ids = model.chat.encode(read_conversation([None], question))
    except QZoomError:
        return ""
    return str(model.engine.backbone.tokenizer.decode(ids, skip_special_tokens=False))


def _coarse_size(model: QZoom, sample: Sample, options: EvalOptions) -> tuple[int, int] | None:
    """Width and height in pixels that the coarse view resizes to."""
    backbone = model.engine.backbone
    limits = options.coarse_tokens or model.config.coarse_tokens or backbone.default_budget()
    try:
        rows, columns = backbone.grid(sample.size_px, limits)
    except (QZoomError, ValueError, ZeroDivisionError):
        return None
    return columns * backbone.token_px, rows * backbone.token_px


def _row(values: dict[str, Any], answer: Answered | NoAnswer, seconds: float) -> AnswerRow:
    """The row of an answer, or of the reason why there is none."""
    seconds = round(seconds, 6)
    if isinstance(answer, NoAnswer):
        return AnswerRow(**values, seconds=seconds, error=answer.reason, passing=answer.passing)
    result, extra = answer
    return AnswerRow(
        **values,
        seconds=seconds,
        prediction=result.text,
        finish_reason=result.finish_reason,
        gate=result.gate,
        regions=result.regions,
        usage=result.usage,
        timing_ms={name: round(ms, 2) for name, ms in result.timing_ms.items()},
        extra=extra,
    )


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
    """Ask all questions, or those that are not stored yet or failed for a reason that may pass.

    Args:
        output: file of the answers; a rerun with the same settings resumes it.
        on_picture: called with (pictures done, pictures in all) after each.
        batch_size: questions answered together; 1 asks picture by picture, each in a session of its own.

    Returns:
        One row per question, in the task's order.

    Raises:
        HeadsMissingError: zooming was asked of a model that cannot.
        ConfigError, DataError: `output` holds something else.
        QZoomError: not one question could be asked.
    """
    _check(model, options, batch_size)
    ids = task.ids if limit is None else task.ids[:limit]
    rows: dict[str, list[AnswerRow]] = {}
    with contextlib.ExitStack() as stack:
        log = None
        if output is not None:
            log = stack.enter_context(_open_log(output, model, task, options, fresh=fresh))
            rows = {name: group for name, group in rows_of(log).items() if not any(row.passing for row in group)}
        done = sum(name in rows for name in ids)
        missing = [index for index, name in enumerate(ids) if name not in rows]
        if on_picture is not None and done:
            on_picture(done, len(ids))
        for samples in _groups(task, missing, batch_size):
            if batch_size > 1:
                groups = ask_many(model, samples, options)
            else:
                groups = [ask_sample(model, samples[0], options, all_branches=all_branches)]
            for sample, group in zip(samples, groups, strict=True):
                rows[sample.id] = group
                if log is not None:
                    log.append(sample.id, [row.to_dict() for row in group])
                done += 1
                if on_picture is not None:
                    on_picture(done, len(ids))
    chosen = [row for name in ids for row in rows[name]]
    if chosen and all(row.error for row in chosen):
        raise QZoomError(f"None of {len(chosen)} questions could be asked; the first failed so: {chosen[0].error}")
    return chosen


def _open_log(output: Path, model: QZoom, task: Task, options: EvalOptions, *, fresh: bool) -> LogWriter:
    """The file of the answers; its header is what a rerun must agree with (ConfigError, DataError: it holds something
    else)."""
    header = {"questions": task.identity, "options": dataclasses.asdict(options), "model": describe_model(model)}
    return LogWriter(output, ANSWERS, header, about=describe_software(model), fresh=fresh, repeats=True)


def _check(model: QZoom, options: EvalOptions, batch_size: int) -> None:
    """Find what is wrong with the settings before the first question."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    answers_anyway = ("never", "auto") if options.is_engine else ("never",)
    if options.answerer.needs_region and options.zoom_mode not in answers_anyway and not model.has_region:
        raise HeadsMissingError(
            'This model has no region branch, so it cannot zoom: measure it with zoom "auto" or "never", or load a '
            "model that has one."
        )
    model.make_options(coarse_tokens=options.coarse_tokens, **ask_kwargs(options.to_engine()))


def _groups(task: Task, indices: Sequence[int], batch_size: int) -> Iterator[list[Sample]]:
    """Pictures with at least `batch_size` questions together, the last ones with what is left."""
    group: list[Sample] = []
    for index in indices:
        group.append(_sample(task, index))
        if sum(len(sample.questions) for sample in group) >= batch_size:
            yield group
            group = []
    if group:
        yield group


def _sample(task: Task, index: int) -> Sample:
    """A picture and its questions; one that cannot be made is a wrong answer with its reason."""
    try:
        return task.sample(index)
    except Exception as problem:  # whatever it is, it must be counted
        failure = NoAnswer.of(problem)
        nothing = SampleQuestion("unusable", "", "")
        return Sample(task.ids[index], None, (0, 0), (nothing,), failure.reason, failure.passing)
