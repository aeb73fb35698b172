import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom import QZoom
from qzoom.errors import ImageError, QuestionError, QueueFullError
from qzoom.serving.engines.base import Job
from qzoom.serving.engines.zooming import Piece, View, cache_salt
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import Answer
from tests.flow import read_once
from tests.serving.engines.simulated import Decoder, SimulatedEngine, front
from tests.serving.running import page

EXAMPLES = Path(__file__).parents[3] / "examples"
TWO_TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the date?"}]},
    {"role": "assistant", "content": "14/03/2019"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]},
]


@pytest.fixture(scope="module")
def model(model):
    """The native engine, reading once as the others do."""
    return read_once(model)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model)


@pytest.fixture(scope="module")
def engine(decoder):
    return SimulatedEngine(decoder, front())


async def collect(engine: SimulatedEngine, job: Job) -> tuple[list[str], Answer]:
    """Texts of an answer and the answer."""
    events = [event async for event in engine.answer(job)]
    assert [event.kind for event in events][:: len(events) - 1] == ["perception", "answer"]
    assert events[-1].answer is not None
    return [event.text for event in events if event.kind == "text"], events[-1].answer


def assert_equal(own: Answer, wanted: Answer) -> None:
    assert (own.tokens, own.text) == (wanted.tokens, wanted.text)
    assert own.gate.to_dict() == pytest.approx(wanted.gate.to_dict())
    assert [dataclasses.replace(r, score=0.0) for r in own.regions] == [
        dataclasses.replace(r, score=0.0) for r in wanted.regions
    ]
    assert (own.usage, own.finish_reason) == (wanted.usage, wanted.finish_reason)
    for ours, theirs in zip(own.heat_maps, wanted.heat_maps, strict=True):
        assert ours.values == pytest.approx(theirs.values, abs=1e-5)


@pytest.mark.parametrize(
    ("pictures", "question", "options"),
    [
        (["receipt.jpg"], "What is the total?", {}),
        (["receipt.jpg"], "What is the total?", {"zoom": "never"}),
        (["receipt.jpg"], "What is the total?", {"zoom": "always", "region_tokens": 20}),
        (["receipt.jpg"], "What is the total?", {"gate_threshold": 1.0, "coarse_tokens": 60}),
        (["receipt.jpg"], "What is the total?", {"region_threshold": 1.0, "zoom": "always"}),
        (["receipt.jpg"], "What is the date?", {"stop": "/0", "max_new_tokens": 20}),
        (["receipt.jpg"], "What is the date?", {"max_new_tokens": 3}),
        (["delivery-note.jpg"], "What is the date?", {"ignore_eos": True, "max_new_tokens": 17}),
        (["delivery-note.jpg", "receipt.jpg"], "What is the total?", {"zoom": "always"}),
        (["receipt.jpg", "delivery-note.jpg", "receipt.jpg"], "Dates?", {"zoom": "always", "coarse_tokens": 40}),
        (["receipt.jpg", "delivery-note.jpg"], TWO_TURNS, {"zoom": "always"}),
        ([], "Hello <|image_pad|> there", {}),
    ],
)
def test_answers_as_the_native_engine(model, engine, pictures, question, options):
    images = [EXAMPLES / name for name in pictures]
    wanted = model.ask(images, question, **options)
    texts, own = asyncio.run(collect(engine, Job(engine.model.request(images, question, **options))))
    assert_equal(own, wanted)
    assert "".join(texts) == own.text


def test_pictures_of_one_size_are_not_taken_for_each_other(model, engine):
    with Image.open(EXAMPLES / "receipt.jpg") as receipt:
        upright = receipt.convert("RGB")
    for picture in (upright, upright.transpose(Image.Transpose.ROTATE_180)):
        request = engine.model.request([picture], "What is the date?", zoom="never")
        _, answer = asyncio.run(collect(engine, Job(request)))
        assert_equal(answer, model.ask([picture], "What is the date?", zoom="never"))


def test_several_regions_stand_behind_their_pictures(model, decoder):
    rule = dataclasses.replace(model.config.box, components="all", max_regions=4)
    config = model.config.replace(box=rule, region_threshold=0.1)
    native = QZoom(dataclasses.replace(model.engine, config=config))
    plain = front()
    own = SimulatedEngine(decoder, QZoom(dataclasses.replace(plain.engine, config=config)))
    images = [EXAMPLES / "receipt.jpg", EXAMPLES / "delivery-note.jpg"]
    options = {"zoom": "always", "region_tokens": 90}
    wanted = native.ask(images, "What is the total?", **options)
    assert len(wanted.regions) > 1
    assert_equal(asyncio.run(collect(own, Job(own.model.request(images, "What is the total?", **options))))[1], wanted)


def test_the_map_decides_as_in_the_native_engine(model, decoder):
    config, picture = model.config.replace(decide_by="map"), EXAMPLES / "receipt.jpg"
    native = QZoom(dataclasses.replace(model.engine, config=config))
    own = SimulatedEngine(decoder, QZoom(dataclasses.replace(front().engine, config=config)))
    for threshold in (0.0, 1.0):
        options = {"gate_threshold": threshold, "max_new_tokens": 4}
        wanted = native.ask(picture, "What is the date?", **options)
        assert wanted.gate.zoomed == (threshold == 0.0)
        request = own.model.request(picture, "What is the date?", **options)
        assert_equal(asyncio.run(collect(own, Job(request)))[1], wanted)
    assert own.modes == ["always"] * 2


def test_a_look_is_a_perception(model, engine):
    picture = EXAMPLES / "receipt.jpg"
    for options in ({}, {"gate_threshold": 1.0}, {"zoom": "never"}):
        wanted = model.perceive(picture, "What is the date?", **options)
        own = asyncio.run(engine.look(Job(engine.model.request(picture, "What is the date?", **options))))
        assert own.gate.to_dict() == pytest.approx(wanted.gate.to_dict())
        assert [r.box for r in own.regions] == [r.box for r in wanted.regions]
        assert own.usage == wanted.usage
    assert engine.modes[-3:] == ["both"] * 3


@pytest.mark.parametrize("lost", ["gate", "region"])
def test_checkpoints_without_a_branch(model, lost):
    native = QZoom(dataclasses.replace(model.engine, **{lost: None}))
    decoder = Decoder(native)
    decoder.heads.engine = dataclasses.replace(decoder.heads.engine, **{lost: None})
    plain = front()
    own = SimulatedEngine(decoder, QZoom(dataclasses.replace(plain.engine, **{lost: None})))
    options: dict[str, Any] = {"zoom": "never"} if lost == "region" else {}
    wanted = native.ask(EXAMPLES / "receipt.jpg", "What is the date?", **options)
    request = own.model.request(EXAMPLES / "receipt.jpg", "What is the date?", **options)
    assert_equal(asyncio.run(collect(own, Job(request)))[1], wanted)


def test_below_the_threshold_the_region_branch_does_not_run(engine):
    decoder, request = engine.decoder, engine.model.request(EXAMPLES / "receipt.jpg", "What is the date?")
    side = engine.model.engine.backbone.token_px
    image = engine.model.engine.backbone.resize(request.pictures[0].image, engine.model.config.coarse_tokens)
    params = {"grids": [[image.height // side, image.width // side]], "mode": "auto", "threshold": 1.0}
    assert decoder.look(request.ids, [image], params)["maps"] == []
    assert len(decoder.look(request.ids, [image], params | {"threshold": 0.0})["maps"]) == 1
    wrong = decoder.look(request.ids, [image], params | {"grids": [[2, 3]]})
    assert wrong == {"error": "The grids of the look do not fit the pictures of its prompt."}


def test_the_branches_keep_a_picture_and_go_on_from_there(model):
    decoder = Decoder(model)
    own, picture = SimulatedEngine(decoder, front()), EXAMPLES / "receipt.jpg"
    asked = [("What is the date?", {"gate_threshold": 1.0}), ("What is the total?", {}), ("Who?", {"zoom": "always"})]
    for question, options in asked:  # the gate's keys, then the region branch's too
        wanted = model.ask(picture, question, **options)
        request = own.model.request(picture, question, **options)
        assert_equal(asyncio.run(collect(own, Job(request)))[1], wanted)
    assert (decoder.heads.kept.hits, decoder.heads.kept.misses) == (2, 1)
    assert decoder.heads.kept.entries == 1


def test_the_looks_token_begins_the_answer_unless_penalties_count_it(model, engine):
    lengths: list[int] = []

    class Watched(SimulatedEngine):
        async def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
            lengths.append(len(view.begun))
            async for piece in super().send_answer(view):
                yield piece

    own = Watched(engine.decoder, engine.model)
    base = {"gate_threshold": 1.0, "max_new_tokens": 4, "ignore_eos": True}
    for more in ({}, {"presence_penalty": 0.5}, {"gate_threshold": 0.0}, {"max_new_tokens": 1}):
        request = own.model.request(EXAMPLES / "receipt.jpg", "What is the total?", **(base | more))
        answer = asyncio.run(collect(own, Job(request)))[1]
        assert len(answer.tokens) == (base | more)["max_new_tokens"]
    assert lengths == [1, 0, 0]  # the last answer was the look's token alone


def test_refusals(engine):
    strip = engine.model.request(Image.new("RGB", (3980, 20)), "When?", coarse_tokens=(250, 300))
    with pytest.raises(ImageError, match=r"\d+ x 1 visual tokens is longer"):
        asyncio.run(collect(engine, Job(strip)))
    long = engine.model.request(page(), "When? " * 4000)
    with pytest.raises(QuestionError, match="the model reads at most"):
        asyncio.run(collect(engine, Job(long)))


def test_the_queue_is_bounded_and_a_closed_answer_frees_its_slot(decoder):
    async def scene() -> None:
        engine = SimulatedEngine(decoder, front(), SchedulerLimits(slots=1, queue=1))
        job = Job(engine.model.request(page(), "When?", max_new_tokens=4))
        async with aclosing(engine.answer(job)) as first:
            await anext(first)
            waiting = asyncio.ensure_future(collect(engine, job))
            while not engine.waiting:
                await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await anext(engine.answer(job))
            assert (engine.running, engine.waiting) == (1, 1)
        assert (await waiting)[1].finish_reason in {"stop", "length"}
        assert (engine.running, engine.waiting) == (0, 0)

    asyncio.run(scene())
    assert cache_salt("ann") != cache_salt("bob")
    assert "ann" not in cache_salt("ann")
