"""How the questions about pictures are asked: in one session per picture, by another method, or many at once.

Whatever goes wrong with a question becomes a wrong answer with its reason; only what concerns the whole run is raised.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qzoom.config import TokenBudget
from qzoom.errors import ConfigError, QZoomError
from qzoom.evaluation.baselines import METHODS, Budget, Method, MethodAnswer
from qzoom.evaluation.baselines.base import answer_of, with_needed_branches
from qzoom.evaluation.baselines.model import OwnWay
from qzoom.evaluation.records import AnswerRow, EvalQuestion, EvalSample
from qzoom.types import ZoomMode

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["EvalOptions", "ask_many", "ask_sample"]


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
        method: name in `qzoom.evaluation.baselines.METHODS`.
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
    return columns * backbone.cell_px, rows * backbone.cell_px


def _row(known: dict[str, Any], said: MethodAnswer | str, seconds: float) -> AnswerRow:
    """The row of an answer, or of the reason why there is none."""
    seconds = round(seconds, 6)
    if isinstance(said, str):
        return AnswerRow(**known, seconds=seconds, error=said or "The question was not asked.")
    return AnswerRow(**known, seconds=seconds, **said.row_fields())


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, QZoomError) else f"{type(problem).__name__}: {text}"
