"""Step vote: the answer that the teachers agree on. Pure, and independent of the order of the votes.

Equal answers are grouped by rule. The judge is asked only about answers that rules leave undecided, and only where its
verdict could complete a quorum. Failures and abstentions are never votes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from qzoom.distill.by_rule import leak
from qzoom.distill.items import Agreement, Item, Step, Vote, draft_of, with_model
from qzoom.errors import CallRefusedError, ConfigError
from qzoom.scoring.agree import normal, same
from qzoom.scoring.judge import Judge
from qzoom.settings import Between, settings

Same = Callable[[str, str], bool | None]


@settings
class VoteSettings:
    """How many votes make an agreement."""

    quorum: Annotated[int, Between(1)] = 6
    """Votes for the answer in all."""
    per_teacher: Annotated[int, Between(1)] = 3
    """Votes of a teacher that make it count as agreeing."""
    teachers: Annotated[int, Between(1)] = 2
    """Teachers that must agree."""

    def __post_init__(self) -> None:
        if self.quorum < self.per_teacher * self.teachers:
            raise ConfigError(
                f"a quorum of {self.quorum} is less than {self.per_teacher} votes from each of {self.teachers} "
                f"teachers; set quorum to at least {self.per_teacher * self.teachers}."
            )

    def check_counts(self, teachers: int, samples: int) -> None:
        """Refuse a quorum that so many teachers with so many samples each cannot reach (ConfigError: it asks for more
        than there is)."""
        if self.teachers > teachers or self.per_teacher > samples or self.quorum > teachers * samples:
            raise ConfigError(
                f"vote: {teachers} teachers with {samples} samples each can never give {self.quorum} votes with "
                f"{self.per_teacher} from each of {self.teachers}; lower these numbers or add teachers or samples."
            )


def vote_step(settings: VoteSettings, judge: Judge | None = None) -> Step:
    """Keeps an item whose answers reach the quorum; without a judge undecided answers stay apart."""

    def run(item: Item) -> Sequence[Item]:
        question = draft_of(item).text
        verdicts: list[bool] = []

        def ask(first: str, second: str) -> bool | None:
            if judge is None:
                return None
            try:
                verdict = judge.same(question, first, second)
            except CallRefusedError:
                return None
            verdicts.append(verdict is True)
            return verdict

        agreement, reason = agree(item.votes, settings, ask if judge is not None else None)
        if agreement is not None:
            reason = reason or leak(question, agreement.text)
            if any(verdicts) and judge is not None:
                agreement = dataclasses.replace(agreement, by=judge.name)
        if verdicts and judge is not None:
            item = with_model(item, "judge", judge.model)
        return (dataclasses.replace(item, answer=agreement).decide("vote", reason),)

    return run


def agree(votes: Sequence[Vote], settings: VoteSettings, ask: Same | None = None) -> tuple[Agreement | None, str]:
    """The most common answer (None without any), and why it does not hold ("" when it does). `ask`: says whether two
    answers mean the same where rules cannot; None for an unusable reply."""
    answered = [vote for vote in votes if vote.status == "answered"]
    abstained = sum(vote.status == "abstained" for vote in votes)
    groups = _groups(answered)
    if ask is not None and groups and _open(groups, settings):
        groups = _joined(groups, ask)
    if not groups:
        return None, "the teachers cannot tell" if abstained else "no usable answer"
    best = _agreement(groups[0], len(answered))
    if _holds(best, settings):
        return best, ""
    if abstained >= settings.quorum:
        return best, "the teachers cannot tell"
    if any(vote.status == "skipped" for vote in votes):
        return best, "no agreement was possible any more"
    if len(answered) < settings.quorum:
        failed = sum(vote.status == "failed" for vote in votes)
        return best, "too many failed answers" if failed >= abstained else "too many abstentions"
    if best.count >= settings.quorum:
        return best, "too few teachers agree"
    return best, "no agreement"


def reachable(votes: Sequence[Vote], left: Mapping[str, int], settings: VoteSettings, *, judged: bool) -> bool:
    """Whether answers still to come could bring an agreement about, at the very best.

    Each teacher still gives so many samples as it has left; with `judged` a judge may find any two answers equal.
    """
    answered = [vote for vote in votes if vote.status == "answered"]
    groups = [answered] if judged else [*_groups(answered), []]
    for group in groups:
        most = Counter(left)
        most.update(vote.teacher for vote in group)
        agreeing = sum(count >= settings.per_teacher for count in most.values())
        if most.total() >= settings.quorum and agreeing >= settings.teachers:
            return True
    return False


def same_answer(question: str, first: str, second: str, judge: Judge | None) -> bool | None:
    """Whether two answers mean the same: by rule, else by the judge; None where neither can tell."""
    decided = same(first, second)
    if decided is None and judge is not None:
        try:
            decided = judge.same(question, first, second)
        except CallRefusedError:
            decided = None
    return decided


def _groups(votes: Sequence[Vote]) -> list[list[Vote]]:
    """Votes of the same normal form, the largest group first, ties by that form."""
    by_form: dict[str, list[Vote]] = {}
    for vote in sorted(votes, key=lambda v: (v.teacher, v.sample, v.text)):
        by_form.setdefault(normal(vote.text), []).append(vote)
    return [by_form[form] for form in sorted(by_form, key=lambda f: (-len(by_form[f]), f))]


def _open(groups: list[list[Vote]], settings: VoteSettings) -> bool:
    """Whether joining groups could bring about an agreement that is not there yet."""
    votes = [vote for group in groups for vote in group]
    now, most = _agreement(groups[0], len(votes)), _agreement(votes, len(votes))
    return not _holds(now, settings) and _holds(most, settings)


def _joined(groups: list[list[Vote]], ask: Same) -> list[list[Vote]]:
    """Every group put to the first larger one that it means the same as, by rule or by the judge."""
    out: list[list[Vote]] = []
    for group in groups:
        text = _wording(group)
        home = next((other for other in out if _alike(_wording(other), text, ask)), None)
        if home is None:
            out.append(list(group))
        else:
            home += group
    return sorted(out, key=lambda group: (-len(group), normal(_wording(group))))


def _alike(first: str, second: str, ask: Same) -> bool:
    decided = same(first, second)
    return bool(ask(first, second) if decided is None else decided)


def _agreement(group: Sequence[Vote], votes: int) -> Agreement:
    by_teacher = Counter(vote.teacher for vote in group)
    return Agreement(_wording(group), len(group), votes, tuple(sorted(by_teacher.items())))


def _wording(group: Sequence[Vote]) -> str:
    """The most common wording; of equals the shortest, then the first in the alphabet."""
    counts = Counter(vote.text for vote in group)
    return min(counts, key=lambda text: (-counts[text], len(text), text))


def _holds(agreement: Agreement, settings: VoteSettings) -> bool:
    agreeing = sum(count >= settings.per_teacher for _, count in agreement.by_teacher)
    return agreement.count >= settings.quorum and agreeing >= settings.teachers
