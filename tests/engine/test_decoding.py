import pytest
import torch

from qzoom.engine.batch import events
from qzoom.engine.sampling import Sampler
from qzoom.errors import ConfigError
from qzoom.model import QZoom
from qzoom.types import Answer, SamplingParams
from tests import tiny_models

PAGE = tiny_models.picture(91, 220, 160)
QUESTION = "What is the total?"


def direct(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities after temperature, then top-k, then the smallest nucleus that reaches top_p, in float64."""
    values = (logits.double() / temperature).tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if top_k:
        order = order[:top_k]
    weights = torch.tensor([values[i] for i in order], dtype=torch.float64).softmax(0)
    keep = int((weights.cumsum(0) - weights < top_p).sum())
    out = torch.zeros(len(values), dtype=torch.float64)
    out[order[:keep]] = weights[:keep] / weights[:keep].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (0.8, 6, 0.6), (1.0, 1, 1.0), (3.0, 0, 1e-6)],
)
def test_draws_follow_the_direct_computation(temperature, top_k, top_p):
    torch.manual_seed(5)
    logits = torch.randn(12) * 2
    expected = direct(logits, temperature, top_k, top_p)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=1))
    draws = torch.tensor([sampler.draw(logits) for _ in range(3000)])
    shares = torch.bincount(draws, minlength=12).double() / 3000
    assert set(draws.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    # four standard errors of a share measured 3000 times
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 3000).sqrt() + 1e-9).all()


def test_seeds_repeat_as_torchs_own_generator_draws():
    torch.manual_seed(6)
    steps = torch.randn(40, 30)
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=9, top_p=0.9, seed=77))
    generator = torch.Generator().manual_seed(77)
    expected = [int(torch.multinomial(direct(s, 0.7, 9, 0.9).float(), 1, generator=generator)) for s in steps]
    assert [sampler.draw(s) for s in steps] == expected
    sampler = Sampler(SamplingParams())
    assert sampler.draw(torch.tensor([0.1, 3.0, 2.9])) == 1


def test_a_seed_repeats_and_no_seed_does_not():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    options = {"zoom": "never", "temperature": 1.5, "max_new_tokens": 12}
    first = model.ask(PAGE, QUESTION, seed=4, **options)
    assert model.ask(PAGE, QUESTION, seed=4, **options).tokens == first.tokens
    assert model.session(PAGE).ask(QUESTION, seed=4, **options).tokens == first.tokens
    free = {model.ask(PAGE, QUESTION, **options).tokens for _ in range(4)}
    assert len(free | {first.tokens}) == 5


def test_low_temperature_and_top_k_of_one_are_greedy():
    model = QZoom(tiny_models.engine("qwen2_5_vl"))
    greedy = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=10)
    for options in ({"temperature": 1.0, "top_k": 1}, {"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
        answer = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=10, seed=1, **options)
        assert answer.tokens == greedy.tokens


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_stop_texts_end_the_answer_and_are_not_part_of_it(family):
    model = QZoom(tiny_models.engine(family))
    free = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=16)
    assert free.finish_reason == "length"
    tried = 0
    for start in range(1, len(free.text) - 3):
        stop = free.text[start : start + 3]
        if "\ufffd" in stop or not stop.strip():
            continue
        tried += 1
        pieces: list[str] = []
        answer = model.ask(
            PAGE, QUESTION, zoom="never", max_new_tokens=16, stop=["\x01none", stop], on_text=pieces.append
        )
        assert answer.text == free.text[: free.text.index(stop)].strip()
        assert "".join(pieces) == answer.text
        assert answer.finish_reason == "stop"
        assert answer.tokens == free.tokens[: len(answer.tokens)]
        decoded = [
            model.engine.backbone.tokenizer.decode(answer.tokens[:n], skip_special_tokens=True)
            for n in (len(answer.tokens) - 1, len(answer.tokens))
        ]
        assert stop not in decoded[0]  # no token more than was needed
        assert stop in decoded[1]
    assert tried > 3


def test_max_new_tokens_is_exact():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    whole = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=200)
    assert len(whole.tokens) == 200  # past the room that a batch reserves at first
    for n in (1, 2, 64, 65, 150):
        answer = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=n)
        assert (answer.tokens, answer.finish_reason) == (whole.tokens[:n], "length")


def test_ignore_eos_goes_on_to_the_last_token():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    plain = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=9)
    end = plain.tokens[4]

    def last(ignore_eos: bool) -> Answer:
        asked = model.request(PAGE, QUESTION, zoom="never", max_new_tokens=9, ignore_eos=ignore_eos)
        *_, (_, event) = events(model.engine, [asked], eos_ids=[end])
        assert event.answer is not None
        return event.answer

    assert last(False).tokens == plain.tokens[: plain.tokens.index(end) + 1]
    assert last(False).finish_reason == "stop"
    assert last(True).tokens == plain.tokens
    assert last(True).text == plain.text
    assert last(True).finish_reason == "length"


@pytest.mark.parametrize("zoom", ["never", "always"])
def test_streamed_pieces_join_to_the_text(zoom):
    model = QZoom(tiny_models.engine("qwen2_5_vl"))
    for seed in range(5):
        options = {"zoom": zoom, "max_new_tokens": 20, "temperature": 1.0, "seed": seed, "region_threshold": 0.3}
        events = list(model.stream(PAGE, QUESTION, **options))
        answer = events[-1].answer
        assert [e.kind for e in events] == ["perception"] + ["text"] * (len(events) - 2) + ["answer"]
        assert "".join(e.text for e in events) == answer.text
        assert all(e.text for e in events[1:-1])
        assert len(events) > 6
        assert events[0].perception.gate.zoomed == answer.gate.zoomed == (zoom == "always")
        assert answer.tokens == model.ask(PAGE, QUESTION, **options).tokens


def test_cancel_is_asked_between_steps():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    whole = model.ask(PAGE, QUESTION, max_new_tokens=20)
    for limit in (1, 2, 7):
        asked: list[int] = []
        pieces: list[str] = []

        def cancel(asked: list[int] = asked, limit: int = limit) -> bool:
            asked.append(1)
            return len(asked) == limit

        answer = model.ask(PAGE, QUESTION, max_new_tokens=20, cancel=cancel, on_text=pieces.append)
        assert (answer.finish_reason, answer.tokens) == ("cancelled", whole.tokens[:limit])
        assert "".join(pieces) == answer.text
        assert len(asked) == limit


def test_a_stream_that_is_dropped_does_no_harm():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    whole = model.ask(PAGE, QUESTION, max_new_tokens=8)
    stream = model.stream(PAGE, QUESTION, max_new_tokens=8)
    assert next(stream).kind == "perception"
    stream.close()
    assert model.ask(PAGE, QUESTION, max_new_tokens=8).tokens == whole.tokens


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.2}, "top_p"),
        ({"top_k": -1}, "top_k"), ({"stop": ""}, "stop"), ({"stop": ["a", ""]}, "stop"),
    ],
)  # fmt: skip
def test_impossible_sampling_is_one_sentence(options, word):
    model = QZoom(tiny_models.engine("qwen3_vl"))
    with pytest.raises(ConfigError, match=word):
        model.ask(PAGE, QUESTION, **options)


def test_timings_name_their_steps():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    timing = model.ask(PAGE, QUESTION, gate_threshold=0.0, region_threshold=0.3, max_new_tokens=3).timing_ms
    assert list(timing) == [
        "vision", "shared_layers", "gate", "region", "region_vision", "region_layers", "upper_layers", "decode",
        "total",
    ]  # fmt: skip
    parts = sum(ms for name, ms in timing.items() if name != "total")
    assert all(ms > 0 for ms in timing.values())
    assert parts <= timing["total"]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 2.0}, {"max_new_tokens": True}, {"max_new_tokens": "5"},
        {"top_k": -1}, {"top_k": 1.5}, {"top_k": False}, {"seed": 1.0}, {"seed": True}, {"seed": 2**64},
        {"seed": -(2**63) - 1}, {"temperature": float("nan")}, {"temperature": "1"}, {"temperature": -0.1},
        {"top_p": 0}, {"top_p": True}, {"top_p": None}, {"stop": ("a", 5)}, {"stop": ("",)}, {"stop": 5},
        {"stop": None}, {"zoom": "sometimes"}, {"gate_threshold": 1.5},
        {"gate_threshold": "0.5"}, {"gate_threshold": True}, {"region_threshold": -0.1},
        {"region_threshold": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_wrong_type_or_range_are_one_sentence(bad):
    model = QZoom(tiny_models.engine("qwen3_vl"))
    (name,) = bad
    with pytest.raises(ConfigError, match=name) as caught:
        model.make_options(**bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_widest_seeds_draw(seed):
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
    assert 0 <= sampler.draw(torch.zeros(7)) < 7


@pytest.mark.parametrize("temperature", [1e-300, 1e-44, 9e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
    assert sampler.draw(torch.tensor([1.0, 30.0, 2.0])) == 1


@pytest.mark.parametrize("configured", [None, 7, [7, 9]])
def test_the_tokenizers_end_token_ends_answers_too(configured):
    made = tiny_models.build_tiny_backbone("qwen3_vl")
    made.model.generation_config.eos_token_id = configured
    own = tiny_models.token_id("<|im_end|>")
    assert made.eos_ids == {"None": (own,), "7": (7, own), "[7, 9]": (7, 9, own)}[str(configured)]
