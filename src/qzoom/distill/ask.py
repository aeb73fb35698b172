"""Steps ask and validate: questions about a target from its crop alone, and which of them can be used.

A question stays if the crop answers it, the whole image has only one such thing, and the question gives nothing away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qzoom.distill.by_rule import leak
from qzoom.distill.items import Item, Step, draft_of, with_model
from qzoom.errors import CallRefusedError

if TYPE_CHECKING:
    from qzoom.distill.pictures import Views
    from qzoom.distill.roles import QuestionWriter, Validator


def ask_step(writer: QuestionWriter, views: Views) -> Step:
    """One item for every question of the writer; a target without a question is refused."""

    def run(item: Item) -> Sequence[Item]:
        item = with_model(item, "question_writer", writer.model)
        try:
            drafts = writer.call(item, views)
        except CallRefusedError:
            return (item.decide("ask", "the question writer refused the picture"),)
        if not drafts:
            return (item.decide("ask", "no question about this place"),)
        return tuple(dataclasses.replace(item, draft=draft).decide("ask") for draft in drafts)

    return Step("ask", run)


def validate_step(validator: Validator, views: Views) -> Step:
    """Keeps or refuses a question; leaks are found by rule before the validator is asked."""

    def run(item: Item) -> Sequence[Item]:
        draft = draft_of(item)
        reason = leak(draft.text, draft.known)
        if not reason:
            item = with_model(item, "validator", validator.model)
            try:
                reason = validator.call(item, views)
            except CallRefusedError:
                reason = "the validator refused the picture"
        return (item.decide("validate", reason),)

    return Step("validate", run)
