"""Pictures with one dark quadrant, labels that say which, and a small random model in a folder to train on them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import base_digest
from qzoom.store.records import RecordWriter, start_store
from qzoom.store.schema import (
    Provenance,
    Question,
    RegionLabel,
    ResolutionSweep,
    Turn,
    Verdict,
    ZoomComparison,
    content_id,
)
from tests.tiny_models import build_engine

TOKENS = 12


def draw(folder: Path) -> None:
    for number in range(8):
        corner = number % 4
        picture = Image.new("RGB", (128, 96), (255, 255 - 20 * number, 255))
        picture.paste("black", (corner % 2 * 64, corner // 2 * 48, corner % 2 * 64 + 64, corner // 2 * 48 + 48))
        picture.save(folder / f"{number}.png")


def question_of(folder: Path, number: int) -> Question:
    turns = (Turn("where?", ("here",)), Turn("dark?", ("yes",)))
    return Question(f"q{number}", f"{number}.png", turns, "text", "drawn", str(folder))


def quadrant(corner: int) -> np.ndarray:
    labels = np.zeros((4, 4), np.int8)
    labels[corner // 2 * 2 : corner // 2 * 2 + 2, corner % 2 * 2 : corner % 2 * 2 + 2] = 1
    labels[0, 0] = -100 if corner else labels[0, 0]
    return labels


def region_store(folder: Path, pictures: Path, weights: str, tokens: int = TOKENS) -> Path:
    start_store(folder, "regions", {"tokens": tokens}, Provenance("model", weights))
    with RecordWriter(folder) as out:
        for number in range(8):
            question = question_of(pictures, number)
            labels = quadrant(number % 4)
            records = [(question, {})]
            for turn in range(2 if number < 4 else 1):
                usable = (number, turn) != (3, 1)
                label = RegionLabel(
                    question=content_id(question), turn=turn, response="", attention="", text="there",
                    prompt=question.turns[turn].question, box=(0, 0, 2, 2), usable=usable,
                    foreground=int((labels == 1).sum()), valid=int((labels != -100).sum()), view="dynamic",
                    size_px=(128, 96),
                )  # fmt: skip
                records.append((label, {"labels": labels}))
            out.append(f"s{number}", records)
    return folder


def gate_store(folder: Path, pictures: Path, weights: str) -> Path:
    """Pictures with a dark upper half need a closer look, the others do not."""
    start_store(folder, "gate", {}, Provenance("model", weights))
    with RecordWriter(folder) as out:
        for number in range(8):
            question = question_of(pictures, number)
            right = ("no", "no", "here", "here") if number % 4 < 2 else ("here",) * 4
            out.append(
                f"s{number}",
                [(question, {}), (ResolutionSweep(content_id(question), 0, (4, 8, 12, 16), right, "here"), {})],
            )
    return folder


def comparison_store(folder: Path, pictures: Path, weights: str, tokens: int) -> Path:
    """The same for a model that reads every picture as so many tokens: answers without and with the zoom."""
    start_store(folder, "gate", {}, Provenance("model", weights))
    with RecordWriter(folder) as out:
        for number in range(8):
            question = question_of(pictures, number)
            coarse = "no" if number % 4 < 2 else "here"
            made = ZoomComparison(content_id(question), 0, tokens, coarse, "here", ("here",))
            out.append(f"s{number}", [(question, {}), (made, {})])
    return folder


def verdict_store(folder: Path, pictures: Path, weights: str) -> Path:
    start_store(folder, "mine", {}, Provenance("model", weights))
    with RecordWriter(folder) as out:
        for number in range(8):
            question = question_of(pictures, number)
            rights = [(True, False), (False, True), (True, True), (False, False)][number % 4]
            verdict = Verdict(content_id(question), 0, "here", "there", *rights, "rule", ((0, 0, 64, 48),))
            out.append(f"s{number}", [(question, {}), (verdict, {})])
    return folder


def make_world(family: str, folder: Path) -> Path:
    """Folders: a model with branches (`base`), pictures, and records of every stage made with it."""
    made = build_engine(family)
    save_pretrained(made, folder / "base", include_base=True)
    weights = base_digest(load_engine(folder / "base", dtype="float32"))
    (folder / "pictures").mkdir()
    draw(folder / "pictures")
    fixed = made.backbone.default_budget().max_tokens if made.backbone.fixed_grid else 0
    region_store(folder / "regions", folder / "pictures", weights, fixed or TOKENS)
    if fixed:
        comparison_store(folder / "gate", folder / "pictures", weights, fixed)
    else:
        gate_store(folder / "gate", folder / "pictures", weights)
    verdict_store(folder / "mined", folder / "pictures", weights)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The Qwen3-VL one."""
    return make_world("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="session")
def worlds(world, tmp_path_factory):
    """Both families."""
    return {"qwen3_vl": world, "qwen2_5_vl": make_world("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl"))}
