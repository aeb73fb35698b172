"""Regions through the vision encoder, or out of memory where the same box was read a moment ago."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qzoom.backbones.base import Backbone, VisualFeatures
from qzoom.config import TokenBudget
from qzoom.engine.recent import Recent
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Crop", "encode_crops", "features_bytes", "own_features"]


@dataclass(frozen=True, slots=True)
class Crop:
    """A region to be encoded.

    Args:
        picture: the whole picture, RGB.
        number: which of its conversation's pictures it is.
        box: xyxy in original pixels, half-open.
        budget: limits on its visual tokens.
        prefix: `prefix_key` of the conversation; b"" keeps the features nowhere.
    """

    picture: PIL.Image.Image
    number: int
    box: Box
    budget: TokenBudget
    prefix: bytes = b""

    @property
    def key(self) -> bytes:
        """What decides the features; b"" without a prefix."""
        facts = json.dumps([self.number, self.box, self.budget.min_tokens, self.budget.max_tokens])
        return hashlib.sha256(self.prefix + facts.encode()).digest() if self.prefix else b""


def encode_crops(
    backbone: Backbone, crops: Sequence[Crop], kept: Recent[VisualFeatures] | None = None
) -> list[VisualFeatures]:
    """Features of every region; those that are not kept are cut out and encoded in one call.

    Args:
        backbone: the family.
        crops: any number.
        kept: features of earlier regions, which gets the new ones; None keeps none.
    """
    keys = [crop.key if kept is not None else b"" for crop in crops]
    out = [kept.get(key) if kept is not None and key else None for key in keys]
    new = [i for i, found in enumerate(out) if found is None]
    pictures = [crops[i].picture.crop(crops[i].box) for i in new]
    for i, features in zip(new, backbone.encode(pictures, [crops[i].budget for i in new]), strict=True):
        out[i] = features
        if kept is not None and keys[i]:
            kept.put(keys[i], own_features(features))
    return [features for features in out if features is not None]


def features_bytes(features: VisualFeatures) -> int:
    """Memory of an encoded picture's features."""
    return sum(t.numel() * t.element_size() for t in (features.tokens, *features.deepstack))


def own_features(features: VisualFeatures) -> VisualFeatures:
    """A copy that does not keep the rest of its batch in memory."""
    return dataclasses.replace(
        features, tokens=features.tokens.clone(), deepstack=tuple(level.clone() for level in features.deepstack)
    )
