import base64
import dataclasses
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from qzoom import QZoom
from qzoom.config import TokenBudget
from qzoom.engine.prefix_cache import prefix_key
from qzoom.errors import BudgetError, ImageError, QuestionError
from qzoom.images.fetch import FetchPolicy
from qzoom.images.limits import ImageLimits
from qzoom.serving.convert import Converter, PictureCache, most_demanding
from qzoom.serving.errors import ApiError
from qzoom.serving.protocol import ChatRequest, PerceiveRequest, validate
from qzoom.serving.settings import SchedulerLimits, ServerLimits
from tests.serving.running import chat, data_url, image_part, page, running, user

LIMITS = ImageLimits()


def file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def convert(model):
    rejected = []

    def call(*messages, limits=None, strict=False, **more):
        limits = limits or ServerLimits()
        converter = Converter(model, limits, FetchPolicy(), rejected.append, PictureCache(0), strict=strict)
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
        ([], "auto"), ([None], "auto"), (["low"], "low"), (["low", None], "auto"), (["low", "high", "auto"], "high"),
        (["original", "high"], "original"),
    ],
)  # fmt: skip
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


def test_a_total_and_the_servers_ceiling_are_shared(convert):
    options = convert(qzoom={"max_visual_tokens": 100}).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(50, 50), TokenBudget(50, 50))
    options = convert(qzoom={"max_visual_tokens": 100, "zoom": "never"}).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(64, 100), None)
    two = user(image_part(), image_part(), "What?")
    assert convert(two, qzoom={"max_visual_tokens": 100}).options.coarse_tokens == TokenBudget(25, 25)
    with pytest.raises(BudgetError, match="2 pictures; allow 4"):
        convert(two, qzoom={"max_visual_tokens": 2})
    options = convert(limits=ServerLimits(visual_tokens=100)).options
    assert (options.coarse_tokens, options.region_tokens) == (TokenBudget(50, 50), TokenBudget(50, 50))
    options = convert(user(image_part(detail="original"), "What?"), limits=ServerLimits(visual_tokens=400)).options
    assert (options.coarse_tokens, options.region_tokens) == (None, TokenBudget(64, 256))
    with pytest.raises(ApiError, match="2 pictures need more visual tokens") as caught:
        convert(user(image_part(), image_part(), "What?"), limits=ServerLimits(visual_tokens=2))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 65}, "max_completion_tokens"),
        ({"qzoom": {"max_visual_tokens": 401}}, "qzoom.max_visual_tokens"),
    ],
)
def test_asking_for_more_than_the_ceiling_is_refused(convert, more, param):
    with pytest.raises(ApiError) as caught:
        convert(limits=ServerLimits(max_new_tokens=64, visual_tokens=400), strict=True, **more)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).startswith(f"{param} is above")


def test_turns_of_one_role_belong_together(convert):
    split = [{"role": "user", "content": "What is the date?"}, user(image_part())]
    whole = convert(user("What is the date?", image_part()))
    assert convert(*split).ids == whole.ids
    assert convert(*split).conversation.question == "What is the date?"
    assert (
        convert({"role": "user", "content": "One."}, {"role": "user", "content": "Two?"}).ids
        == convert({"role": "user", "content": "One.\nTwo?"}).ids
    )
    with pytest.raises(QuestionError, match="question is empty"):
        convert(user(image_part()), user(image_part()))


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "7"}]}, "7"),
        ({"content": "7", "reasoning_content": "hm", "provider_specific_fields": {"qzoom": {}}}, "7"),
    ],
)
def test_what_an_assistant_said_is_its_text(convert, turn, text):
    first, last = user(image_part(), "One?"), user("Two?")
    expected = convert(first, {"role": "assistant", "content": text}, last)
    assert convert(first, {"role": "assistant"} | turn, last).ids == expected.ids


@pytest.mark.parametrize("role", ["developer", "system", "assistant"])
def test_a_refusal_names_the_role_that_was_sent(convert, role):
    with pytest.raises(QuestionError, match=f"not one of role '{role}'"):
        convert(user("What?"), {"role": role, "content": "x"})


@pytest.fixture
def plain(model):
    bare = QZoom(dataclasses.replace(model.engine, region=None, gate=None))

    def call(*messages, kind=ChatRequest, **more):
        body = chat(*messages) | more
        if kind is PerceiveRequest:
            del body["max_tokens"]
        return Converter(bare, ServerLimits(), FetchPolicy(), print, PictureCache(0)).request(validate(kind, body))

    return call


@pytest.mark.parametrize("detail", ["low", "auto", "high", "original"])
def test_a_model_that_cannot_zoom_reads_every_detail_and_says_so(plain, detail):
    made = plain(user(image_part(detail=detail), "What?"))
    assert made.options.zoom == "never"
    notes = made.pictures[0].notes
    assert bool(notes) == (detail in ("high", "original"))
    assert not notes or f'detail "{detail}"' in notes[0]


def test_a_model_that_cannot_zoom_refuses_what_needs_it(plain):
    with pytest.raises(ApiError, match="no region branch") as caught:
        plain(qzoom={"zoom": "always"})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "cannot_zoom", "qzoom.zoom")
    with pytest.raises(ApiError, match=r"no region branch, .*/v1/chat/completions") as caught:
        plain(kind=PerceiveRequest)
    assert (caught.value.status, caught.value.code) == (400, "cannot_zoom")
    assert plain(qzoom={"zoom": "auto"}).options.zoom == "never"


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("/etc/hostname", 400, "invalid_image"),
        ("file:///etc/hostname", 400, "invalid_image"),
        ("", 400, "invalid_image"),
        ("data:image/png;base64,!!!!", 400, "invalid_image"),
        ("data:image/png;base64,AAAA", 400, "invalid_image"),
        ("data:image/png;base64," + base64.b64encode(file(page())[:-128]).decode(), 400, "invalid_image"),
        ("http://127.0.0.1:9/x.png", 422, "unprocessable_media"),
        ("https://example.com/x.png", 422, "unprocessable_media"),
    ],
)
def test_pictures_that_cannot_be_used_name_their_place(convert, url, status, code):
    parts = [image_part(), {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(ApiError) as caught:
        convert(user(*parts, "What?"))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "picture 2" in str(caught.value).lower()
    assert "picture bytes" not in str(caught.value)
    assert caught.value.param == "messages[0].content[1].image_url"
    assert convert.rejected == [code]


def test_the_same_bytes_of_the_same_tenant_are_decoded_once():
    cache = PictureCache(2**22)
    data = file(page())
    (first,) = cache.load(data, LIMITS, "ann")
    assert first.image.tobytes() == page().tobytes()
    assert first.digest == hashlib.sha256(page().tobytes()).digest()
    assert cache.load(bytes(data), LIMITS, "ann")[0] is first
    assert cache.load(data, LIMITS, "bob")[0] is not first
    assert cache.load(file(page("OTHER")), LIMITS, "ann")[0].image.tobytes() == page("OTHER").tobytes()
    assert (cache.hits, cache.misses, cache.entries) == (1, 3, 3)
    cache = PictureCache(2**22)
    data = file(page())
    cache.load(data, LIMITS, "ann")
    with pytest.raises(ImageError):
        cache.load(b"ann\0" + data, LIMITS, "")
    assert cache.load(data, LIMITS, "")[0].image.size == (320, 400)
    assert cache.hits == 0


def test_the_bound_is_kept_and_zero_keeps_nothing():
    one = 320 * 400 * 4
    cache = PictureCache(2 * one + 1)
    files = [file(page(str(i))) for i in range(3)]
    for i in (0, 1, 0, 2):
        cache.load(files[i], LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)
    assert [cache.load(data, LIMITS, "")[0].size_px for data in (files[0], files[2])] == [(320, 400)] * 2
    assert cache.hits == 3
    cache.load(files[1], LIMITS, "")
    assert (cache.hits, cache.misses) == (3, 4)
    cache.load(file(page(size=(700, 400))), LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)
    cache = PictureCache(0)
    data = file(page())
    (first,) = cache.load(data, LIMITS, "")
    assert cache.load(data, LIMITS, "")[0] is not first
    assert (first.digest, cache.entries, cache.nbytes) == (b"", 0, 0)


def test_damaged_pictures_and_pdfs_hold_nobody_up():
    cache = PictureCache(0, decoders=1)
    with cache._drawers, ThreadPoolExecutor(1) as pool:
        (picture,) = pool.submit(cache.load, file(page()), LIMITS, "").result(60)
    assert picture.size_px == (320, 400)
    cache = PictureCache(2**20)
    data = file(page())[:400]
    for _ in range(2):
        with pytest.raises(ImageError, match="damaged or cut off"):
            cache.load(data, LIMITS, "")
    assert cache.entries == 0


def test_a_known_digest_decides_the_same_prefix(model):
    kept = PictureCache(2**20).load(file(page()), LIMITS, "")
    keys = [prefix_key(model.engine, model.request(picture, "When?"), "ann") for picture in (page(), kept)]
    assert keys[0] == keys[1]
    assert keys[0] != prefix_key(model.engine, model.request(page("OTHER"), "When?"), "ann")


def test_a_second_question_finds_its_picture_and_answers_as_the_library_does(model):
    with running(model, scheduler=SchedulerLimits(cache_bytes=2**24)) as site:
        service = site.service
        prefixes = service.engine.scheduler.cache
        assert service.pictures.max_bytes + prefixes.max_bytes + prefixes.regions.max_bytes == 2**24
        for question in ("What is the date?", "What is the total amount?"):
            body = chat(user(image_part(), question), qzoom={"zoom": "always"})
            reply = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120)
            wanted = model.ask(page(), question, zoom="always", max_new_tokens=8)
            message = reply.json()["choices"][0]["message"]
            assert message["content"] == wanted.text
            assert [region["box"] for region in message["qzoom"]["regions"]] == [list(r.box) for r in wanted.regions]
        assert (service.pictures.hits, service.pictures.misses) == (1, 1)
        shown = httpx.get(f"{site.url}/metrics").text
        assert "qzoom:picture_cache_hits_total 1.0" in shown
        assert f"qzoom:picture_cache_bytes {320.0 * 400 * 4}" in shown


@pytest.mark.parametrize(
    ("limits", "status"), [({"total_pixels": 320 * 400 + 1}, 413), ({"total_picture_bytes": 4000}, 413)]
)
def test_a_kept_picture_does_not_evade_the_limits(model, limits, status):
    data = base64.b64decode(data_url().split(",")[1])
    assert len(data) < 4000 < 3 * len(data)
    with running(model, limits=ServerLimits(**limits)) as site:
        address = f"{site.url}/v1/chat/completions"
        assert httpx.post(address, json=chat(), timeout=120).status_code == 200
        assert site.service.pictures.entries == 1
        again = chat(user(*[image_part()] * 3, "Which?"))
        assert httpx.post(address, json=again, timeout=120).status_code == status
        assert site.service.pictures.hits == 0


def test_two_keys_share_no_picture(model):
    with running(model, api_keys=("ann", "bob")) as site:
        for key in ("ann", "bob", "ann"):
            headers = {"Authorization": f"Bearer {key}"}
            reply = httpx.post(f"{site.url}/v1/chat/completions", json=chat(), headers=headers, timeout=120)
            assert reply.status_code == 200
        assert (site.service.pictures.hits, site.service.pictures.entries) == (1, 2)
