"""What a stage learns from: samples with a number of targets each, and the summed loss of some of them.

Losses are sums: the loop divides by the targets of the whole batch, so that neither the size of the micro-batches nor
the number of processes changes the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.data.questions import load_picture
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.prompt import Prompt, build_prompt
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError
from qzoom.labels.respond import PreparedImage, prepare_image
from qzoom.labels.settings import View
from qzoom.store.log import differences
from qzoom.store.records import RecordStore
from qzoom.store.schema import Question
from qzoom.training.forward import hidden_states
from qzoom.training.stages import StageRecipe


@dataclass(frozen=True, slots=True)
class SampleUse:
    """One use of a sample in a batch."""

    index: int  # of the sample
    epoch: int  # how often it has been used before; seeds the random choices of this use


class StageTask(ABC):
    """A stage's samples, drawn from the recipe's stores of records, and its loss."""

    weights: Sequence[int]
    """Targets of each sample, all above zero."""
    identity: str
    """A digest of the samples."""

    def __init__(self, recipe: StageRecipe, engine: Engine, purpose: str) -> None:
        self.recipe = recipe
        self.chat = ChatEncoder(engine.backbone)
        self.stores = open_stores(recipe.labels, purpose)
        self._room = int(recipe.cache_gb * 1e9)
        self._states: dict[Hashable, tuple[Prompt, Tensor]] | None = {} if self._room else None
        self._features: dict[Hashable, VisualFeatures] = {}

    @abstractmethod
    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Loss summed over all targets of some samples, with gradients to what trains."""

    def question_ids(self, question: Question, turn: int) -> list[int]:
        """Token ids of the prompt of one turn alone."""
        conversation = conversation_ids(self.chat, [(question.turns[turn].question, "")])
        assert conversation is not None
        return conversation[0]

    @torch.no_grad()
    def shared_states(
        self, engine: Engine, keys: Sequence[Hashable | None], make: Callable[[int], Prompt]
    ) -> tuple[list[Prompt], list[Tensor]]:
        """Prompts (their visual features left out) and hidden states (length, hidden) after the frozen shared layers.

        With `cache_gb` they are kept in memory, as many as fit, and computed one prompt at a time, so that they do not
        depend on the rest of a batch: a resumed run ends as if it had not been stopped.

        Args:
            keys: one per prompt; the same key must always mean the same prompt, and None is a prompt not worth keeping.
        """
        count = engine.config.shared_layers
        if self._states is None:
            prompts = [make(i) for i in range(len(keys))]
            return [_lean(prompt) for prompt in prompts], hidden_states(engine.backbone, prompts, count)
        out: list[tuple[Prompt, Tensor]] = []
        for index, key in enumerate(keys):
            if key is None or key not in self._states:
                prompt = make(index)
                (hidden,) = hidden_states(engine.backbone, [prompt], count)
                out.append((_lean(prompt), hidden))
                if key is not None and self._fits([hidden, prompt.positions, prompt.ids]):
                    self._states[key] = out[-1]
            else:
                out.append(self._states[key])
        return [prompt for prompt, _ in out], [hidden for _, hidden in out]

    @torch.no_grad()
    def features(self, engine: Engine, key: Hashable, make: Callable[[], PreparedImage]) -> VisualFeatures:
        """An encoded picture; with `cache_gb` it is kept in memory if it fits. `key`: as in `shared_states`."""
        found = self._features.get(key)
        if found is None:
            shown = make()
            (found,) = engine.backbone.encode([shown.picture.image], [shown.budget])
            if self._fits([found.tokens, *found.deepstack]):
                self._features[key] = found
        return found

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        """Take the room of these tensors if there is so much."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self._room:
            return False
        self._room -= size
        return True


def sample_digest(text: str) -> str:
    """Sixteen hex digits for a task's `identity`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def question_of(store: RecordStore, record_id: str) -> Question:
    """The question record that a label belongs to."""
    question = store.get(record_id).record
    assert isinstance(question, Question)
    return question


def open_stores(folders: Sequence[str], purpose: str) -> list[RecordStore]:
    """The record stores of a recipe (ConfigError: a store made for another purpose; DataError: a store that cannot be
    read)."""
    stores = []
    for folder in folders:
        store = RecordStore(Path(folder).expanduser())
        if store.purpose != purpose:
            raise ConfigError(
                f"{folder} holds records for {store.purpose!r}, but this stage needs those for {purpose!r}."
            )
        stores.append(store)
    return stores


def check_labels(stores: Sequence[RecordStore], digest: str, zoom: Mapping[str, Any], *, foreign: bool) -> None:
    """Labels must have been made with the model that trains, unless foreign ones are accepted.

    Args:
        digest: of the weights of the base model that is to be trained.
        zoom: its `zoom_identity`, for labels that its region branch decided.

    Raises:
        ConfigError: they were made with another model.
    """
    for store in stores if not foreign else ():
        if store.provenance.weights != digest:
            whose = f"of {store.provenance.model!r}" if store.provenance.weights else "of a model that is not known"
            raise ConfigError(
                f"{store.folder} holds labels {whose}, not of the base model that is to be trained (weights "
                f"{store.provenance.weights or 'unknown'}, not {digest}); label with this base, or set foreign_labels: "
                "true in the recipe to use them all the same."
            )
        # stores from before this was noted do not say
        changed = differences(store.settings.get("zoom", zoom), dict(zoom))
        if changed:
            raise ConfigError(
                f"{store.folder} holds labels of another region branch or other zoom settings than those of the base "
                f"model that is to be trained ({'; '.join(changed[:3])}); label with this base, or set foreign_labels: "
                "true in the recipe to use them all the same."
            )


def conversation_ids(
    chat: ChatEncoder, turns: Sequence[tuple[str, str]], pictures: int = 1
) -> tuple[list[int], list[int]] | None:
    """Token ids of a conversation about pictures up to its last question, and the index of the token that asks each.

    Of the (question, answer) turns the last answer is not used. None when the ids of a shorter conversation do not
    begin those of a longer one, so that they cannot share one sequence.
    """
    asking: list[int] = []
    ids: list[int] = []
    for count in range(1, len(turns) + 1):
        messages = []
        for question, answer in turns[: count - 1]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": turns[count - 1][0]})
        longer = chat.encode(read_conversation([None] * pictures, messages))
        if longer[: len(ids)] != ids:
            return None
        ids = longer
        asking.append(len(ids) - 1)
    return ids, asking


def shown_picture(engine: Engine, question: Question, *, view: View, tokens: int, images: str) -> PreparedImage:
    """The picture of a question as the model is to see it (ImageError: it is missing or damaged)."""
    if engine.backbone.square_padding is not None:  # it pads them itself
        view = "dynamic"
    return prepare_image(load_picture(question, Path(images) if images else None), view, tokens)


def prompt_of(engine: Engine, ids: Sequence[int], shown: Sequence[PreparedImage]) -> Prompt:
    """The prompt of token ids with their pictures in it, encoded without gradients."""
    with torch.no_grad():
        features = engine.backbone.encode([one.picture.image for one in shown], [one.budget for one in shown])
    return build_prompt(engine.backbone, ids, features)


def _lean(prompt: Prompt) -> Prompt:
    """The prompt without its visual features, which the branches do not need."""
    spans = tuple(
        dataclasses.replace(
            span,
            features=dataclasses.replace(
                span.features, tokens=span.features.tokens.new_empty(span.features.tokens.shape[0], 0), deepstack=()
            ),
        )
        for span in prompt.spans
    )
    return dataclasses.replace(prompt, spans=spans)
