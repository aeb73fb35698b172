"""A prompt: token ids, positions and the visual spans that take the place of placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qzoom.backbones.base import Backbone, VisualFeatures
from qzoom.errors import QuestionError


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Visual tokens in a prompt."""

    start: int  # index of the first visual token
    features: VisualFeatures
    picture: int  # index of the picture, in the order of the conversation
    role: Literal["coarse", "region"]  # the coarse view of a picture, or a region of it

    @property
    def stop(self) -> int:
        """Index after the last visual token."""
        return self.start + self.features.tokens.shape[0]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sample's input."""

    ids: Tensor  # (length,) int64
    positions: Tensor  # (axes, length), whole or (aligned regions) fractional
    spans: tuple[VisualSpan, ...]  # visual spans by start

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def next_position(self) -> float:
        """Position of the first generated token, on all axes."""
        return float(self.positions[:, -1].max()) + 1

    def with_token(self, token: int) -> Prompt:
        """The prompt and one more text token."""
        position = self.positions.new_full((self.positions.shape[0], 1), self.next_position)
        ids = torch.cat([self.ids, self.ids.new_tensor([token])])
        return Prompt(ids, torch.cat([self.positions, position], dim=1), self.spans)


def build_prompt(backbone: Backbone, ids: Sequence[int], pictures: Sequence[VisualFeatures]) -> Prompt:
    """Expand the placeholders of a tokenised conversation (QuestionError: placeholders and pictures do not match).
    `ids`: token ids with one placeholder per picture."""
    out: list[int] = []
    spans: list[VisualSpan] = []
    for token in ids:
        if token != backbone.image_token_id:
            out.append(token)
            continue
        if len(spans) == len(pictures):
            raise QuestionError("The chat template placed more pictures than were given.")
        features = pictures[len(spans)]
        spans.append(VisualSpan(len(out), features, len(spans), "coarse"))
        out.extend([token] * features.tokens.shape[0])
    if len(spans) != len(pictures):
        raise QuestionError(f"The chat template placed {len(spans)} of {len(pictures)} pictures.")
    tensor = torch.tensor(out, device=backbone.device)
    return Prompt(tensor, backbone.positions(tensor, [p.grid for p in pictures]), tuple(spans))


def picture_ends(backbone: Backbone, prompt: Prompt) -> tuple[int, ...]:
    """Where a prompt may be cut: after each coarse picture's block, the last of which ends the prefix."""
    closing = len(backbone.image_delimiters[1])
    return tuple(span.stop + closing for span in prompt.spans if span.role == "coarse")


def blank_features(grid: tuple[int, int], like: Tensor, size_px: tuple[int, int] = (0, 0)) -> VisualFeatures:
    """Features of a picture that is encoded elsewhere: its grid, and tokens without values. `like`: gives number format
    and device. `size_px`: (width, height) that the vision encoder sees, where that matters."""
    return VisualFeatures(like.new_empty(grid[0] * grid[1], 0), (), grid, size_px)


def unexpanded(ids: Sequence[int], image_token_id: int, sizes: Sequence[int]) -> list[int]:
    """Token ids with one placeholder per picture, as `build_prompt` takes them. `ids`: with as many placeholders as
    visual tokens. `sizes`: visual tokens of every picture and region, in order."""
    out, index, left = [], 0, iter(sizes)
    while index < len(ids):
        out.append(ids[index])
        index += next(left, 1) if ids[index] == image_token_id else 1
    return out


def prefix_length(backbone: Backbone, prompt: Prompt) -> int:
    """Tokens up to the end of the last picture's block: what does not depend on the question."""
    if not prompt.spans:
        return 0
    return prompt.spans[-1].stop + len(backbone.image_delimiters[1])


def embed_prompt(
    backbone: Backbone, prompt: Prompt, start: int = 0, stop: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of a stretch of the prompt, visual features in place.

    Args:
        stop: one past the last token; None is the end. Spans must lie wholly inside or outside.

    Returns:
        (tokens, hidden) embeddings and (levels, tokens, hidden) DeepStack additions, None without visual tokens.
    """
    stop = len(prompt) if stop is None else stop
    hidden = backbone.embed(prompt.ids[start:stop])
    spans = [s for s in prompt.spans if start <= s.start and s.stop <= stop]
    if not spans:
        return hidden, None
    hidden = hidden.clone()
    levels = backbone.deepstack_levels
    deepstack = hidden.new_zeros(levels, *hidden.shape) if levels else None
    for span in spans:
        piece = slice(span.start - start, span.stop - start)
        hidden[piece] = span.features.tokens
        for level, values in enumerate(span.features.deepstack):
            deepstack[level, piece] = values  # type: ignore[index]
    return hidden, deepstack
