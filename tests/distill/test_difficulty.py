import dataclasses
from functools import partial
from typing import Any

import pytest
from PIL import Image

from qzoom.data import overlay
from qzoom.distill import by_rule
from qzoom.distill.difficulty import DifficultySettings, difficulty_step
from qzoom.distill.items import Agreement, Choices, Item, QuestionDraft, Step, Vote
from qzoom.distill.roles import Role
from qzoom.errors import ConfigError, DataError
from tests.distill.views import ITEM, Judge, StillViews

VIEWS = StillViews()
ANSWERED = dataclasses.replace(ITEM, answer=Agreement("A4", 6, 8, ()))
CHOSEN = dataclasses.replace(ANSWERED, choices=Choices(("B7", "A4", "C9"), "B", "rule"))


class Student(Role):
    """Answers in order; "!" fails, None abstains."""

    def __init__(self, *answers: str | None) -> None:
        seen: list[tuple[Any, str]] = []

        def read(item: Item, image: Any, text: str, sample: int) -> Vote:
            seen.append((image, text))
            answer = answers[sample]
            status = "failed" if answer == "!" else "answered" if answer else "abstained"
            return Vote("student", sample, answer if answer and status == "answered" else "", status)

        super().__init__("student", "student@1", read)
        object.__setattr__(self, "seen", seen)


def difficulty(student: Any, views: Any, settings: DifficultySettings | None = None, judge: Any = None) -> Step:
    return difficulty_step(student, views, settings or DifficultySettings(), judge)


@pytest.mark.parametrize(
    ("answers", "passes", "samples", "reason"),
    [
        (("A4", "a4.", "B7", None), 2, 4, ""),
        (("A4", "no", "no", "no"), 1, 4, ""),
        (("no", "no", None, "no"), 0, 4, "too hard for the student"),
        (("A4", "A4", "A4", "A4"), 4, 4, "too easy for the student"),
        (("A4", "no", "!", "!"), 1, 2, "too few answers of the student"),
        (("!", "!", "!", "!"), 0, 0, "too few answers of the student"),
    ],
)
def test_only_the_band_is_kept(answers, passes, samples, reason):
    (item,) = difficulty(Student(*answers), VIEWS)(ANSWERED)
    assert (item.difficulty.passes, item.difficulty.samples) == (passes, samples)
    assert item.decisions[-1].reason == reason
    assert item.kept is (reason == "")
    assert ("student", "student@1") in item.models


def test_fewer_answers_may_do_and_a_rule_errs_as_told():
    settings = DifficultySettings(least=2)
    assert difficulty(Student("A4", "no", "!", "!"), VIEWS, settings)(ANSWERED)[0].kept
    student = Role("s", "rule", partial(by_rule.read, name="s", error_rate=0.5))
    passes = 0
    for seed in range(50):
        item = dataclasses.replace(ANSWERED, seed=seed)
        passes += difficulty(student, VIEWS)(item)[0].difficulty.passes
    assert 70 <= passes <= 130


@pytest.mark.parametrize("style", overlay.STYLES)
def test_the_student_sees_the_training_view(style):
    student = Student("A4", "no")
    settings = DifficultySettings(samples=2, view=style)
    (item,) = difficulty(student, VIEWS, settings)(ANSWERED)
    whole, box = VIEWS.whole(ANSWERED), ANSWERED.target.box
    image, text = student.seen[0]
    assert image.tobytes() == overlay.draw(whole, box, style).tobytes()
    assert text == "\n".join(part for part in (ANSWERED.draft.text, overlay.clause(style, box, whole.size)) if part)
    assert item.difficulty.view == style


def test_choices_are_asked_as_in_training_and_read_by_letter():
    student = Student("B", "(B) A4", "A", "C9")
    (item,) = difficulty(student, VIEWS, DifficultySettings(clause=False))(CHOSEN)
    assert item.difficulty.passes == 2
    assert student.seen[0][1].split("\n")[:4] == [ANSWERED.draft.text, "A. B7", "B. A4", "C. C9"]


def test_a_judge_reads_free_answers_and_negatives_stay():
    item = dataclasses.replace(ANSWERED, answer=Agreement("dark red", 6, 8, ()))
    answers = ("maroon", "blue", "Dark red", "green")
    assert difficulty(Student(*answers), VIEWS)(item)[0].difficulty.passes == 1
    assert difficulty(Student(*answers), VIEWS, judge=Judge(("dark red", "maroon")))(item)[0].difficulty.passes == 2
    negative = dataclasses.replace(ANSWERED, draft=QuestionDraft("Q?", "ocr", "rule", True, "p", "none"))
    wrong = Student("a", "b", "c", "d")
    assert difficulty(wrong, VIEWS)(negative)[0].kept
    assert difficulty(wrong, VIEWS, DifficultySettings(negatives=True))(negative)[0].kept is False


def test_pictures_are_not_drawn_upon():
    kept = Image.new("RGB", (400, 200), "grey")

    class Shared(StillViews):
        def whole(self, item: Item) -> Image.Image:
            return kept

    difficulty(Student(*["A4"] * 4), Shared())(ANSWERED)
    assert kept.tobytes() == Image.new("RGB", (400, 200), "grey").tobytes()


@pytest.mark.parametrize(
    "bad",
    [{"low": 0.8}, {"low": -1}, {"samples": 0}, {"least": 5}, {"view": "circle"}, {"clause": 1}, {"negatives": 0}],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError):
        DifficultySettings(**bad)


def test_without_an_answer_it_says_what_to_run():
    with pytest.raises(DataError, match="run the step vote first"):
        difficulty(Student(), VIEWS)(ITEM)
