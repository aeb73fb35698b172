import base64
import io
from typing import Any

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_pictures
from qzoom.serving.settings import ServerLimits
from tests.pdfs import locked, of_pictures, pdf
from tests.serving.running import Site, chat, data_url, image_part, page, running, user

QUESTION = "What is the total amount?"
DOCUMENT = of_pictures([page("ONE 1.00"), page(), page("THREE 3.00")], dpi=200)


def url_of(data: bytes) -> str:
    return "data:application/pdf;base64," + base64.b64encode(data).decode()


def file_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": url_of(data), "filename": "a.pdf"} | more}


def ask(site: Site, *parts: Any, **more: Any) -> httpx.Response:
    body = chat(user(*parts, QUESTION), **more)
    return httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120)


def refusal(site: Site, *parts: Any, **more: Any) -> tuple[int, str, str | None]:
    reply = ask(site, *parts, **more)
    error = reply.json()["error"]
    assert "\n" not in error["message"]
    return reply.status_code, error["message"], error["param"]


def test_answers_equal_the_librarys_own(site, model):
    own = model.ask(DOCUMENT, QUESTION, zoom="always", max_new_tokens=8)
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [user(file_part(DOCUMENT), QUESTION)]
        zoom = {"qzoom": {"zoom": "always"}}
        got: Any = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, extra_body=zoom)
    message = got.choices[0].message
    assert message.content == own.text
    (region,), (expected,) = message.qzoom["regions"], own.regions
    assert (region["page"], region["box"], region["box_pt"]) == (
        expected.page,
        list(expected.box),
        list(expected.box_pt or ()),
    )
    assert message.qzoom["image_sizes"] == [[320, 400]] * 3
    assert "text layers are not read" in message.qzoom["notes"][0]


def test_other_ways_to_send_it_and_chosen_pages(site):
    bare = {"type": "file", "file": {"file_data": base64.b64encode(DOCUMENT).decode()}}
    texts = {
        ask(site, part).json()["choices"][0]["message"]["content"]
        for part in (file_part(DOCUMENT), bare, image_part(url_of(DOCUMENT)), image_part(url_of(DOCUMENT)))
    }
    assert len(texts) == 1
    reply = ask(site, image_part(data_url(page(size=(64, 96)))), file_part(DOCUMENT), qzoom={"pages": "3,1"})
    assert reply.json()["choices"][0]["message"]["qzoom"]["image_sizes"] == [[64, 96], [320, 400], [320, 400]]


FIRST, SECOND = "messages[0].content[0].file", "messages[0].content[1].file"
HUGE, LONG = pdf(["x"], size=(14400, 14400)), pdf(["x"] * 33)


@pytest.mark.parametrize(
    ("parts", "more", "sentence", "param"),
    [
        ([file_part(DOCUMENT)], {"qzoom": {"pages": "9"}}, "has 3 pages, so there is no page 9", "qzoom.pages"),
        ([image_part()], {"qzoom": {"pages": "1"}}, "the messages have none; leave it out", "qzoom.pages"),
        ([file_part(locked())], {}, "Cannot read picture 1: it is protected by a password", FIRST),
        ([image_part(), file_part(b"%PDF-1.4 x")], {}, "read picture 2: it is a PDF that is damaged", SECOND),
        ([file_part(LONG)], {}, "more than the limit of 32 would be read; choose some", FIRST),
        ([file_part(HUGE)], {}, "200 x 200 inches", FIRST),
        ([file_part(DOCUMENT)], {"qzoom": {"max_visual_tokens": 200}}, "too little for 3 pages; allow 292", "qzoom"),
        ([{"type": "file", "file": {"file_id": "file-1"}}], {}, "this server keeps no files", f"{FIRST}.file_id"),
        ([file_part(DOCUMENT, file_id="a")], {}, "keeps no files; leave it out and send the file", f"{FIRST}.file_id"),
        ([{"type": "file"}], {}, "it is missing", FIRST),
    ],
)
def test_refusals(site, parts, more, sentence, param):
    status, message, named = refusal(site, *parts, **more)
    assert status == 400
    assert sentence in message
    if param is not None:
        assert named is not None
        assert named.startswith(param)


def test_pages_share_the_servers_pixels(model):
    with running(model, limits=ServerLimits(total_pixels=300_000, picture_pixels=200_000)) as small:
        reply = ask(small, file_part(pdf(["a", "b"], size=(150, 200))), file_part(pdf(["c"], size=(150, 200))))
        sizes = reply.json()["choices"][0]["message"]["qzoom"]["image_sizes"]
        assert sum(w * h for w, h in sizes[:2]) <= 200_000
        assert sum(w * h for w, h in sizes) <= 300_000
        status, message, _ = refusal(small, *[file_part(pdf(["a"] * 4, size=(150, 200)))] * 4)
        assert (status, "dots per inch only" in message) == (400, True)


def test_the_pages_as_pictures(site):
    body = {"model": "tiny", "file": {"file_data": url_of(DOCUMENT)}, "qzoom": {"pages": "2-3"}}
    reply = httpx.post(f"{site.url}/v1/pages", json=body, timeout=60).json()
    drawn = load_pictures(DOCUMENT, ImageLimits(), "2-3")
    assert [(p["page"], p["size"]) for p in reply["pages"]] == [(2, [320, 400]), (3, [320, 400])]
    for record, picture in zip(reply["pages"], drawn, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(record["url"].partition(",")[2])))
        assert image.size == picture.size_px
    assert reply["notes"][0].startswith("2 of 3 pages")
    wrong = httpx.post(f"{site.url}/v1/pages", json=body | {"file": {"file_data": "data:,x"}}, timeout=60)
    assert wrong.status_code == 400
    assert httpx.post(f"{site.url}/v1/pages", json=body | {"model": "other"}, timeout=60).status_code == 404


def test_a_picture_too_long_for_a_jpeg_comes_as_a_png(site):
    strip = Image.new("L", (66_000, 400), 255)
    strip.putpixel((65_999, 399), 7)
    body = {"model": "tiny", "file": {"file_data": data_url(strip)}}
    (record,) = httpx.post(f"{site.url}/v1/pages", json=body, timeout=120).json()["pages"]
    head, _, data = record["url"].partition(",")
    assert (record["size"], head) == ([66_000, 400], "data:image/png;base64")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.getpixel((65_999, 399))) == ((66_000, 400), (7, 7, 7))
