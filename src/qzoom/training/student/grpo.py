"""Reinforcement by trl's GRPOTrainer: several answers a question, those better than their group's mean become likelier.

Three hooks make the trainer's prompts those of the engine: which rows are asked is noted when a generation begins,
prompts are tokenised by `prompts.Prompter`, and answers are generated in parts that fit the memory. A reply without a
reward (its judge failed) counts in no mean and has no gradient; trl takes care of that when the one reward is None,
which is why accuracy and form are one reward here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import BatchFeature, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from qzoom.training.student.collate import Drawn, Prompter, View
from qzoom.training.student.data import Question
from qzoom.training.student.recipe import DistillRecipe, Place, common_arguments, silence
from qzoom.training.student.rewards import JudgeCall, Target, accuracy, combine
from qzoom.training.student.schedule import Row

__all__ = ["GroupTrainer", "RowReader", "Shown", "ViewProcessor", "make_grpo_trainer", "make_reward"]


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A prompt ready for the model.

    Args:
        view: the picture.
        ids: tokens, the picture's placeholders expanded.
        mark: id of the placeholder.
    """

    view: View
    ids: tuple[int, ...]
    mark: int


class RowReader:
    """From a row's number to its question and its prompt.

    Args:
        prompter: makes views and prompts.
        questions: that the rows point to.
        rows: the run's order, one question each.
        drawn: makes replayed pictures.
    """

    def __init__(
        self, prompter: Prompter, questions: Sequence[Question], rows: Sequence[Row], drawn: Drawn | None = None
    ) -> None:
        self.prompter = prompter
        self._questions = questions
        self._rows = rows
        self._drawn = drawn

    def target(self, number: int) -> Target:
        """What a right reply says."""
        row = self._rows[number]
        if row.drawn >= 0:
            _, ((text, answer), *_) = self._draw(row.drawn)
            return Target(text, answer)
        q = self._questions[row.questions[0]]
        return Target(q.text, q.answer, q.choices, q.letter, q.kind)

    def shown(self, number: int) -> Shown:
        """The prompt."""
        row, prompter = self._rows[number], self.prompter
        if row.drawn >= 0:
            picture, ((text, answer), *_) = self._draw(row.drawn)
        else:
            question = self._questions[row.questions[0]]
            style = prompter.style_of(question, row.visit, row.progress)
            picture, text, answer = (
                prompter.picture(question, style, row.tokens),
                prompter.wording(question, style),
                question.answer,
            )
        view = prompter.view(picture, row.tokens)
        ids = prompter.expand(prompter.asked(text, answer).ids, view.cells)
        return Shown(view, tuple(ids), prompter.engine.backbone.image_token_id)

    def _draw(self, seed: int) -> Any:
        if self._drawn is None:
            raise ValueError("A drawn row needs something that draws.")
        return self._drawn(seed)


class ViewProcessor(ProcessorMixin):
    """What the trainer takes for a processor: its pictures are prompts that are ready.

    Args:
        image_processor: the student's.
        tokenizer: the student's.
        chat_template: the student's.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> BatchFeature:
        """Pixels, grids and the kinds of tokens, padded on the left."""
        import torch

        shown = [one for group in images for one in group]
        length = max(len(one.ids) for one in shown)
        kinds = torch.zeros(len(shown), length, dtype=torch.long)
        for index, one in enumerate(shown):
            kinds[index, length - len(one.ids) :] = (torch.tensor(one.ids) == one.mark).long()
        return BatchFeature({**_pictures(shown), "mm_token_type_ids": kinds})

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The tokenizer alone; the picture's settings are the base's."""
        self.tokenizer.save_pretrained(save_directory)


def make_reward(
    reader: RowReader, recipe: DistillRecipe, judge: JudgeCall | None = None
) -> Callable[..., list[float | None]]:
    """The one reward function of a run, as the trainer calls it."""

    def reward(
        completions: Sequence[Any], row: Sequence[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float | None]:
        made = [
            accuracy(
                completion[0]["content"],
                reader.target(number),
                form=recipe.answer_form,
                longest_plain=recipe.longest_plain,
                counting=recipe.grpo.counting,
                judge=judge,
            )
            for completion, number in zip(completions, row, strict=True)
        ]
        known = [one.accuracy for one in made if one.accuracy is not None]
        log_metric("accuracy", sum(known) / len(known) if known else 0.0)
        log_metric("well_formed", sum(one.form for one in made) / len(made))
        for kind in ("judge", "unjudged", "failed"):
            log_metric(f"by_{kind}", sum(one.by == kind for one in made) / len(made))
        return [combine(one, recipe.grpo.format_weight) for one in made]

    return reward


class GroupTrainer(GRPOTrainer):
    """Asks the engine's prompts; see the module.

    Args:
        reader: of the run's rows.
        at_once: answers that are generated together.
        **settings: of trl's trainer.
    """

    def __init__(self, reader: RowReader, at_once: int, **settings: Any) -> None:
        self._reader, self._at_once = reader, at_once
        self._shown: list[Shown] = []
        super().__init__(**settings)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        ready: dict[int, Shown] = {}
        for entry in inputs:
            if entry["row"] not in ready:
                ready[entry["row"]] = self._reader.shown(entry["row"])
        self._shown = [ready[entry["row"]] for entry in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        return [list(one.ids) for one in self._shown], [[one] for one in self._shown], {}

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: Any,
        has_tool_images: Any = False,
    ) -> Any:
        out: list[list[int]] = []
        for begin in range(0, len(prompt_ids), self._at_once):
            some = slice(begin, begin + self._at_once)
            shown = [group[0] for group in images[some]]
            kinds = [[int(token == one.mark) for token in one.ids] for one in shown]
            fields = {**_pictures(shown), "mm_token_type_ids": kinds}
            out += super()._generate_single_turn(prompt_ids[some], images[some], fields, num_generations)[0]
        return out, None


def make_grpo_trainer(
    model: Any,
    reader: RowReader,
    rows: int,
    steps: int,
    recipe: DistillRecipe,
    place: Place,
    judge: JudgeCall | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupTrainer:
    """The trainer, ready to run.

    Args:
        model: the transformers model, or peft's wrapper around it.
        reader: of the run's rows.
        rows: of the whole run, `recipe.grpo.batch` to a step.
        steps: optimiser steps.
        recipe: how.
        place: where.
        judge: for free answers.
        callbacks: called around steps.
    """
    backbone = reader.prompter.engine.backbone
    prompts = [[{"role": "user", "content": "."}]] * rows
    trainer = GroupTrainer(
        reader,
        recipe.grpo.micro_batch,
        model=model,
        reward_funcs=make_reward(reader, recipe, judge),
        args=_arguments(recipe, place, steps),
        train_dataset=Dataset.from_dict({"row": list(range(rows)), "prompt": prompts}),
        processing_class=ViewProcessor(backbone.image_processor, backbone.tokenizer, backbone.chat_template),
        callbacks=list(callbacks),
    )
    silence(trainer)
    return trainer


def _arguments(recipe: DistillRecipe, place: Place, steps: int) -> GRPOConfig:
    part = recipe.grpo
    return GRPOConfig(
        **common_arguments(recipe, place),
        max_steps=steps,
        learning_rate=part.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=part.micro_batch,
        gradient_accumulation_steps=place.forwards(part.batch * part.group // part.micro_batch),
        num_generations=part.group,
        max_completion_length=part.max_new_tokens,
        shuffle_dataset=False,
        temperature=part.temperature,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=part.clip_low,
        epsilon_high=part.clip_high,
        delta=part.dual_clip,
        loss_type="dapo",
        scale_rewards="group",
        weight_decay=part.weight_decay,
        max_grad_norm=part.clip,
        log_completions=False,
        log_multimodal=False,
    )


def _pictures(shown: Sequence[Shown]) -> Mapping[str, Any]:
    import torch

    return {
        "pixel_values": torch.cat([one.view.pixels for one in shown]),
        "image_grid_thw": torch.cat([one.view.grid_thw for one in shown]),
    }
