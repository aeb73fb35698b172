import hashlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from qzoom.distill.ask import answer_step, ask_step, validate_step
from qzoom.distill.choices import ChoicesSettings, ChoicesStep
from qzoom.distill.difficulty import DifficultySettings, difficulty_step
from qzoom.distill.items import ImageRef, Item, TargetRegion, apply
from qzoom.distill.roles import RolesSettings, build_roles
from qzoom.distill.vote import VoteSettings, vote_step
from qzoom.settings import from_mapping
from tests.distill.views import StillViews
from tests.llm.stub import Stub, serve, text_of

FAULTS: list[Any] = [(429, {"Retry-After": "0"}), (500, {}), b"garbage", "drop", (503, {}), b'{"choices": []}']


class Crops(StillViews):
    """Every region has a colour of its own, so that its crop is a call of its own."""

    def crop(self, item: Item) -> Image.Image:
        assert item.target is not None
        return Image.new("RGB", (20, 10), (item.target.box[0], 0, 0))


def drawn(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:4], "big")


def model(body: dict[str, Any], before: int) -> str:
    """Answers as content and seed say; wrong, empty or unclear now and then."""
    text, seed = text_of(body), body["seed"]
    place = drawn(body["messages"][-1])
    if "short questions" in text:
        return json.dumps(
            [{"question": f"What does tag {place % 997} say?", "kind": "ocr"}, {"question": "What shape?"}]
        )
    if "Decide four things" in text:
        return json.dumps({"answerable": True, "unique": place % 5 > 0, "same_answer": True, "clean": True})
    if "wrong answers" in text:
        return json.dumps([f"X{place % 89}", f"Y{place % 97}", f"Z{place % 83}", "ZZ1", "ZZ2"])
    if "first_answer" in text:
        return "yes" if place % 2 else "no"
    if "A. " in text:
        return "ABCD"[drawn(text, seed) % 4]
    if drawn(text, seed, "luck") % 12 == 0:
        return ""
    right = ["dark red", "maroon"][drawn(text, seed) % 2] if place % 3 == 0 else f"A{place % 1000}"
    return f"<answer>{right}</answer>"


def faulty(share: float) -> Callable[[dict[str, Any], int], Any]:
    def answer(body: dict[str, Any], before: int) -> Any:
        number = drawn(body, before)
        return FAULTS[number % len(FAULTS)] if number / 2**32 < share else model(body, before)

    return answer


def run(folder: Path, share: float) -> tuple[list[str], Counter[str], Stub, int]:
    stub = Stub(faulty(share))
    with serve(stub) as url:
        end = {"url": url, "model": "m", "timeout_s": 100.0, "concurrency": 16}
        by = {"by": "endpoint", "endpoints": [end]}
        roles = build_roles(
            from_mapping(
                RolesSettings,
                {
                    "question_writer": by,
                    "validator": by,
                    "judge": by,
                    "distractor_writer": by,
                    "student": by | {"plain": True},
                }
                | {"teachers": [by | {"name": name} for name in ("a", "b")]}
                | {"calls": {"retries": 40, "backoff_s": 0.002, "longest_s": 0.05}},
                "test",
            ),
            folder / "calls.sqlite",
        )
        roles.check()
        views = Crops()
        choices = ChoicesSettings(none_share=0.2, negatives=0.5)
        steps = {
            "ask": ask_step(roles.question_writer, views),
            "validate": validate_step(roles.validator, views),
            "answer": answer_step(roles.teachers, views, 4),
            "vote": vote_step(VoteSettings(), roles.judge),
            "choices": ChoicesStep(roles.distractor_writer, views, choices),
            "difficulty": difficulty_step(roles.student, views, DifficultySettings(samples=2, low=0.0)),
        }

        def follow(start: Item) -> list[Item]:
            items = [start]
            for name, step in steps.items():
                items = [made for item in items for made in apply(name, step, item)]
            return items

        starts = [
            Item(
                ImageRef("b" * 20, "x.png", 400, 200),
                TargetRegion((i, 50, i + 60, 90), (i, 45, i + 70, 95), "given"),
                seed=i,
            )
            for i in range(16)
        ]
        with ThreadPoolExecutor(8) as pool:
            items = [item for made in pool.map(follow, starts) for item in made]
        failures = sum(cost.failures for cost in roles.costs())
        roles.close()
    reasons = Counter(decision.reason for item in items for decision in item.decisions if not decision.kept)
    return [item.to_json() for item in items], reasons, stub, failures


def test_failing_endpoints_change_no_item(tmp_path):
    calm, reasons, stub, failures = run(tmp_path / "calm", 0.0)
    assert failures == 0
    assert set(stub.asked.values()) == {1, 2}  # two teachers send the same; nothing else is asked twice
    assert reasons["not unique in the whole picture"] > 0
    assert sum('"kept": false' not in line for line in calm) >= 5
    rough, _, other, failures = run(tmp_path / "rough", 0.3)
    assert rough == calm
    assert failures > 0.2 * sum(stub.asked.values())
    assert other.paid == stub.paid  # a usable reply is never bought twice
