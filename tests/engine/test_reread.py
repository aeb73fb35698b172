import dataclasses
import weakref
from typing import Any

import pytest
import torch

from qzoom.config import RereadRule, TokenBudget
from qzoom.engine import reread
from qzoom.engine.attention import response_attention, token_attention
from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.cache import KVCache
from qzoom.engine.flow import KeyedEvent
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.request import Request
from qzoom.engine.reread import _line_of, _part_of, leave_room
from qzoom.engine.zoom import zoom
from qzoom.errors import CheckpointError, ConfigError
from qzoom.heads.boxes import MapBox
from qzoom.model import QZoom
from qzoom.types import Answer, SamplingParams
from tests import tiny_models
from tests.faults import SHORT, fail_once
from tests.flow import request, run
from tests.plain import full_pass

PAGES = [tiny_models.picture(51 + i, 200 + 60 * i, 160) for i in range(3)]
QUESTION = "What is the total amount?"
LAYER = dict.fromkeys(tiny_models.HYBRIDS, 3)  # the first with full attention
FAMILIES = [*tiny_models.FAMILIES, "llava", *tiny_models.HYBRIDS]


def rule(family: str = "qwen3_vl", **changes: Any) -> RereadRule:
    return RereadRule(**{"layer": LAYER.get(family, 1), "heads": (0, 1), "below": 1.0, "least_tokens": 1} | changes)


def reader(own: RereadRule | None, family: str = "qwen3_vl") -> QZoom:
    base = tiny_models.engine(family)
    return QZoom(dataclasses.replace(base, config=base.config.replace(reread=own)))


def asked(model: QZoom, **options: Any) -> Any:
    return model.ask(PAGES[0], QUESTION, **{"zoom": "always", "max_new_tokens": 5} | options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_every_token(family):
    engine = tiny_models.engine(family)
    (one,) = run(engine, [request(engine, PAGES, QUESTION, zoom="always", region_threshold=0.0)])
    prompt = one.after.state.prompt
    (row,) = prefill(engine, [one.after], Stopwatch(engine.backbone.device))
    layer, fed = LAYER.get(family, 1), [5, 9, 7]
    maps = token_attention(engine.backbone, prompt, row.cache, fed, [(layer, 0), (layer, 1)])
    assert [tuple(m.shape) for m in maps] == [(4, *span.features.grid) for span in prompt.spans]
    means = response_attention(engine.backbone, prompt, row.cache, fed, [layer])
    coarse = [m for m, span in zip(maps, prompt.spans, strict=True) if span.role == "coarse"]
    for own, mean in zip(coarse, means, strict=True):
        torch.testing.assert_close(own[1:].mean(0), mean.mean_of([(layer, 0), (layer, 1)]), atol=1e-6, rtol=0)
    # the row of the prompt's last token is what the token before a longer answer has
    shorter = token_attention(engine.backbone, prompt, row.cache, [], [(layer, 0), (layer, 1)])
    for own, alone in zip(maps, shorter, strict=True):
        torch.testing.assert_close(own[:1], alone, atol=1e-6, rtol=0)
        assert bool(alone.any()) != (family in tiny_models.HYBRIDS), "linear layers cannot run a token again"


def test_the_line_that_was_read():
    maps = torch.zeros(5, 4, 6)
    for token, (row, column) in enumerate([(2, 1), (2, 2), (1, 3), (3, 3)]):
        maps[token, row, column] = 0.6
    maps[4, 0, 5] = 0.6  # too far from the middle line
    assert _line_of(maps) == (1, 1, 4, 4)
    assert _line_of(maps[:2]) == (1, 2, 3, 3)
    assert _line_of(maps[:2] * 0.3) is None, "the tokens did not look at the region"


def test_a_part_of_a_region_in_pixels():
    whole = MapBox(1, (2.0, 1.0, 6.0, 4.0), (200, 100, 600, 400), 0.7)
    part = _part_of(whole, (2.0, 1.0, 4.0, 2.0), (6, 8), (1000, 400), margin=(1.5, 0.75))
    # a token is 50 px in both directions
    assert part.box == (225, 112, 475, 238)
    assert part.cells == pytest.approx((2.25, 1.12, 4.75, 2.38))
    assert (part.image, part.score) == (1, 0.7)
    edge = _part_of(whole, (6.0, 4.0, 8.0, 6.0), (6, 8), (610, 400), margin=(1.5, 0.75))
    assert edge.box == (425, 262, 610, 400), "no further than the picture"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsure_answer_is_read_again_from_coarse_view_and_second_crop(family):
    model = reader(rule(family), family)
    engine, clock = model.engine, Stopwatch(model.engine.backbone.device)
    fixed = engine.backbone.fixed_grid
    answer = asked(model, **{"region_tokens": (1, 72)} if fixed else {"coarse_tokens": 20, "region_tokens": (4, 30)})
    first, second = answer.regions
    assert (first.reread, second.reread) == (False, True)
    if not fixed:
        assert first.tokens <= 20
        assert 6 <= second.tokens <= 10
    assert answer.usage.region_tokens == first.tokens + second.tokens
    once = asked(reader(None, family), **{} if fixed else {"coarse_tokens": 20, "region_tokens": (4, 20)})
    assert [(r.box, r.tokens) for r in once.regions] == [(first.box, first.tokens)]
    # the second answer, from transformers' own pass over the prompt with the second crop
    limits = {"coarse_tokens": TokenBudget(4, 20), "region_tokens": TokenBudget(6, 10)}
    options: dict[str, Any] = {} if fixed else limits
    item = run(engine, [request(engine, PAGES[0], QUESTION, zoom="always", **options)])[0].before
    grid, (width, height) = item.state.prompt.spans[0].features.grid, PAGES[0].size
    x0, y0, x1, y1 = second.box
    cells = (x0 / width * grid[1], y0 / height * grid[0], x1 / width * grid[1], y1 / height * grid[0])
    items, _ = zoom(engine, [dataclasses.replace(item, boxes=(MapBox(0, cells, second.box, 0.0),))], clock)
    assert len(items[0].state.prompt.spans[1].features.tokens) == second.tokens
    token = int(full_pass(engine.backbone, items[0].state.prompt).argmax())
    assert answer.tokens[0] in (token, once.tokens[0])
    if answer.tokens != once.tokens:
        assert answer.tokens[0] == token


def test_the_likelier_answer_counts():
    seen = set()
    for page in PAGES:
        for question in (QUESTION, "When?", "Who?"):
            options = {"zoom": "always", "max_new_tokens": 4, "region_tokens": (4, 30), "logprobs": 0}
            answer = reader(rule()).ask(page, question, **options)
            once = reader(None).ask(page, question, **options | {"region_tokens": (4, 20)})
            seen.add(answer.tokens != once.tokens)
            assert sum(t.logprob for t in answer.logprobs) >= sum(t.logprob for t in once.logprobs) - 1e-5
            assert len(answer.logprobs) == len(answer.tokens)
    assert seen == {True, False}


def test_batches_sessions_streams_and_single_questions_read_alike():
    model, read = reader(rule(longest=3)), set()
    samples = [(page, text) for page in PAGES for text in (QUESTION, "When?")]
    options = {"zoom": "always", "max_new_tokens": [2, 3, 4, 5, 6, 2]}
    batch = model.ask_batch(samples, **options)
    for (page, text), answer, most in zip(samples, batch, options["max_new_tokens"], strict=True):
        alone = model.ask(page, text, zoom="always", max_new_tokens=most)
        assert (alone.text, alone.tokens, boxes(alone)) == (answer.text, answer.tokens, boxes(answer))
        session = model.session(page).ask(text, zoom="always", max_new_tokens=most)
        assert (session.tokens, boxes(session)) == (answer.tokens, boxes(answer))
        pieces = [event.text for event in model.stream(page, text, zoom="always", max_new_tokens=most)]
        assert "".join(pieces) == answer.text
        read.add((most <= 3, len(answer.regions)))
        if most > 3:
            once = reader(None).ask(page, text, zoom="always", max_new_tokens=most, region_tokens=answer_limit(model))
            assert once.tokens == answer.tokens
    assert {(True, 2), (False, 1)} <= read, "a longer first answer counts as it is"
    assert (False, 2) not in read


@pytest.fixture(scope="module")
def alone() -> dict[int, Answer]:
    """Three answers that are read again, each asked alone."""
    model = reader(rule(longest=9))
    found = {i: model.ask(page, QUESTION, zoom="always", max_new_tokens=8) for i, page in enumerate(PAGES)}
    assert all(len(answer.regions) == 2 for answer in found.values())
    return found


def started(batch: ContinuousBatch, key: int) -> list[KeyedEvent]:
    own = request(batch._engine, PAGES[key], QUESTION, zoom="always", sampling=SamplingParams(max_new_tokens=8))
    return list(batch.add({key: own}))


def test_both_readings_are_rows_of_the_running_batch(alone):
    batch = ContinuousBatch(reader(rule(longest=9)).engine)
    found = started(batch, 0)
    assert [event.kind for _, event in found] == ["perception"], "an unsure text is not told"
    assert (batch.keys, batch.tokens(0)) == ((0,), 1)
    for late in (1, 2):
        for _ in range(3):
            found += batch.step()
        found += started(batch, late)
    batch.preempt(0)
    assert batch.keys == (1, 2)
    found += batch.step()
    batch.resume([0])
    longest = 0
    while batch.keys:
        longest = max(longest, *(batch.tokens(key) for key in batch.keys))
        found += batch.step()
    assert longest > 9, "tokens of both readings count"
    answers = {key: event.answer for key, event in found if event.answer is not None}
    for key, answer in answers.items():
        assert (answer.tokens, boxes(answer)) == (alone[key].tokens, boxes(alone[key]))
        assert "".join(event.text for own, event in found if own == key) == answer.text
    assert sorted(answers) == [0, 1, 2]


@pytest.mark.parametrize(("steps", "preempted"), [(3, False), (3, True), (9, False), (9, True)])
def test_a_cancelled_draft_tells_the_first_reading(alone, steps, preempted):
    batch = ContinuousBatch(reader(rule(longest=9)).engine)
    found = started(batch, 0)
    for _ in range(steps):
        found += batch.step()
    assert [event.kind for _, event in found] == ["perception"]
    if preempted:
        batch.preempt(0)
    text, answer = (event for _, event in batch.cancel(0))
    once = reader(None).ask(
        PAGES[0], QUESTION, zoom="always", max_new_tokens=8, region_tokens=answer_limit(reader(rule()))
    )
    complete = steps >= 8
    assert answer.answer.finish_reason == (once.finish_reason if complete else "cancelled")
    assert answer.answer.tokens == once.tokens[: steps + 1]
    assert answer.answer.text == text.text
    assert len(answer.answer.regions) == (2 if complete else 1)
    assert batch.keys == ()
    assert list(batch.step()) == []


def answers_of(batch: ContinuousBatch, requests: dict[int, Request]) -> tuple[dict[int, Answer], dict[int, int]]:
    """Run to the end: answers, and the most tokens that each request has had between two steps."""
    found, most = list(batch.add(requests)), dict.fromkeys(requests, 0)
    while batch.keys:
        most |= {key: batch.tokens(key) for key in batch.keys}
        found += batch.step()
    return {key: event.answer for key, event in found if event.answer is not None}, most


def test_a_second_crop_that_finds_no_room_leaves_the_first_answer():
    engine = reader(rule()).engine
    prompt = run(engine, [request(engine, PAGES[0], QUESTION, zoom="always")])[0].before.state.prompt
    sampling = SamplingParams(max_new_tokens=engine.backbone.max_positions - len(prompt) - 100)
    limits = TokenBudget(4, 2000)  # at least 455 for the second crop
    requests = {
        0: request(engine, PAGES[0], QUESTION, zoom="always", sampling=sampling, region_tokens=limits),
        1: request(engine, PAGES[1], "When?", zoom="always"),
    }
    every = range(engine.backbone.text_config.vocab_size)  # each answer ends at once
    (enough,) = answers_of(
        ContinuousBatch(engine, eos_ids=every),
        {0: request(engine, PAGES[0], QUESTION, zoom="always", region_tokens=limits)},
    )[0].values()
    assert enough.regions[1].tokens > 455
    found, _ = answers_of(ContinuousBatch(engine, eos_ids=every), requests)
    assert [region.reread for region in found[0].regions] == [False]
    assert [region.reread for region in found[1].regions] == [False, True]


@pytest.mark.parametrize("where", ["crops", "joining"])
def test_a_second_reading_without_memory_leaves_the_first_answer_and_the_neighbours(where, monkeypatch):
    engine = reader(rule(longest=9)).engine
    five, twelve = (SamplingParams(max_new_tokens=count) for count in (5, 12))
    own = request(engine, PAGES[0], QUESTION, zoom="always", sampling=five)
    other = request(engine, PAGES[1], "When?", zoom="never", sampling=twelve)
    first = asked(reader(None), region_tokens=answer_limit(reader(rule())))
    neighbour = answers_of(ContinuousBatch(engine), {1: other})[0][1]
    joins: list[int] = []

    def second_join(caches: Any, lengths: Any, extra: int = 0) -> bool:
        joins.extend([len(caches)] if extra else [])
        return joins == [2, 2]

    failed = fail_once(monkeypatch, reread, "zoom") if where == "crops" else fail_once(
        monkeypatch, KVCache, "stack", second_join
    )  # fmt: skip
    found, _ = answers_of(ContinuousBatch(engine), {0: own, 1: other})
    assert failed
    assert found[0].tokens == first.tokens
    assert found[1].tokens == neighbour.tokens
    assert len(found[1].tokens) == 12


def test_other_errors_of_a_second_reading_are_not_taken_for_short_memory(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(reread, "zoom", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        asked(reader(rule(longest=9)))


def test_second_readings_that_fail_together_are_tried_alone_in_the_memory_that_is_free_again(monkeypatch):
    engine = reader(rule(longest=9)).engine
    own = {"zoom": "always", "sampling": SamplingParams(max_new_tokens=5)}
    requests = {i: request(engine, page, QUESTION, **own) for i, page in enumerate(PAGES)}
    wanted, _ = answers_of(ContinuousBatch(engine), requests)
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    real = reread.prefill

    def prefilled(engine: Any, items: Any, *more: Any) -> Any:
        if not held:
            held.extend(weakref.ref(item.state.hidden) for item in items)
            raise RuntimeError(SHORT)
        alive.extend(ref() is not None for ref in held)
        return real(engine, items, *more)

    monkeypatch.setattr(reread, "prefill", prefilled)
    monkeypatch.setattr(reread._log, "disabled", True)  # pytest keeps what is logged, with all that its frames hold
    found, _ = answers_of(ContinuousBatch(engine), requests)
    assert len(held) == 3
    assert alive
    assert not any(alive)
    assert {key: answer.tokens for key, answer in found.items()} == {key: one.tokens for key, one in wanted.items()}
    assert all(answer.regions[-1].reread for answer in found.values())


def test_a_second_reading_that_is_too_long_leaves_the_first():
    model = reader(rule(longest=4))
    text, once = "Where is it?", {"zoom": "always", "max_new_tokens": 3, "region_tokens": answer_limit(model)}
    first = reader(None).ask(PAGES[0], text, **once)
    sampling = SamplingParams(max_new_tokens=20, logprobs=0)
    own = request(model.engine, PAGES[0], text, zoom="always", sampling=sampling)
    found, most = answers_of(ContinuousBatch(model.engine, eos_ids=first.tokens[2:]), {0: own})
    assert most == {0: 6}, "three tokens of either reading, before the second was too long"
    assert found[0].tokens == first.tokens
    assert found[0].finish_reason == "stop"
    assert [region.reread for region in found[0].regions] == [False, True]
    assert [item.token for item in found[0].logprobs] == list(first.tokens[:2])


def test_a_first_reading_that_is_no_number_is_an_error():
    model = reader(rule(longest=9))
    tokens = (
        reader(None).ask(PAGES[0], QUESTION, zoom="always", max_new_tokens=4, region_tokens=answer_limit(model)).tokens
    )
    only = next(token for token in tokens[1:] if token != tokens[0])
    weight = model.engine.backbone.embedding.weight
    before = weight[only].clone()
    weight[only] = torch.nan
    try:
        with pytest.raises(CheckpointError, match="not a number"):
            asked(model, max_new_tokens=8)
    finally:
        weight[only] = before


def test_a_discarded_draft_leaves_nothing():
    batch = ContinuousBatch(reader(rule(longest=9)).engine)
    started(batch, 0)
    batch.abort(0)
    assert (batch.keys, batch._drafts, batch._answering) == ((), {}, {})


def boxes(answer: Answer) -> list[Any]:
    return [(region.box, region.tokens, region.reread) for region in answer.regions]


def answer_limit(model: QZoom) -> TokenBudget:
    """The first crop's part of the region tokens."""
    engine = model.engine
    item = run(engine, [request(engine, PAGES[0], QUESTION, zoom="always")])[0].before
    limit = leave_room(engine, [item])[0].request.options.region_tokens
    assert limit is not None
    return limit


def test_without_a_budget_a_fixed_grid_is_read_once():
    once, answer = (asked(reader(own, "llava"), region_tokens=None) for own in (None, rule("llava")))
    assert (answer.tokens, answer.regions) == (once.tokens, once.regions)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7, "seed": 1}, {"zoom": "never"}, {"json_schema": {"type": "integer"}}]
)
def test_drawn_structured_and_coarse_answers_are_read_once_with_all_tokens(options):
    answer, once = (asked(model, **options) for model in (reader(rule()), reader(None)))
    assert (answer.tokens, answer.regions, answer.usage) == (once.tokens, once.regions, once.usage)


def test_a_fixed_grid_needs_tokens_for_two_crops():
    model = reader(rule("llava"), "llava")
    one = model.engine.backbone.default_budget().max_tokens
    counts = [len(asked(model, region_tokens=(1, most)).regions) for most in (one, 2 * one)]
    assert counts == [1, 2]


def test_a_sparse_region_is_read_again_where_its_tokens_are():
    base = tiny_models.engine("qwen3_vl")
    sparse = dataclasses.replace(base.config.box, sparse=2.0, threshold="relative", scaling="exact")
    model = QZoom(dataclasses.replace(base, config=base.config.replace(reread=rule(), box=sparse)))
    answers = [model.ask(page, QUESTION, zoom="always", max_new_tokens=4, region_tokens=(4, 30)) for page in PAGES]
    assert any(len(answer.regions) == 2 for answer in answers)
    for answer in answers:
        assert answer.usage.region_tokens <= 30


def test_too_few_region_tokens_are_read_once():
    model, once = reader(rule(least_tokens=30)), reader(None)
    assert len(asked(model, region_tokens=(4, 30)).regions) == 2
    answer, other = (asked(own, region_tokens=(4, 29)) for own in (model, once))
    assert (answer.tokens, answer.regions) == (other.tokens, other.regions)


def test_a_sure_answer_is_read_once():
    answer = asked(reader(rule(below=0.0)), region_tokens=(4, 30))
    once = asked(reader(None), region_tokens=(4, 20))
    assert (answer.tokens, answer.regions) == (once.tokens, once.regions)


@pytest.mark.parametrize(("family", "layer", "head"), [("qwen3_vl", 40, 0), ("qwen3_5", 0, 1), ("qwen3_vl", 1, 99)])
def test_a_layer_without_attention_and_a_missing_head_are_refused(family, layer, head, tmp_path):
    model = reader(rule(layer=layer, heads=(head,)), family)
    with pytest.raises(ConfigError, match=rf"head {head} in layer {layer}.*reread"):
        asked(model)
    model.save_pretrained(tmp_path, include_base=True)
    engine = tiny_models.engine(family)
    (one,) = run(engine, [request(engine, PAGES[0], QUESTION)])
    with pytest.raises(ConfigError, match=rf"head {head} in layer {layer}.*reread"):
        QZoom.from_pretrained(tmp_path)
    with pytest.raises(ConfigError):
        token_attention(engine.backbone, one.after.state.prompt, KVCache(), [], [(layer, head)])
