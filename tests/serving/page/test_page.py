import base64
import re

import pytest

from tests.pdfs import of_pictures
from tests.serving.page.browser import DATE, EXAMPLES, RECEIPT, HeldRequests, ask, done, numbers, truth, upload

pytestmark = pytest.mark.slow

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_ask_about_an_uploaded_picture(open_page, url):
    page = open_page()
    upload(page)
    ask(page, DATE)
    message, usage = truth(url, RECEIPT, DATE)
    zoom, tokens = message["qzoom"], usage["prompt_tokens_details"]
    assert zoom["gate"]["zoomed"], "the example is meant to zoom"

    assert page.locator("#answer").inner_text() == message["content"].strip()
    assert page.locator("#model").inner_text() == "tiny"
    dial = page.locator("#dial svg")
    assert float(dial.get_attribute("data-score")) == pytest.approx(zoom["gate"]["score"], abs=1e-4)
    assert float(dial.get_attribute("data-threshold")) == zoom["gate"]["threshold"]
    assert numbers(page.locator("#tokens").inner_text()) == [tokens["image_tokens"]]
    coarse, region = page.locator("#steps span").nth(0), page.locator("#steps span").nth(2)
    assert numbers(coarse.inner_text()) == [tokens["coarse_tokens"]]
    assert numbers(region.inner_text()) == [tokens["region_tokens"]]
    assert " ms" in page.locator("#time").inner_text() or " s" in page.locator("#time").inner_text()

    [box] = [r["box"] for r in zoom["regions"]]
    assert page.locator(".box").first.get_attribute("data-box") == ",".join(map(str, box))
    photo, shown = page.locator("#photo").bounding_box(), page.locator(".box").first.bounding_box()
    scale = photo["width"] / zoom["image_sizes"][0][0]
    assert shown["x"] - photo["x"] == pytest.approx(box[0] * scale, abs=1)
    assert shown["y"] - photo["y"] == pytest.approx(box[1] * scale, abs=1)
    assert shown["width"] == pytest.approx((box[2] - box[0]) * scale, abs=1)
    assert shown["height"] == pytest.approx((box[3] - box[1]) * scale, abs=1)
    crop = page.locator("#crops canvas").evaluate("(c) => [c.width, c.height]")
    assert crop == [box[2] - box[0], box[3] - box[1]]


def test_the_heat_map_is_hottest_where_the_json_says(open_page, url):
    page = open_page()
    upload(page)
    ask(page, DATE)
    rows = truth(url, RECEIPT, DATE)[0]["qzoom"]["heatmap"][0]
    peak = max((value, y, x) for y, row in enumerate(rows) for x, value in enumerate(row))
    drawn = page.locator("#heat").evaluate(
        """(canvas) => {
          const { width, height } = canvas;
          const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
          let best = 0;
          for (let i = 0; i < data.length; i += 4) if (data[i + 3] > data[best + 3]) best = i;
          return { width, height, x: (best / 4) % width, y: Math.floor(best / 4 / width), alpha: data[best + 3] };
        }"""
    )
    cell = drawn["width"] / len(rows[0])
    assert drawn["height"] / len(rows) == cell
    assert abs(drawn["x"] / cell - (peak[2] + 0.5)) <= 1
    assert abs(drawn["y"] / cell - (peak[1] + 0.5)) <= 1
    assert drawn["alpha"] > 120
    opacity = "(e) => Number(getComputedStyle(e).opacity)"
    assert page.locator("#heat").evaluate(opacity) == 1
    page.locator("#show-heat").click()
    assert page.locator("#heat").evaluate(opacity) == 0
    page.locator("#show-coarse").click()
    assert page.locator("#coarse").evaluate(opacity) == 1
    size = page.locator("#coarse").evaluate("(c) => [c.width, c.height]")
    assert size == [32 * len(rows[0]), 32 * len(rows)]


def test_asking_again_shows_cached_tokens_and_keeps_both_answers(open_page, url):
    page = open_page()
    upload(page)
    ask(page, DATE)
    first = page.locator("#answer").inner_text()
    question = "What <img src=x onerror=alert(1)> is the company name?"
    ask(page, question)
    cached, prompt = numbers(page.locator("#cached").inner_text())
    assert 100 < cached < prompt
    entries = page.locator("#asked li")
    assert entries.count() == 2
    assert question in entries.nth(0).inner_text()
    assert entries.nth(0).locator("img").count() == 0
    assert f"{cached} of {prompt} tokens cached" in entries.nth(0).inner_text()
    entries.nth(1).locator("button").click()
    done(page)
    assert page.locator("#answer").inner_text() == first
    assert page.locator("#question").input_value() == DATE


def test_comparison_shows_what_each_way_answers(open_page, url):
    page = open_page()
    upload(page)
    ask(page, DATE)
    page.locator("#compare").click()
    page.locator(".column[aria-busy=false]").nth(2).wait_for()
    for mode in ("never", "auto", "always"):
        message, usage = truth(url, RECEIPT, DATE, zoom=mode)
        column = page.locator(f".column[data-mode={mode}]")
        assert column.locator(".text").inner_text() == message["content"].strip()
        tokens = column.locator("[data-fact=tokens]").inner_text()
        assert numbers(tokens) == [usage["prompt_tokens_details"]["image_tokens"]]
        assert column.locator("[data-fact=zoomed]").inner_text() == ("yes" if message["qzoom"]["regions"] else "no")
        assert re.fullmatch(r"[\d,]+ ms|[\d.]+ s", column.locator("[data-fact=time]").inner_text())


PUT = """([kind, data, name]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
  const init = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
  const event = kind === "paste" ? new ClipboardEvent(kind, init) : new DragEvent(kind, init);
  document.querySelector("h1").dispatchEvent(event);
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(open_page, kind):
    page = open_page()
    page.evaluate(PUT, [kind, base64.b64encode(RECEIPT.read_bytes()).decode(), "from elsewhere.jpg"])
    page.locator("#question").wait_for()
    assert page.locator("#caption").inner_text() == "from elsewhere.jpg · 900 × 1,900 px"
    assert page.evaluate("document.activeElement.id") == "question"


def test_examples_bring_their_question(open_page, url):
    page = open_page()
    names = sorted(path.name for path in EXAMPLES.iterdir())
    assert page.locator("#examples button").count() == len(names) == 4
    assert all((EXAMPLES / name).stat().st_size < 200_000 for name in names)
    page.locator("#examples button").nth(2).click()
    done(page)
    question = page.locator("#question").input_value()
    assert question == "What is the code on the green star?"
    answer = truth(url, EXAMPLES / "shapes.jpg", question)[0]["content"].strip()
    assert page.locator("#answer").inner_text() == answer


def test_everything_by_keyboard(open_page):
    page = open_page()
    # Playwright begins to intercept the chooser only when somebody listens, and does not wait until the browser does:
    # an Enter right after that now and then meets the browser's own chooser, and the event never comes.
    page.on("filechooser", lambda chooser: None)
    page.locator("#examples button").nth(3).wait_for()
    keys = page.keyboard
    for _ in range(4):
        keys.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    ring = page.locator("label.file").first.evaluate("(e) => getComputedStyle(e).outlineStyle")
    assert ring == "solid"
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files(RECEIPT)
    page.locator("#question").wait_for()
    keys.type(DATE)
    keys.press("Enter")
    done(page)
    assert DATE in page.locator("#asked").inner_text()
    assert page.locator("#answer").inner_text() in page.locator("#live").inner_text()
    order = []
    for _ in range(30):
        keys.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid" or page.evaluate("document.activeElement.type") == "radio", order[-1]
        if order[-1] == "compare":
            break
    wanted = ["go", DATE, "Thresholds, budget, key", "compare"]
    assert [name for name in order if name in wanted] == wanted
    keys.press("Enter")
    page.locator(".column[aria-busy=false]").nth(2).wait_for()


def test_phone_has_one_column_and_large_targets(open_page):
    page = open_page(**PHONE)

    def check():
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for target in page.locator("button:visible, summary:visible, label.button:visible, .modes span:visible").all():
            size = target.bounding_box()
            assert size["height"] >= 44, target.inner_text()

    check()
    assert page.get_by_text("Take a photo").is_visible()
    assert page.locator("#camera").get_attribute("capture") == "environment"
    page.locator("#examples button").first.tap()
    done(page)
    page.locator("#settings summary").tap()
    check()
    photo, form = page.locator("#photo").bounding_box(), page.locator("#ask").bounding_box()
    assert form["y"] > photo["y"] + photo["height"]
    page.locator("#compare").tap()
    page.locator(".column[aria-busy=false]").nth(2).wait_for()
    check()


def light(page, selector, name):
    """WCAG relative luminance of a computed colour."""
    text = page.locator(selector).first.evaluate(f"(e) => getComputedStyle(e).{name}")
    red, green, blue = (int(word) / 255 for word in re.findall(r"\d+", text)[:3])

    def linear(value):
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_are_readable(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ground = light(page, "html", "backgroundColor")
    assert ground < 0.05 if scheme == "dark" else ground > 0.85
    for selector, least in (("h1", 7), (".lead", 4.5), ("#examples span", 4.5), ("footer p", 4.5)):
        ink = light(page, selector, "color")
        high, low = max(ink, ground), min(ink, ground)
        assert (high + 0.05) / (low + 0.05) >= least, selector
    white, button = light(page, "label.primary", "color"), light(page, "label.primary", "backgroundColor")
    assert (white + 0.05) / (button + 0.05) >= 4.5
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    assert page.evaluate(moving) == 0


def test_a_file_chosen_before_the_server_said_its_model_waits_for_it(open_page, tmp_path):
    from PIL import Image

    (tmp_path / "pages.pdf").write_bytes(of_pictures([Image.open(RECEIPT)] * 2, dpi=200))
    page = open_page()
    held = HeldRequests(page, "**/v1/models")
    page.reload()
    greeting = held.next()
    page.locator("#file").set_input_files(tmp_path / "pages.pdf")
    assert page.locator("#strip button").count() == 0
    greeting.continue_()
    page.locator("#strip button").nth(1).wait_for()


def test_a_pdf_shows_its_pages_and_turns_to_the_one_that_was_read(open_page, url, tmp_path):
    from PIL import Image

    receipt = Image.open(RECEIPT)
    empty = Image.new("RGB", receipt.size, "white")
    (tmp_path / "pages.pdf").write_bytes(of_pictures([empty, receipt, empty], dpi=200))
    page = open_page()
    page.locator("#file").set_input_files(tmp_path / "pages.pdf")
    page.locator("#strip button").nth(2).wait_for()
    current = page.locator("#strip button[aria-current=true]")
    assert current.get_attribute("aria-label") == "Page 1"
    assert page.locator("#caption").inner_text().startswith("pages.pdf, page 1")
    assert "text layers are not read" in page.locator("#sent-note").inner_text()
    page.locator("input[value=always]").check(force=True)
    ask(page, DATE)
    read = page.locator("#strip li[data-read] button").get_attribute("aria-label")
    assert current.get_attribute("aria-label") == read == "Page 2"
    boxes = page.locator(".box").count()  # a second one where it was read again
    assert boxes in (1, 2)
    assert page.locator("#crops figcaption", has_text="Read again").count() == boxes - 1
    page.locator("#strip button").nth(0).click()
    assert page.locator(".box").count() == 0
    page.locator("#strip button").nth(1).click()
    assert page.locator(".box").count() == boxes
    assert '"type": "file"' in page.locator("#curl").text_content()
