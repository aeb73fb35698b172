"""One picture, many questions: the pictures are encoded and prefilled once.

A session is a frozen prefix state; every question forks it. Sessions share nothing, so two threads may each use one,
and one session may be asked from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qzoom.backbones.base import VisualFeatures
from qzoom.config import TokenBudget
from qzoom.engine.batch import answer_events, raise_error
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.flow import perceive
from qzoom.engine.prompt import build_prompt, prefix_length
from qzoom.engine.request import Options, Request, check_requests, coarse_budgets, make_options
from qzoom.engine.state import Engine, State, advance_gate, advance_region, advance_shared, advance_upper
from qzoom.errors import QuestionError
from qzoom.images.load import LoadedImage
from qzoom.types import Answer, Perception, SamplingParams, StreamEvent


@dataclass(frozen=True)
class Session:
    """Questions about the same pictures. Made by `QZoom.session`."""

    engine: Engine  # backbone, branches, arithmetic
    encoder: ChatEncoder  # tokenises
    pictures: tuple[LoadedImage, ...]  # the decoded pictures
    system: str | None  # the system turn, or None
    prefix: State  # everything computed up to the end of the last picture
    # limits of the coarse pass that were asked for; None took the checkpoint's own
    coarse_tokens: TokenBudget | None = None
    # questions and answers of `chat` so far, as messages; clear it to begin again
    turns: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer one question; options as in `QZoom.ask`, except the coarse budget, which the session has fixed."""
        cancel = options.pop("cancel", None)
        answer = None
        for _, event in answer_events(self.engine, self.request(question, **options), cancel):
            answer = raise_error(event).answer or answer
        assert answer is not None
        return answer

    def chat(self, question: str, **options: Any) -> Answer:
        """Answer one question after those that were asked by `chat` before, and keep both for the next one.

        Only `ask` is for several threads. A question that fails or is cancelled leaves no turn behind.
        """
        cancel, answer = options.pop("cancel", None), None
        asked = [*self.turns, {"role": "user", "content": question}]
        for _, event in answer_events(self.engine, self._request(question, asked, options), cancel):
            answer = raise_error(event).answer or answer
        assert answer is not None
        if answer.finish_reason != "cancelled":
            self.turns[:] = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def stream(self, question: str, **options: Any) -> Iterator[StreamEvent]:
        """The same as events; options as in `QZoom.stream`."""
        cancel = options.pop("cancel", None)
        events = answer_events(self.engine, self.request(question, **options), cancel)
        return (raise_error(event) for _, event in events)

    def perceive(self, question: str, **options: Any) -> Perception:
        """Gate and regions only."""
        return perceive(self.engine, [self.request(question, **options)])[0]

    def request(self, question: str, **options: Any) -> Request:
        """The question as the engine takes it, on top of what is computed; options as in `ask`."""
        return self._request(question, question, options)

    def _request(self, question: str, messages: str | list[dict[str, Any]], options: dict[str, Any]) -> Request:
        if options.get("coarse_tokens") is not None:
            raise QuestionError("A session's coarse view is fixed; open another one for another coarse_tokens.")
        if not isinstance(question, str):
            raise QuestionError("A session takes each question as a text; for chat messages use `ask`.")
        conversation = read_conversation(list(self.pictures), messages, self.system)
        ids = tuple(self.encoder.encode(conversation))
        settled = replace(make_options(self.engine, **options), coarse_tokens=self.coarse_tokens)
        return Request(conversation, ids, self.pictures, settled, self.prefix)


@torch.inference_mode()
def open_session(
    engine: Engine, chat: ChatEncoder, pictures: tuple[LoadedImage, ...], *, system: str | None, options: Options
) -> Session:
    """Encode and prefill the pictures: shared layers, branches and upper layers up to the last picture's end.

    Raises:
        BudgetError: a token budget larger than what the model reads.
        QuestionError: no picture was given, or they take more tokens than the model reads.
    """
    if not pictures:
        raise QuestionError("A session needs at least one picture.")
    conversation = read_conversation(list(pictures), "?", system)
    shortest = replace(options, sampling=SamplingParams(max_new_tokens=1))
    check_requests(engine, [Request(conversation, tuple(chat.encode(conversation)), pictures, shortest)])
    features = engine.backbone.encode([p.image for p in pictures], coarse_budgets(engine, options, pictures))
    state = prefill_prefix(engine, chat, features, system)
    return Session(engine, chat, pictures, system, state, options.coarse_tokens)


def prefill_prefix(engine: Engine, chat: ChatEncoder, features: Sequence[VisualFeatures], system: str | None) -> State:
    """State of everything that comes before the question."""
    conversation = read_conversation([None] * len(features), "?", system)
    prompt = build_prompt(engine.backbone, chat.encode(conversation), features)
    end = prefix_length(engine.backbone, prompt)
    prompt = replace(prompt, ids=prompt.ids[:end], positions=prompt.positions[:, :end])
    states = advance_shared(engine, [State.empty(engine, prompt)])
    if engine.gate is not None and engine.config.decide_by == "gate":
        states, _ = advance_gate(engine, states)
    if engine.region is not None:
        states = advance_region(engine, states)
    states, _ = advance_upper(engine, states)
    return states[0]
