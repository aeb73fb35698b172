"""Statistics of a run, and the card of its data set: contents, filters, models, settings and prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qzoom.distill import by_endpoint
from qzoom.distill.decontaminate import Match
from qzoom.distill.items import Item
from qzoom.distill.pipeline import PictureResult
from qzoom.distill.recipe import DatasetRecipe, step_settings
from qzoom.scoring.agree import same
from qzoom.scoring.judge import same_texts

_MOST_REASONS = 200
_OTHERS = "other reasons"
_NAMED = re.compile(r"^(?:Cannot read|The picture) .*?(?:: | (?=is missing|was changed))", re.DOTALL)


@dataclass(slots=True)
class Stats:
    """Counts of a run; the same after a rerun."""

    pictures: int = 0  # images that could be opened, each once
    duplicates: int = 0  # images with the content of an earlier one
    refused_pictures: Counter[str] = field(default_factory=Counter)  # reason to count
    entered: Counter[str] = field(default_factory=Counter)  # step to items that went in
    kept: Counter[str] = field(default_factory=Counter)  # step to items that it kept
    refused: dict[str, Counter[str]] = field(default_factory=dict)  # step to reason to count
    waiting: Counter[str] = field(default_factory=Counter)  # reason to items that a rerun has to try again
    kinds: Counter[str] = field(default_factory=Counter)  # kind of question to kept items
    datasets: Counter[str] = field(default_factory=Counter)  # where kept items come from
    bins: Counter[int] = field(default_factory=Counter)  # size bin to kept items
    negatives: int = 0  # kept items about absent things
    # kind of question to kept items whose right answer is known, without negatives
    known: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)  # how many of those agree with it
    models: Counter[tuple[str, str]] = field(default_factory=Counter)  # (role, model) to kept items

    def add(self, result: PictureResult) -> None:
        """Count an image."""
        for reason in result.waiting:
            _count(self.waiting, reason)
        if result.picture is None:
            if result.reason:
                _count(self.refused_pictures, _general(result.reason))
            return
        self.pictures += 1
        for step, entered, kept in result.counts:
            self.entered[step] += entered
            self.kept[step] += kept
        for item in result.items:
            if not item.kept:
                last = next(one for one in item.decisions if not one.kept)
                _count(self.refused.setdefault(last.step, Counter()), _general(last.reason))

    def add_kept(self, item: Item) -> None:
        """Count an exported item."""
        if item.draft is not None:
            self.kinds[item.draft.kind] += 1
            self.negatives += item.draft.negative
            if item.draft.known and item.answer is not None and not item.draft.negative:
                self.known[item.draft.kind] += 1
                self.right[item.draft.kind] += same(item.draft.known, item.answer.text) is True
        self.datasets[item.picture.dataset or "distill"] += 1
        if item.target is not None:
            self.bins[item.target.area_bin] += 1
        self.models.update(dict.fromkeys(item.models, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in a fixed order."""
        steps = {
            step: {"entered": n, "kept": self.kept[step], "refused": _sorted(self.refused.get(step, Counter()))}
            for step, n in self.entered.items()
        }
        return {
            "pictures": self.pictures,
            "duplicates": self.duplicates,
            "refused_pictures": _sorted(self.refused_pictures),
            "steps": steps,
            "waiting": _sorted(self.waiting),
            "kinds": _sorted(self.kinds),
            "datasets": _sorted(self.datasets),
            "area_bins": {str(key): self.bins[key] for key in sorted(self.bins)},
            "negatives": self.negatives,
            "known": {kind: {"agreed": n, "right": self.right[kind]} for kind, n in sorted(self.known.items())},
            "models": [[role, model, self.models[role, model]] for role, model in sorted(self.models)],
        }


def _count(counter: Counter[str], reason: str) -> None:
    counter[reason if reason in counter or len(counter) < _MOST_REASONS else _OTHERS] += 1


def _general(reason: str) -> str:
    """A reason without the name of the image, so that equal reasons are counted together."""
    return " ".join(_NAMED.sub("", reason).split())[:300] or "no reason given"


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return {key: counter[key] for key in sorted(counter)}


_TITLES = {
    "propose": "Regions proposed",
    "crop": "Crops",
    "ask": "Questions",
    "validate": "Valid questions",
    "answer": "Answered by the teachers",
    "vote": "Agreed answers",
    "choices": "Options",
    "difficulty": "Difficulty",
}


def make_card(recipe: DatasetRecipe, stats: Stats, rows: Mapping[str, int], matches: Sequence[Match]) -> str:
    """The card as Markdown with the front matter that the hub reads; `rows` are those of each split."""
    parts = [
        _front(rows),
        "# Region-to-image questions\n",
        "Each row is a question about a small region of a picture, with the answer that teachers agreed on when they "
        "saw the region enlarged. The picture in a row is the whole one, upright, without a box; `bbox` is the region "
        "in its pixels (xyxy, half-open), `bbox_norm` in shares of its sides.\n",
        _table(("Split", "Rows"), [(split, rows[split]) for split in sorted(rows)]),
        "## Filters\n",
        _filters(recipe, stats),
        "## Reasons\n",
        _reasons(stats),
        "## What is in it\n",
        _contents(stats),
        _known(stats),
        "## Models and rules\n",
        _table(("Role", "Model", "Rows"), [(role, model, n) for (role, model), n in sorted(stats.models.items())]),
        _decontamination(recipe, matches),
        "## Settings\n",
        f"Pictures: {', '.join(f'`{name}`' for name in recipe.pictures)}. Seed: {recipe.seed}.\n",
        "```json\n" + json.dumps(_settings(recipe), indent=2, sort_keys=True, ensure_ascii=False) + "\n```\n",
        _prompts(recipe),
    ]
    return "\n".join(part for part in parts if part)


def _front(rows: Mapping[str, int]) -> str:
    files = "".join(f"      - split: {split}\n        path: {split}.parquet\n" for split in sorted(rows) if rows[split])
    configs = f"configs:\n  - config_name: default\n    data_files:\n{files}" if files else ""
    return f"---\ntask_categories:\n  - visual-question-answering\n{configs}---\n"


def _filters(recipe: DatasetRecipe, stats: Stats) -> str:
    refused = sum(stats.refused_pictures.values())
    lines: list[tuple[Any, ...]] = [
        ("Pictures", stats.pictures + refused + stats.duplicates, stats.pictures, refused + stats.duplicates)
    ]
    for step in recipe.steps:
        left_out = sum(stats.refused.get(step, {}).values())
        lines.append((_TITLES[step], stats.entered[step], stats.kept[step], left_out))
    return _table(("Step", "In", "Kept", "Left out"), lines)


def _reasons(stats: Stats) -> str:
    lines = [("Pictures", reason, n) for reason, n in sorted(stats.refused_pictures.items())]
    if stats.duplicates:
        lines.append(("Pictures", "the same as another picture", stats.duplicates))
    for step in stats.entered:
        found = sorted(stats.refused.get(step, {}).items(), key=lambda pair: (-pair[1], pair[0]))
        lines += [(_TITLES[step], reason, n) for reason, n in found]
    lines += [("Waiting for a rerun", reason, n) for reason, n in sorted(stats.waiting.items())]
    return _table(("Step", "Reason", "Left out"), lines)


def _contents(stats: Stats) -> str:
    lines: list[tuple[Any, ...]] = [("Kind", kind, n) for kind, n in sorted(stats.kinds.items())]
    lines += [("Source", name, n) for name, n in sorted(stats.datasets.items())]
    lines += [("Area bin, 0 the smallest", number, n) for number, n in sorted(stats.bins.items())]
    lines.append(("Negatives", "the target is absent or no option holds", stats.negatives))
    return _table(("What", "Which", "Rows before decontamination"), lines)


def _known(stats: Stats) -> str:
    """Share of agreed answers that are right, where the right answer is known."""
    if not stats.known:
        return ""
    lines = [(kind, n, stats.right[kind], f"{stats.right[kind] / n:.1%}") for kind, n in sorted(stats.known.items())]
    return (
        "## Agreed answers beside known ones\n\nDrawn pictures and question files know the right answer.\n\n"
        + _table(("Kind", "Agreed on", "Right", "Share"), lines)
    )


def _decontamination(recipe: DatasetRecipe, matches: Sequence[Match]) -> str:
    if not recipe.decontaminate.against:
        return (
            "## Decontamination\n\nNot made. `qzoom distill decontaminate FOLDER --against BENCHMARK` compares the "
            "pictures with those of a benchmark.\n"
        )
    what = "left out" if recipe.decontaminate.drop else "kept"
    head = f"## Decontamination\n\nCompared with {', '.join(f'`{place}`' for place in recipe.decontaminate.against)}: "
    head += f"{len(matches)} pictures look like one of them and were {what}.\n"
    lines = [(m.picture, m.benchmark, m.phash, m.dhash, "yes" if m.mirrored else "") for m in matches]
    return head + ("\n" + _table(("Picture", "Benchmark", "pHash", "dHash", "Mirrored"), lines) if lines else "")


def _settings(recipe: DatasetRecipe) -> dict[str, Any]:
    return {step: step_settings(recipe, step) for step in recipe.steps} | {
        "export": asdict(recipe.export),
        "decontaminate": asdict(recipe.decontaminate),
    }


def _prompts(recipe: DatasetRecipe) -> str:
    """The prompts of roles behind endpoints, with placeholders."""
    question, answer = "{question}", "{answer}"
    texts = {
        "question_writer": by_endpoint.questions_prompt(recipe.roles.question_writer.count),
        "validator": by_endpoint.validator_prompt(question),
        "teacher": by_endpoint.teacher_prompt(question),
        "judge": "{}\n\n{}".format(*same_texts(question, "{first}", "{second}")),
        "distractor_writer": by_endpoint.distractors_prompt(question, answer, 3),
        "student": by_endpoint.reader_prompt(question),
        "guesser": by_endpoint.reader_prompt(question),
    }
    parts = {}
    for role, member in recipe.roles.members():
        if member.by == "endpoint":
            plain = member.plain and role in ("teacher", "student", "guesser")
            parts[f"{role} {member.label}"] = question if plain else texts[role]
    if not parts:
        return ""
    return "## Prompts\n\n" + "\n".join(f"{name}:\n\n```text\n{text}\n```\n" for name, text in parts.items())


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    if not lines:
        return "None.\n"
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
