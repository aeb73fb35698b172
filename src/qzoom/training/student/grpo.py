"""Reinforcement by trl's GRPOTrainer: several answers per question; those above their group's mean become likelier.

Three hooks make the trainer's prompts those of the engine: which entries are asked is noted when a generation begins,
prompts are tokenised by `collate.Prompter`, and answers are generated in parts that fit the memory. A reply without a
reward (its judge failed) counts in no mean and has no gradient; trl does that when its only reward is None, which is
why accuracy and form are one reward here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import BatchFeature, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from qzoom.training.run import TrainingRun
from qzoom.training.student.collate import DrawSample, ImageTensors, Prompter
from qzoom.training.student.data import ExportedQuestion
from qzoom.training.student.recipe import StudentRecipe, common_arguments, forwards_of, remove_printers
from qzoom.training.student.rewards import JudgeCall, Reference, accuracy, combine
from qzoom.training.student.schedule import ScheduleEntry


@dataclass(frozen=True, slots=True, eq=False)
class GrpoPrompt:
    """A prompt ready for the model."""

    view: ImageTensors  # the image
    ids: tuple[int, ...]  # tokens, the image's placeholders expanded
    image_token: int  # id of the placeholder


class PromptReader:
    """From the number of a schedule entry to its prompt and to what a right reply says.

    Args:
        prompter: makes views and prompts.
        questions: that the entries refer to.
        schedule: of the run, one question per entry.
        rehearsal: draws rehearsal data.
    """

    def __init__(
        self,
        prompter: Prompter,
        questions: Sequence[ExportedQuestion],
        schedule: Sequence[ScheduleEntry],
        rehearsal: DrawSample | None = None,
    ) -> None:
        self.prompter = prompter
        self._questions = questions
        self._schedule = schedule
        self._rehearsal = rehearsal

    def reference(self, number: int) -> Reference:
        """What a right reply says."""
        entry = self._schedule[number]
        if entry.rehearsal >= 0:
            _, ((text, answer), *_) = self._draw(entry.rehearsal)
            return Reference(text, answer)
        q = self._questions[entry.questions[0]]
        return Reference(q.text, q.answer, q.choices, q.letter, q.kind)

    def prompt(self, number: int) -> GrpoPrompt:
        """The prompt."""
        entry, prompter = self._schedule[number], self.prompter
        if entry.rehearsal >= 0:
            image, ((text, answer), *_) = self._draw(entry.rehearsal)
        else:
            question = self._questions[entry.questions[0]]
            style = prompter.style_of(question, entry.epoch, entry.progress)
            image, answer = prompter.picture(question, style, entry.tokens), question.answer
            text = prompter.wording(question, style)
        view = prompter.view(image, entry.tokens)
        ids = prompter.expand(prompter.tokenize(text, answer).ids, view.cells)
        return GrpoPrompt(view, tuple(ids), prompter.engine.backbone.image_token_id)

    def _draw(self, seed: int) -> Any:
        if self._rehearsal is None:
            raise ValueError("A rehearsal entry needs something that draws.")
        return self._rehearsal(seed)


class PromptProcessor(ProcessorMixin):
    """The processor that the trainer sees: its images are finished prompts.

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

        prompts = [one for group in images for one in group]
        length = max(len(one.ids) for one in prompts)
        kinds = torch.zeros(len(prompts), length, dtype=torch.long)
        for index, one in enumerate(prompts):
            kinds[index, length - len(one.ids) :] = (torch.tensor(one.ids) == one.image_token).long()
        return BatchFeature({**_pixels(prompts), "mm_token_type_ids": kinds})

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """The tokenizer alone; the image processor is the base's."""
        self.tokenizer.save_pretrained(save_directory)


def make_reward(
    reader: PromptReader, recipe: StudentRecipe, judge: JudgeCall | None = None
) -> Callable[..., list[float | None]]:
    """The one reward function of a run, as the trainer calls it."""

    def reward(
        completions: Sequence[Any], row: Sequence[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float | None]:
        rewards = [
            accuracy(
                completion[0]["content"],
                reader.reference(number),
                form=recipe.answer_form,
                longest_plain=recipe.longest_plain,
                counting=recipe.grpo.counting,
                judge=judge,
            )
            for completion, number in zip(completions, row, strict=True)
        ]
        scored = [one.accuracy for one in rewards if one.accuracy is not None]
        log_metric("accuracy", sum(scored) / len(scored) if scored else 0.0)
        log_metric("well_formed", sum(one.form for one in rewards) / len(rewards))
        for kind in ("judge", "unjudged", "failed"):
            log_metric(f"by_{kind}", sum(one.by == kind for one in rewards) / len(rewards))
        return [combine(one, recipe.grpo.format_weight) for one in rewards]

    return reward


class GroupTrainer(GRPOTrainer):
    """Generates from the engine's prompts; see the module.

    Args:
        reader: of the schedule.
        at_once: answers that are generated together.
        **settings: of trl's trainer.
    """

    def __init__(self, reader: PromptReader, at_once: int, **settings: Any) -> None:
        self._reader, self._at_once = reader, at_once
        self._prompts: list[GrpoPrompt] = []
        super().__init__(**settings)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        ready: dict[int, GrpoPrompt] = {}
        for entry in inputs:
            if entry["row"] not in ready:
                ready[entry["row"]] = self._reader.prompt(entry["row"])
        self._prompts = [ready[entry["row"]] for entry in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        return [list(one.ids) for one in self._prompts], [[one] for one in self._prompts], {}

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: Any,
        has_tool_images: Any = None,
    ) -> Any:
        out: list[list[int]] = []
        for begin in range(0, len(prompt_ids), self._at_once):
            some = slice(begin, begin + self._at_once)
            prompts = [group[0] for group in images[some]]
            kinds = [[int(token == one.image_token) for token in one.ids] for one in prompts]
            fields = {**_pixels(prompts), "mm_token_type_ids": kinds}
            out += super()._generate_single_turn(prompt_ids[some], images[some], fields, num_generations)[0]
        return out, None


def make_grpo_trainer(
    run: TrainingRun[StudentRecipe],
    model: Any,
    reader: PromptReader,
    steps: int,
    *,
    judge: JudgeCall | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupTrainer:
    """The trainer, ready to run.

    Args:
        run: the student, its recipe and the phase's folder.
        model: the transformers model, or peft's wrapper around it.
        reader: of the schedule.
        steps: optimiser steps, of `recipe.grpo.batch` entries each.
        judge: for free answers.
        callbacks: called around steps.
    """
    recipe, backbone = run.recipe, run.engine.backbone
    rows = steps * recipe.grpo.batch
    prompts = [[{"role": "user", "content": "."}]] * rows
    trainer = GroupTrainer(
        reader,
        recipe.grpo.micro_batch,
        model=model,
        reward_funcs=make_reward(reader, recipe, judge),
        args=_arguments(run, steps),
        train_dataset=Dataset.from_dict({"row": list(range(rows)), "prompt": prompts}),
        processing_class=PromptProcessor(backbone.image_processor, backbone.tokenizer, backbone.chat_template),
        callbacks=list(callbacks),
    )
    remove_printers(trainer)
    return trainer


def _arguments(run: TrainingRun[StudentRecipe], steps: int) -> GRPOConfig:
    settings = run.recipe.grpo
    return GRPOConfig(
        **common_arguments(run),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=forwards_of(run, settings.batch * settings.group // settings.micro_batch),
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        shuffle_dataset=False,
        temperature=settings.temperature,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        delta=settings.dual_clip,
        loss_type="dapo",
        scale_rewards="group",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        log_completions=False,
        log_multimodal=False,
    )


def _pixels(prompts: Sequence[GrpoPrompt]) -> Mapping[str, Any]:
    import torch

    return {
        "pixel_values": torch.cat([one.view.pixels for one in prompts]),
        "image_grid_thw": torch.cat([one.view.grid_thw for one in prompts]),
    }
