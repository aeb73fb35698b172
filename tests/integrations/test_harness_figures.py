"""Our harness variants against lmms-eval itself, on random texts and on one row of every benchmark."""

import importlib
import importlib.resources
import random

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; docs/evaluation.md says how")

from qzoom.data.benchmarks.registry import BENCHMARKS
from qzoom.scoring.metrics import METRICS

TEXT = (
    "the a An one Two none 3 3.5 1,000 50% A B (C) D. E answer is option blue red Z don't dont couldnt've somebody'd "
    "yall'd've 'tis it's U.S.A. a/b - ... , ? ; $5 Ｆｕｌｌ　ｗ 0 0.0 nan -3 [x] B) _ @ ß"
)
WORDS = TEXT.split(" ")
MESSAGE = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}


def upstream(path):
    return importlib.import_module(f"lmms_eval.tasks.{path}")


def anls(said, answers, choices):
    from lmms_eval.api.metrics import anls as theirs

    return theirs(answers, [said])["anls"]


def vqa(said, answers, choices):
    doc = {"answers": list(answers), "question_id": 1}
    return upstream("textvqa.utils").textvqa_process_results(doc, [said])["exact_match"]


def relaxed(said, answers, choices):
    return float(upstream("chartqa.utils").relaxed_correctness(said, answers[0]))


def ocr(said, answers, choices, dataset="IIIT5K"):
    doc = {"answer": list(answers), "dataset": dataset, "question_type": "x"}
    return upstream("ocrbench.utils").ocrbench_process_results(doc, [said])["ocrbench_accuracy"]["score"]


def formula(said, answers, choices):
    return ocr(said, answers, choices, "HME100k")


def vstar(said, answers, choices):
    doc = {"label": answers[0], "text": "", "question_id": 1}
    return upstream("vstar_bench.utils").vstar_process_results(doc, [said])["vstar_overall_acc"]["score"]


def mme(said, answers, choices):
    return float(upstream("mme_realworld.utils").extract_characters_regex(said) == answers[0])


def hrbench(said, answers, choices):
    judge = upstream("hrbench.hrbench_evals").HRBenchEval("")
    found = judge.can_infer(said.strip(), dict(zip("ABCD", choices, strict=True)))
    return float(bool(found) and found.lower() == answers[0].lower())


THEIRS = {
    "anls": anls, "vqa_accuracy": vqa, "relaxed_accuracy": relaxed, "contains": ocr, "contains_formula": formula,
    "choice_vstar": vstar, "choice_mme": mme, "choice_hrbench": hrbench,
}  # fmt: skip


def phrase(draw):
    words = (draw.choice(WORDS) + draw.choice([" ", "  ", "", "\n"]) for _ in range(draw.randint(0, 6)))
    return "".join(words)


@pytest.mark.parametrize("name", THEIRS)
def test_the_same_figures(name):
    draw = random.Random(name)
    right = 0
    for _ in range(400):
        said = phrase(draw)
        answers = [phrase(draw) for _ in range(draw.choice([1, 3, 10]))]
        answers[0] = said if draw.random() < 0.3 else answers[0]
        choices = [phrase(draw).strip() or "x" for _ in range(4)]
        if name.startswith("choice"):
            answers = [draw.choice("ABCD")]
        theirs = THEIRS[name](said, answers, choices)
        assert METRICS[name].harness(said, answers, choices) == pytest.approx(theirs, abs=1e-12), (said, answers)
        right += theirs > 0
    assert 20 < right < 400


PROMPTS = {
    "textvqa": (
        "textvqa.utils",
        "textvqa_doc_to_text",
        {"question": "what Brand is It?", "answers": ["a"]},
        MESSAGE | {"ocr": False},
    ),
    "docvqa": ("docvqa.utils", "docvqa_doc_to_text", {"question": "What is the Date?", "answers": ["a"]}, MESSAGE),
    "infovqa": ("infovqa.utils", "infovqa_doc_to_text", {"question": "How many?", "answers": ["a"]}, MESSAGE),
    "chartqa": (
        "chartqa.utils",
        "chartqa_doc_to_text",
        {"question": "Which year?", "answer": "1", "type": "human_test"},
        {"pre_prompt": "", "post_prompt": "\nAnswer the question with a single word."},
    ),
    "ocrbench": (
        "ocrbench.utils",
        "ocrbench_doc_to_text",
        {"question": " what? ", "answer": ["a"], "dataset": "x", "question_type": "y"},
        {"pre_prompt": "", "post_prompt": ""},
    ),
    "vstar": (
        "vstar_bench.utils",
        "vstar_doc_to_text",
        {"text": "What colour? (A) red (B) light blue\n(C) black (D) white", "label": "B", "category": "x"},
        {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."},
    ),
    "mme_realworld_lite": (
        "mme_realworld.utils",
        "mme_realworld_doc_to_text",
        {
            "question": "How many?",
            "multi-choice options": ["(A) 1", "(B) 2"],
            "answer": "A",
            "category": "Perception/x",
        },
        {},
    ),
    "hrbench4k": (
        "hrbench.utils",
        "hrbench_doc_to_text",
        {"question": " What? ", "A": "a cup", "B": "a hat", "C": None, "answer": "A", "category": "single"},
        {},
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_prompts(name):
    module, function, row, wording = PROMPTS[name]
    theirs = getattr(upstream(module), function)(dict(row), wording)
    assert BENCHMARKS[name].question(row).question == theirs


def test_the_same_data():
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    root = importlib.resources.files("lmms_eval") / "tasks"
    files = {
        "textvqa": ("textvqa/_default_template_textvqa_yaml", "textvqa/textvqa_val.yaml"),
        "docvqa": ("docvqa/_default_template_docvqa_yaml", "docvqa/docvqa_val.yaml"),
        "infovqa": ("infovqa/_default_template_infovqa_yaml", "infovqa/infovqa_val.yaml"),
        "chartqa": ("chartqa/chartqa.yaml",),
        "ocrbench": ("ocrbench/ocrbench.yaml",),
        "vstar": ("vstar_bench/_default_template_yaml",),
        "mme_realworld_lite": ("mme_realworld/mme_realworld_lite.yaml",),
        "hrbench4k": ("hrbench/hrbench4k.yaml",),
        "hrbench8k": ("hrbench/hrbench8k.yaml",),
    }
    for name, parts in files.items():
        task = {}
        for part in parts:
            task |= yaml.load((root / part).read_text(encoding="utf-8"), Loader)
        ours = BENCHMARKS[name]
        assert (ours.repo, ours.config, ours.split) == (
            task["dataset_path"],
            task.get("dataset_name"),
            task["test_split"],
        )
