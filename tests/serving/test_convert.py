"""From a checked request to the engine's."""

import pytest

from qzoom.config import TokenBudget
from qzoom.errors import BudgetError
from qzoom.images.fetch import FetchPolicy
from qzoom.serving.convert import Converter, PictureCache, most_demanding
from qzoom.serving.errors import ApiError
from qzoom.serving.limits import ServerLimits
from qzoom.serving.protocol import ChatRequest, validate
from tests.serving.running import chat, data_url, image_part, page, user


@pytest.fixture
def convert(model):
    rejected = []

    def call(*messages, limits=None, **more):
        converter = Converter(model, limits or ServerLimits(), FetchPolicy(), rejected.append, PictureCache(0))
        return converter.request(validate(ChatRequest, chat(*messages, **more)))

    call.rejected = rejected
    return call


def test_the_request_equals_the_librarys_own(convert, model):
    made = convert()
    own = model.request(page(), "What is the total amount?", max_new_tokens=8)
    assert made.ids == own.ids
    assert made.options == own.options
    assert [p.image.tobytes() for p in made.pictures] == [p.image.tobytes() for p in own.pictures]


def test_turns_pictures_and_system_keep_their_order(convert, model):
    first, second = page("A", (64, 96)), page("B", (96, 64))
    made = convert(
        {"role": "developer", "content": "Be brief."},
        user(image_part(data_url(first)), "One?"),
        {"role": "assistant", "content": "Yes."},
        user("Two?", image_part(data_url(second))),
    )
    own = model.request(
        None,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "One?"}]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "text", "text": "Two?"}, {"type": "image", "image": second}]},
        ],
    )
    assert made.ids == own.ids
    assert [p.size_px for p in made.pictures] == [(64, 96), (96, 64)]


@pytest.mark.parametrize(
    ("details", "winner"),
    [
        ([], "auto"),
        ([None], "auto"),
        (["low"], "low"),
        (["low", None], "auto"),
        (["low", "high", "auto"], "high"),
        (["original", "high"], "original"),
    ],
)
def test_the_most_demanding_detail_wins(details, winner):
    assert most_demanding(details) == winner


@pytest.mark.parametrize(
    ("detail", "zoom", "region"),
    [
        ("low", "never", None),
        ("auto", "auto", None),
        ("high", "always", None),
        ("original", "always", TokenBudget(64, 1024)),  # 1024 cells of 32 px is what the image processor allows
    ],
)
def test_detail_says_how_to_zoom(convert, detail, zoom, region):
    options = convert(user(image_part(detail=detail), "What?")).options
    assert (options.zoom, options.region_tokens, options.coarse_tokens) == (zoom, region, None)


def test_zoom_in_the_controls_overrules_detail(convert):
    options = convert(user(image_part(detail="original"), "What?"), qzoom={"zoom": "never"}).options
    assert (options.zoom, options.region_tokens) == ("never", None)


def test_sampling_and_thresholds_arrive(convert):
    options = convert(
        max_tokens=5,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stop=["a"],
        seed=3,
        qzoom={"gate_threshold": 0.25, "region_threshold": 0.75},
    ).options
    sampling = options.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 4)
    assert (sampling.stop, sampling.seed) == (("a",), 3)
    assert (options.gate_threshold, options.region_threshold) == (0.25, 0.75)


def test_a_total_is_shared_between_the_looks(convert):
    options = convert(qzoom={"max_visual_tokens": 100}).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(50, 50), TokenBudget(50, 50))
    options = convert(qzoom={"max_visual_tokens": 100, "zoom": "never"}).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(64, 100), None)


def test_a_total_is_shared_between_the_pictures(convert):
    two = user(image_part(), image_part(), "What?")
    assert convert(two, qzoom={"max_visual_tokens": 100}).options.coarse_tokens == TokenBudget(25, 25)
    with pytest.raises(BudgetError, match="2 pictures; allow 4"):
        convert(two, qzoom={"max_visual_tokens": 2})


def test_the_servers_ceiling_holds_for_the_checkpoints_own_budgets(convert):
    options = convert(limits=ServerLimits(visual_tokens=100)).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(50, 50), TokenBudget(50, 50))
    options = convert(user(image_part(detail="original"), "What?"), limits=ServerLimits(visual_tokens=400)).options
    assert (options.coarse_tokens, options.region_tokens) == (None, TokenBudget(64, 256))


@pytest.mark.parametrize(
    ("more", "param"),
    [({"max_tokens": 65}, "max_tokens"), ({"qzoom": {"max_visual_tokens": 401}}, "qzoom.max_visual_tokens")],
)
def test_asking_for_more_than_the_ceiling_is_refused(convert, more, param):
    with pytest.raises(ApiError) as caught:
        convert(limits=ServerLimits(max_new_tokens=64, visual_tokens=400), **more)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("/etc/hostname", 400, "invalid_image"),
        ("file:///etc/hostname", 400, "invalid_image"),
        ("", 400, "invalid_image"),
        ("data:image/png;base64,!!!!", 400, "invalid_image"),
        ("data:image/png;base64,AAAA", 400, "invalid_image"),
        ("http://127.0.0.1:9/x.png", 422, "unprocessable_media"),
        ("https://example.com/x.png", 422, "unprocessable_media"),
    ],
)
def test_pictures_that_cannot_be_used_name_their_place(convert, url, status, code):
    parts = [image_part(), {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(ApiError) as caught:
        convert(user(*parts, "What?"))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.param == "messages[0].content[1].image_url"
    assert convert.rejected == [code]
