"""Estimate the time of the benchmarks: a few questions of each kind are measured, the rest is arithmetic."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.ablation_variants import DECISIONS, GATES, THRESHOLDS
from benchmarks.evidence import Look, Work, options_of
from qzoom.evaluation.tables import markdown_table

if TYPE_CHECKING:
    from benchmarks.ablation_variants import Variant
    from qzoom.data.samples import Task
    from qzoom.model import QZoom

PROBES = (Look(64), Look(576), Look(64, 64, 0.0), Look(196, 288, 0.0))


def seconds_of(model: QZoom, task: Task, longest: int = 128) -> dict[bool, tuple[float, float]]:
    """Seconds per picture as (fixed, per token of the cap), plain under False and zooming under True.

    All questions about the first picture are asked in four ways; two points make a line.
    """
    from qzoom.evaluation.runner import ask_sample

    sample = task.sample(0)
    took: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for look in PROBES:
        rows = ask_sample(model, sample, options_of(model, look, longest))
        took[bool(look.region)].append((look.cap, sum(row.seconds for row in rows)))
    out = {}
    for zooms, ((low, first), (high, second)) in took.items():
        slope = max(0.0, (second - first) / (high - low))
        out[zooms] = (max(0.0, first - slope * low), slope)
    return out


def minutes_of(works: Iterable[Work], cost: dict[str, dict[bool, tuple[float, float]]]) -> dict[tuple[str, str], list]:
    """For each part and task: runs, pictures left, minutes."""
    out: dict[tuple[str, str], list] = {}
    for work in works:
        entry = out.setdefault((work.part, work.task.name), [0, 0, 0.0])
        fixed, slope = cost[work.task.name][bool(work.look.region)]
        left = work.left()
        entry[0] += 1
        entry[1] += left
        entry[2] += left * (fixed + slope * work.look.cap) / 60
    return out


def print_plan(model: QZoom, works: Iterable[Work], times: int = 0) -> None:
    """Print runs, pictures left and minutes of each part.

    Args:
        model: the model under test.
        works: what would be asked.
        times: pairs of questions that would be timed.
    """
    began = time.perf_counter(), time.process_time()
    every = list({work.path: work for work in works}.values())
    cost = {
        task.name: seconds_of(model, task, every[0].longest) for task in {w.task.name: w.task for w in every}.values()
    }
    found = minutes_of(every, cost)
    rows = [["part", "pictures of", "runs", "pictures left", "minutes"]]
    rows += [[part, kind, str(runs), str(left), f"{took:.0f}"] for (part, kind), (runs, left, took) in found.items()]
    print(markdown_table(rows))
    _say_total(sum(took for _, _, took in found.values()), began)
    if times:
        print(f"Then about {times} pairs of questions are timed (--time), a few minutes on a quiet machine.")


def print_ablation_plan(model: QZoom, given: Namespace, tasks: Sequence[Task], variants: Sequence[Variant]) -> None:
    """Print the minutes of labels, trainings and answers, from one picture and one step each."""
    began = time.perf_counter(), time.process_time()
    zoom = {task.name: seconds_of(model, task, given.max_new_tokens)[True] for task in tasks}
    label = _label_seconds(model, given)
    encode, step = _training_seconds(model, given)
    caps = [sum(look) for look in given.looks]
    each = {task.name: zoom[task.name][0] + zoom[task.name][1] * sum(caps) / len(caps) for task in tasks}
    share = given.calibration_questions / given.questions
    answers = sum(each[task.name] * len(task.ids) for task in tasks) * (len(caps) + len(THRESHOLDS) * share)
    kept = min(given.pictures * 4 * len(caps), given.steps * given.batch)
    trained = sum(variant.trains for variant in variants)
    rows = [["part", "times", "minutes each", "minutes"]]

    def add(name: str, count: int, seconds: float) -> float:
        rows.append([name, str(count), f"{seconds / 60:.1f}", f"{count * seconds / 60:.0f}"])
        return count * seconds / 60

    total = add("labels: own and known answers", 2, given.pictures * label)
    total += add("region trainings", trained, kept * encode + given.steps * step)
    total += add("answers of a variant, thresholds included", len(variants), answers)
    if any(variant.answers for variant in variants):
        mined = given.mine_pictures * sum(each.values()) / len(each) / 2
        total += add("stage 2", 1, mined + given.answer_steps * given.batch * encode * 8)
    if given.only is None or GATES in given.only:
        total += add("the ladder of gate labels", 1, given.gate_pictures * label * len(given.ladder) / 2)
        total += add("gate trainings and answers", 2, given.gate_steps * step + answers / 2)
        total += add("answers with other decisions", len(DECISIONS), answers / 2)
    print(markdown_table(rows))
    _say_total(total, began)


def _say_total(minutes: float, began: tuple[float, float]) -> None:
    """The sum, and what it would be if this process got a core for itself; wall and processor time of its start."""
    wall, own = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"Together about {minutes:.0f} minutes in one process on this machine as busy as it is now.")
    if own < 0.8 * wall:
        print(f"Others are at work: with a core of its own it would be about {minutes * own / wall:.0f} minutes.")


def _label_seconds(model: QZoom, given: Namespace) -> float:
    """Of the answers to four questions about one picture at the teacher's resolution."""
    from qzoom.data.questions import load_picture, open_questions
    from qzoom.engine.chat import ChatEncoder
    from qzoom.labels.respond import generate, prepare_image

    (question,), _ = open_questions(["documents:1:1"])
    texts = [turn.question for turn in question.turns]
    start = time.perf_counter()
    image = prepare_image(load_picture(question), "dynamic", given.teacher_tokens)
    generate(model.engine, ChatEncoder(model.engine.backbone), image, texts, max_new_tokens=given.label_tokens)
    return 1.3 * (time.perf_counter() - start)  # attention runs the answer once more


def _training_seconds(model: QZoom, given: Namespace) -> tuple[float, float]:
    """Of one sample through vision and shared layers, and of one optimiser step of the branch."""
    import torch

    from qzoom.config import TokenBudget
    from qzoom.data.questions import load_picture, open_questions
    from qzoom.training.forward import run_stack

    backbone, config = model.engine.backbone, model.engine.config
    (question,), _ = open_questions(["documents:1:1"])
    picture, tokens = load_picture(question), max(coarse for coarse, _ in given.looks)
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        with torch.no_grad():
            backbone.encode([picture.image], [TokenBudget(1, tokens)])
    encode = 2 * (time.perf_counter() - start)  # picture file and shared layers on top
    count = min(16, given.batch)
    hidden = [torch.randn(tokens + 40, backbone.hidden_size, dtype=backbone.dtype) for _ in range(count)]
    hidden = [row.to(backbone.device).requires_grad_() for row in hidden]
    places = torch.arange(tokens + 40, device=backbone.device).expand(backbone.position_axes, -1)
    layers = list(backbone.layers[: config.branch_layers])
    for _ in range(2):
        start = time.perf_counter()
        outputs = run_stack(backbone, layers, hidden, [places] * count)
        torch.stack(outputs).float().square().mean().backward()
    return encode, 2 * (time.perf_counter() - start) * given.batch / count  # float32 takes longer
