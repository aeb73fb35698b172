import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qzoom import ImageLimits
from qzoom.config import TokenBudget
from qzoom.errors import BudgetError, ConfigError, ImageError, QZoomError
from qzoom.model import QZoom
from tests import tiny_models

PAGE = tiny_models.picture(41, 240, 170)
QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def model():
    return QZoom(tiny_models.engine("qwen3_vl"), "random")


def test_facts_and_pieces_of_text(model):
    assert model.name == "random"
    assert model.has_gate
    assert model.has_region
    assert model.config is model.engine.config
    pieces: list[str] = []
    answer = model.ask(PAGE, QUESTION, on_text=pieces.append, max_new_tokens=12)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


def test_an_answer_is_plain_json_and_knows_its_pictures(model):
    answer = model.ask([PAGE, PAGE], QUESTION, zoom="always", region_threshold=0.3, max_new_tokens=3)
    record = json.loads(json.dumps(answer.to_dict(heat_map=True)))
    assert record["text"] == answer.text
    assert record["tokens"] == list(answer.tokens)
    assert record["gate"]["zoomed"] is True
    assert record["regions"][0]["box"] == list(answer.regions[0].box)
    assert record["usage"]["region_tokens"] == answer.usage.region_tokens
    assert (record["image_sizes_px"], len(record["heat_maps"])) == ([[240, 170], [240, 170]], 2)
    assert answer.question == QUESTION
    assert [image.size for image in answer.images] == [PAGE.size] * 2
    assert answer.cell_px == 32
    crop = answer.regions[0].crop_size_px
    assert crop is not None
    assert crop[0] * crop[1] == answer.regions[0].tokens * 32 * 32


def test_batch_options_are_for_all_or_one_each(model):
    samples = [(PAGE, QUESTION), (PAGE, "When?"), (None, "Who?")]
    answers = model.ask_batch(samples, max_new_tokens=[1, 2, 3], zoom="never", stop=["\x01a", "\x01b", "\x01c"])
    assert [len(a.tokens) for a in answers] == [1, 2, 3]
    assert [a.question for a in answers] == [QUESTION, "When?", "Who?"]


def test_a_list_is_one_value_per_sample_and_a_tuple_one_budget(model):
    samples = [(PAGE, QUESTION), (PAGE, QUESTION)]
    few, many = model.ask_batch(samples, max_new_tokens=1, zoom="never", coarse_tokens=[6, 30])
    assert few.usage.coarse_tokens <= 6 < many.usage.coarse_tokens
    one, two = model.ask_batch(samples, max_new_tokens=1, zoom="never", coarse_tokens=(20, 30))
    assert 20 <= one.usage.coarse_tokens == two.usage.coarse_tokens <= 30
    with pytest.raises(ConfigError, match=r"list of 2 values for 1 samples.* as a tuple"):
        model.ask_batch(samples[:1], coarse_tokens=[6, 30])
    with pytest.raises(BudgetError, match=r"not \[6, 30\]"):
        model.ask(PAGE, QUESTION, coarse_tokens=[6, 30])


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"coarse_token": 9}, "did you mean 'coarse_tokens'"),
        ({"xyz": 9}, "known options: max_new_tokens"),
    ],
)
def test_unknown_options_are_refused_with_a_hint(model, options, hint):
    session = model.session(PAGE)
    for call in (model.ask, model.perceive, model.stream):
        with pytest.raises(ConfigError, match=hint):
            call(PAGE, QUESTION, **options)
    for call in (session.ask, session.perceive, session.stream):
        with pytest.raises(ConfigError, match=hint):
            call(QUESTION, **options)


def test_a_bare_maximum_keeps_the_processors_minimum(model):
    assert model.make_options(coarse_tokens=20).coarse_tokens == TokenBudget(4, 20)
    assert model.make_options(region_tokens=2).region_tokens == TokenBudget(2, 2)
    assert model.make_options().coarse_tokens is None


@pytest.mark.parametrize("bad", [b"", b"no picture", "/does/not/exist.png", 3.5])
def test_a_picture_that_cannot_be_used_names_itself(model, bad):
    for call in (lambda: model.ask(bad, QUESTION), lambda: model.session(bad)):
        with pytest.raises(ImageError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, QZoomError)


def test_importing_the_package_loads_nothing_heavy():
    code = "import qzoom, sys; print({'torch', 'transformers', 'numpy', 'PIL', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_answers_compare_and_hash(model):
    first, second = (model.ask("examples/receipt.jpg", "What is the date?", max_new_tokens=4) for _ in range(2))
    assert first == second
    assert first in [second]
    assert hash(first) == hash(second)
    assert model.perceive("examples/receipt.jpg", "What is the date?") == model.perceive(
        "examples/receipt.jpg", "What is the date?"
    )
    assert first != model.ask("examples/receipt.jpg", "What is the total amount?", max_new_tokens=4)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (None, "ask_batch needs a list of .image, question. pairs, not NoneType"),
        ("page.png", "ask_batch needs a list of .image, question. pairs, not str"),
        (["examples/receipt.jpg", "What is it?"], "Sample 1: expected an .image, question. pair"),
        ([("examples/receipt.jpg",)], "Sample 1: expected an .image, question. pair"),
        ([("examples/receipt.jpg", "A?"), ("missing.png", "B?")], "Sample 2: Cannot read 'missing.png'"),
    ],
)
def test_a_bad_sample_of_a_batch_is_named(model, samples, sentence):
    with pytest.raises(QZoomError, match=sentence):
        model.ask_batch(samples)


def test_options_as_programs_have_them(model):
    schema = {"type": "object"}
    options = model.make_options(max_new_tokens=np.int64(5), seed=np.uint8(3), top_k=np.int32(2), json_schema=schema)
    sampling = options.sampling
    assert (sampling.max_new_tokens, sampling.seed, sampling.top_k) == (5, 3, 2)
    assert sampling.json_schema == '{"type": "object"}'
    with pytest.raises(ConfigError, match="max_new_tokens must be a whole number"):
        model.make_options(max_new_tokens=np.float32(5))


def test_what_concerns_all_samples_names_none(model):
    samples = [("examples/receipt.jpg", "What is it?")] * 2
    with pytest.raises(ConfigError, match=r"^zoom is a list of 1 values for 2 samples"):
        model.ask_batch(samples, zoom=["auto"])
    with pytest.raises(ConfigError, match=r"^Sample 2: zoom must be one of auto, never, always, not 'x'"):
        model.ask_batch(samples, zoom=["auto", "x"])
    for memory in (True, 0, 1.5, "1"):
        with pytest.raises(ConfigError, match=r"^memory_mib must be a whole number of at least 1"):
            model.ask_batch(samples, memory_mib=memory)


def test_what_names_no_model_or_option_is_refused():
    with pytest.raises(ConfigError, match="config must be a ZoomConfig, not a dict"):
        QZoom.from_pretrained("tiny", config={"gate_threshold": 0.2})
    for name in (None, 3):
        with pytest.raises(ConfigError, match=f"a folder or a hub id, not {name}"):
            QZoom.from_pretrained(name)
    with pytest.raises(ConfigError, match="no option 'dtyp'; did you mean 'dtype'"):
        QZoom.from_pretrained("tiny", dtyp="float32")


def test_limits_of_pictures_are_given_when_a_model_is_loaded():
    model = QZoom.from_pretrained("tiny", image_limits=ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match=r"11 x 10 px are more than .*image_limits=ImageLimits\(max_pixels=\.\.\.\)"):
        model.ask(Image.new("RGB", (11, 10)), "What is the total?")
