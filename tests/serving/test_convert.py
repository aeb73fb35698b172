import base64
import dataclasses
import io
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from qzoom import QZoom
from qzoom.config import TokenBudget
from qzoom.engine.request import Request
from qzoom.errors import BudgetError, DeadlineError, QuestionError, StoppingError
from qzoom.images.fetch import FetchPolicy
from qzoom.serving.convert import Converter, most_demanding
from qzoom.serving.errors import ApiError
from qzoom.serving.pictures import PictureCache, ReadingTime
from qzoom.serving.protocol import ChatRequest, PerceiveRequest, validate
from qzoom.serving.settings import SchedulerLimits, ServerLimits
from tests.images.asset_server import assets
from tests.pdfs import pdf
from tests.serving.running import chat, data_url, image_part, page, running, user


def file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def made_by(converter: Converter, body: PerceiveRequest, reading: ReadingTime | None = None) -> Request:
    reading = reading or ReadingTime()
    return converter.request(body, converter.prepare(body, reading), "", reading)


@pytest.fixture
def convert(model):
    rejected = []

    def call(*messages, limits=None, strict=False, **more):
        limits = limits or ServerLimits()
        converter = Converter(model, limits, FetchPolicy(), rejected.append, PictureCache(0), strict=strict)
        return made_by(converter, validate(ChatRequest, chat(*messages, **more)))

    call.rejected = rejected
    return call


def test_the_request_equals_the_librarys_own(convert, model):
    made = convert()
    own = model.request(page(), "What is the total amount?", max_new_tokens=8)
    assert (made.ids, made.options) == (own.ids, own.options)
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
        max_tokens=5, max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=4, stop=["a"], seed=3,
        qzoom={"gate_threshold": 0.25, "region_threshold": 0.75},
    ).options  # fmt: skip
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
        return made_by(Converter(bare, ServerLimits(), FetchPolicy(), print, PictureCache(0)), validate(kind, body))

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


def converter_of(model: QZoom, **limits: Any) -> Converter:
    return Converter(model, ServerLimits(**limits), FetchPolicy(), print, PictureCache(2**22))


def body_with(*urls: str) -> ChatRequest:
    return validate(ChatRequest, chat(user(*[image_part(url) for url in urls], "Which?")))


def test_a_request_is_read_in_its_time_and_for_its_client_only(model):
    converter, body = converter_of(model), body_with(data_url())
    for reading, error in ((ReadingTime(time.monotonic()), DeadlineError), (ReadingTime(), StoppingError)):
        if error is StoppingError:
            reading.cancel()
        with pytest.raises(error):
            converter.prepare(body, reading)
        prepared = converter.prepare(body, ReadingTime())
        with pytest.raises(error):
            converter.request(body, prepared, "", reading)
    assert converter.cache.misses == 0


def test_a_picture_that_is_known_waits_for_no_decoder(model):
    converter, body = converter_of(model), body_with(data_url())
    wanted = made_by(converter, body)
    with ExitStack() as busy:
        for _ in range(4):
            busy.enter_context(converter.cache.decoders.hold(ReadingTime()))
        again = made_by(converter, body, ReadingTime(time.monotonic() + 60))
    assert again.pictures[0].image is wanted.pictures[0].image
    assert (converter.cache.hits, converter.cache.misses) == (1, 1)


def test_drawing_a_pdf_ends_with_the_time_of_the_request(model):
    lines = b"".join(b"%d 0 m %d 2000 l S\n0 %d m 2000 %d l S\n" % (i, 2000 - i, i, 2000 - i) for i in range(2000))
    slow = pdf(["a"], size=(2000, 2000), extra=[b"<</Length %d>>stream\n%s\nendstream" % (40 * len(lines), 40 * lines)])
    slow = slow.replace(b"/Contents 11 0 R", b"/Contents 12 0 R")
    body = body_with("data:application/pdf;base64," + base64.b64encode(slow).decode())
    with pytest.raises(DeadlineError, match="send less, or try again later"):
        made_by(converter_of(model, pdf_seconds=3600.0), body, ReadingTime(time.monotonic() + 0.5))


def test_a_fetch_ends_with_the_time_of_the_request(model):
    def say_nothing(connection: socket.socket) -> None:
        server.stopping.wait(60)

    with assets({"/p.png": say_nothing}) as server:
        policy = FetchPolicy((f"localhost:{server.port}",), allow_http=True, allow_private=True, read_timeout_s=60.0)
        converter = Converter(model, ServerLimits(), replace(policy, timeout_s=60.0), print, PictureCache(0))
        with pytest.raises(DeadlineError):
            made_by(converter, body_with(f"http://localhost:{server.port}/p.png"), ReadingTime(time.monotonic() + 0.5))


def test_pictures_with_too_many_pixels_are_refused_before_the_next_is_read(model):
    large = "data:image/png;base64," + base64.b64encode(file(Image.new("L", (400, 300)))).decode()
    bad = "data:image/png;base64,AAAA"  # would be refused with another status
    with pytest.raises(ApiError, match=r"more pixels together than the limit of 0\.2 megapixels") as caught:
        made_by(converter_of(model, total_pixels=200_000), body_with(large, large, bad))
    assert (caught.value.status, caught.value.code) == (413, "too_many_pixels")


def test_what_may_take_long_is_told_by_the_bytes(model):
    def slow(*urls: str) -> bool:
        return converter_of(model).prepare(body_with(*urls), ReadingTime()).slow

    picture, document = base64.b64encode(file(page())).decode(), b"\n  " + pdf(["a"])
    assert not slow(f"data:image/png;name=JVBER;base64,{picture}", data_url())
    assert slow(data_url(), f"data:image/png;name={'x' * 900};base64,{base64.b64encode(document).decode()}")
    assert slow(data_url(), "https://example.com/x.png")
