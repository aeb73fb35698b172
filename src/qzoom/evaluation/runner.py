"""What decides an evaluation's answers, as JSON values, so that a run is never continued by another model.

Weights are told apart by a digest of values taken from every tensor, which costs little even for large models.

How the questions about pictures are asked: in one session per picture, by another method, or many at once.

Whatever goes wrong with a question becomes a wrong answer with its reason; only what concerns the whole run is raised.

Ask a model every question of a task and keep what it says.

Each picture is looked at once and all its questions are asked in one session; its questions share the time of that
look. A question that fails is a wrong answer with its reason, never a missing one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.config import TokenBudget
from qzoom.data.samples import AnswerRow, EvalQuestion, EvalSample, Task
from qzoom.errors import ConfigError, HeadsMissingError, QZoomError
from qzoom.evaluation.methods import METHODS, Budget, Method, MethodAnswer
from qzoom.evaluation.methods.base import OwnWay, answer_of, with_needed_branches
from qzoom.evaluation.store import AnswerFile
from qzoom.types import ZoomMode

if TYPE_CHECKING:
    import torch

    from qzoom.engine.state import Engine
    from qzoom.model import QZoom

__all__ = ["EvalOptions", "ask_many", "ask_sample", "describe_model", "describe_software", "run", "weights_digest"]


_VALUES_PER_TENSOR = 512


def describe_model(model: QZoom) -> dict[str, Any]:
    """Weights digest, arithmetic, number format, kind of device and attention of a model."""
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
    import torch
    import transformers

    import qzoom
    from qzoom.evaluation.flops import shape_of

    return {
        "model": model.name,
        "shape": shape_of(model.engine).to_dict(),
        "qzoom": qzoom.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def weights_digest(engine: Engine) -> str:
    """Sixteen hex digits that change with the weights of the backbone, the gate or the region branch."""
    import torch

    digest = hashlib.sha256()
    parts: list[tuple[str, torch.nn.Module | None]] = [
        ("base", engine.backbone.model),
        ("gate", engine.gate),
        ("region", engine.region),
    ]
    for part, module in parts:
        if module is None:
            continue
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // _VALUES_PER_TENSOR)
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[::step].to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class EvalOptions:
    """How every question is asked.

    Args:
        zoom: "auto", "never" or "always"; what the method "qzoom" does.
        coarse_tokens: limits of the coarse look; None for the model's own.
        region_tokens: limits of all regions together; None for the model's own.
        gate_threshold: None for the checkpoint's.
        region_threshold: None for the checkpoint's.
        max_new_tokens: most tokens of an answer.
        method: name in `qzoom.evaluation.methods.METHODS`.
        temperature: 0 is greedy; otherwise answers are drawn.
        seed: of everything drawn: answers with a temperature, places of the method "random".

    Raises:
        ConfigError: an unknown method, or a temperature for one that cannot draw.
    """

    zoom: ZoomMode = "auto"
    coarse_tokens: TokenBudget | None = None
    region_tokens: TokenBudget | None = None
    gate_threshold: float | None = None
    region_threshold: float | None = None
    max_new_tokens: int = 128
    method: str = "qzoom"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"No method {self.method!r}; known methods: {', '.join(METHODS)}.")
        if self.temperature and not isinstance(METHODS[self.method], OwnWay):
            raise ConfigError(f"The method {self.method!r} answers greedily; leave out temperature.")

    @property
    def way(self) -> Method:
        """The method, with this seed where it draws."""
        method: Any = METHODS[self.method]
        return dataclasses.replace(method, seed=self.seed) if hasattr(method, "seed") else method

    @property
    def look(self) -> ZoomMode:
        """What limits on tokens have to reckon with: "never" for methods that read no regions."""
        own = METHODS[self.method]
        if isinstance(own, OwnWay):
            return own.zoom or self.zoom
        return "always" if own.zooms else "never"

    @property
    def draws(self) -> bool:
        """Whether another seed may give other answers."""
        return self.temperature > 0 or (hasattr(METHODS[self.method], "seed") and self.method == "random")

    def of_question(self, seed: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `Session.ask`."""
        return {
            "zoom": self.look,
            "region_tokens": self.region_tokens,
            "gate_threshold": self.gate_threshold,
            "region_threshold": self.region_threshold,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": seed,
        }


def ask_sample(
    model: QZoom, sample: EvalSample, options: EvalOptions, *, all_branches: bool = False
) -> list[AnswerRow]:
    """All questions about one picture, which is looked at once; they share the time of that look.

    Args:
        model: the model under test.
        sample: the picture and its questions.
        options: how to ask.
        all_branches: let the look pay for gate and region branch even if the method never asks them.
    """
    if not all_branches:
        model = with_needed_branches(model, options.way, options.look)
    session = None
    error = sample.error
    start = time.perf_counter()
    if error is None:
        try:
            session = model.session(sample.image, coarse_tokens=options.coarse_tokens)
        except Exception as problem:  # whatever it is, it must be counted
            error = _reason(problem)
    share = (time.perf_counter() - start) / len(sample.questions)
    rows = []
    for index, question in enumerate(sample.questions):
        known = _known(model, sample, index, options)
        start = time.perf_counter()
        said: MethodAnswer | str = error or ""
        if session is not None:
            try:
                said = _answer(model, session, sample, question, index, options)
            except Exception as problem:  # whatever it is, it must be counted
                said = _reason(problem)
        rows.append(_row(known, said, share + time.perf_counter() - start))
    return rows


def ask_many(model: QZoom, samples: Sequence[EvalSample], options: EvalOptions) -> list[list[AnswerRow]]:
    """The questions about several pictures as one batch, which they share the time of.

    A question that the batch stumbles over is found by asking each picture alone; so are those of other methods.
    """
    asked = [(s, i) for s in samples if s.error is None for i in range(len(s.questions))]
    if len(asked) < 2 or not isinstance(METHODS[options.method], OwnWay):
        return [ask_sample(model, sample, options) for sample in samples]
    seeds = [_seed(options, sample.id, index) for sample, index in asked]
    given = options.of_question() | {"coarse_tokens": options.coarse_tokens, "seed": seeds}
    start = time.perf_counter()
    try:
        said = model.ask_batch([(s.image, s.questions[i].question) for s, i in asked], **given)
    except Exception:
        return [ask_sample(model, sample, options) for sample in samples]
    share = (time.perf_counter() - start) / len(asked)
    answers = {(s.id, i): answer_of(a, share) for (s, i), a in zip(asked, said, strict=True)}
    return [
        [
            _row(
                _known(model, s, i, options), answers.get((s.id, i)) or s.error or "", share if s.error is None else 0.0
            )
            for i in range(len(s.questions))
        ]
        for s in samples
    ]


def _answer(
    model: QZoom, session: Any, sample: EvalSample, question: EvalQuestion, index: int, options: EvalOptions
) -> MethodAnswer:
    if isinstance(METHODS[options.method], OwnWay):
        return answer_of(session.ask(question.question, **options.of_question(_seed(options, sample.id, index))), 0.0)
    budget = Budget(
        coarse=options.coarse_tokens,
        region=options.region_tokens,
        max_new_tokens=options.max_new_tokens,
        gate_threshold=options.gate_threshold,
        region_threshold=options.region_threshold,
        zoom=options.zoom,
    )
    return options.way.answer(model, session, question, budget)


def _seed(options: EvalOptions, picture: str, index: int) -> int | None:
    """A question's own seed, whatever it is asked together with."""
    if not options.temperature:
        return None
    digest = hashlib.sha256(f"{options.seed}|{picture}|{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _known(model: QZoom, sample: EvalSample, index: int, options: EvalOptions) -> dict[str, Any]:
    """What a row says whatever the answer is."""
    asked = sample.questions[index]
    known = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    known |= {"picture": sample.id, "index": index, "count": len(sample.questions), "size_px": sample.size_px}
    if sample.error is None:
        known |= {"prompt": _prompt(model, asked.question), "coarse_size_px": _coarse_size(model, sample, options)}
    return known


def _prompt(model: QZoom, question: str) -> str:
    """The conversation as the model reads it, one placeholder per picture; empty for a question it cannot take."""
    from qzoom.engine.chat import read_conversation

    try:
        ids = model._chat.encode(read_conversation([None], question))
    except QZoomError:
        return ""
    return str(model.engine.backbone.tokenizer.decode(ids, skip_special_tokens=False))


def _coarse_size(model: QZoom, sample: EvalSample, options: EvalOptions) -> tuple[int, int] | None:
    """Width and height in pixels that the coarse look resizes to."""
    backbone = model.engine.backbone
    limits = options.coarse_tokens or model.config.coarse_tokens or backbone.default_budget()
    try:
        rows, columns = backbone.grid(sample.size_px, limits)
    except (QZoomError, ValueError, ZeroDivisionError):
        return None
    return columns * backbone.token_px, rows * backbone.token_px


def _row(known: dict[str, Any], said: MethodAnswer | str, seconds: float) -> AnswerRow:
    """The row of an answer, or of the reason why there is none."""
    seconds = round(seconds, 6)
    if isinstance(said, str):
        return AnswerRow(**known, seconds=seconds, error=said or "The question was not asked.")
    return AnswerRow(**known, seconds=seconds, **said.row_fields())


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, QZoomError) else f"{type(problem).__name__}: {text}"


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
