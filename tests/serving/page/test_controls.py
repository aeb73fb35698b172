import base64
import io
import json
import shutil
import subprocess

import pytest
from PIL import Image

from qzoom.serving.settings import ServerLimits
from tests.serving.page.browser import (
    DATE,
    EXAMPLES,
    RECEIPT,
    HeldRequests,
    ask,
    body_of,
    call,
    done,
    numbers,
    truth,
    upload,
)
from tests.serving.running import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guarded(model):
    """A server that asks for a key and takes small pictures only."""
    with running(model, api_keys=("open-sesame",), limits=ServerLimits(picture_bytes=60_000)) as site:
        yield site.url


def test_a_threshold_is_tried_out_and_then_asked_with(open_page, url, model):
    page = open_page()
    upload(page)
    ask(page, DATE)
    assert page.locator(".box").count() >= 1
    page.locator("#settings summary").click()
    own = f"the model's own ({model.config.gate_threshold:.2f})"
    assert page.locator("[data-name=gate_threshold] output").inner_text() == own
    with page.expect_response("**/v1/perceive") as reply:
        page.locator("#gate_threshold").fill("1")
    seen = reply.value.json()
    assert seen["gate"]["score"] < 1
    page.get_by_text("it would not zoom").wait_for()
    assert page.locator(".box").count() == 0
    assert page.locator("#dial svg").get_attribute("data-threshold") == "1"
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, DATE)
    assert sent.value.post_data_json["qzoom"] == {"zoom": "auto", "heatmap": True, "gate_threshold": 1}
    message, _ = truth(url, RECEIPT, DATE, gate_threshold=1)
    assert not message["qzoom"]["regions"]
    assert page.locator("#answer").inner_text() == message["content"].strip()
    assert page.locator("#answer-title").inner_text() == "Answer from the coarse view"


def test_region_threshold_moves_the_box_and_reset_brings_it_back(open_page, url):
    page = open_page()
    upload(page)
    ask(page, DATE)
    own = page.locator(".box").first.get_attribute("data-box")
    page.locator("#settings summary").click()
    with page.expect_response("**/v1/perceive") as reply:
        page.locator("#region_threshold").fill("0.1")
    moved = ",".join(map(str, reply.value.json()["regions"][0]["box"]))
    page.locator(f'.box[data-box="{moved}"]').wait_for()
    assert moved != own
    page.locator("[data-name=region_threshold] .reset").click()
    page.locator(f'.box[data-box="{own}"]').wait_for()


def test_budget_and_mode_go_into_the_request(open_page, url):
    page = open_page()
    upload(page)
    page.locator("#settings summary").click()
    page.locator("#max_visual_tokens").fill("128")
    page.locator("input[name=zoom][value=always]").check()
    ask(page, DATE)
    message, usage = truth(url, RECEIPT, DATE, zoom="always", max_visual_tokens=128)
    assert page.locator("#answer").inner_text() == message["content"].strip()
    assert numbers(page.locator("#tokens").inner_text()) == [usage["prompt_tokens_details"]["image_tokens"]]
    assert usage["prompt_tokens_details"]["image_tokens"] <= 128
    assert page.locator("#verdict").inner_text() == "Not asked: it always zooms."


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_copied_command_gives_the_same_answer(open_page, tmp_path):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    picture = tmp_path / "it's $(mine) `x`.jpg"
    picture.write_bytes(RECEIPT.read_bytes())
    upload(page, picture)
    ask(page, 'What is the "date", $HOME \\ `x` @?')
    page.locator("#copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#curl").inner_text()
    run = ["bash", "-c", command.replace("curl ", "curl -s --noproxy '*' ", 1)]
    got = json.loads(subprocess.run(run, cwd=tmp_path, capture_output=True, timeout=300, check=True).stdout)
    assert got["choices"][0]["message"]["content"].strip() == page.locator("#answer").inner_text()


def test_a_refusal_is_shown_as_the_server_says_it(open_page, url, tmp_path):
    page = open_page(expect=["400"])
    picture = tmp_path / "line.jpg"
    Image.new("RGB", (1, 60), "white").save(picture)
    upload(page, picture)
    page.locator("#question").fill(DATE)
    page.locator("#question").press("Enter")
    page.locator("#alert:visible").wait_for()
    status, refusal = call(url, "/v1/chat/completions", body_of(picture, DATE))
    assert status == 400
    assert page.locator("#alert").inner_text() == refusal["error"]["message"]
    assert page.locator("#result").is_hidden()
    upload_again = EXAMPLES / "card.jpg"
    upload(page, upload_again)
    page.locator("#alert").wait_for(state="hidden")
    page.locator("#question").press("Enter")
    assert page.locator("#alert").inner_text() == "Write a question first."


def test_a_file_that_is_no_picture_is_refused_before_it_is_sent(open_page, tmp_path):
    page = open_page()
    (tmp_path / "notes.jpg").write_text("these are notes")
    page.locator("#file").set_input_files(tmp_path / "notes.jpg")
    page.locator("#alert:visible").wait_for()
    assert page.locator("#alert").inner_text().startswith("This browser cannot show notes.jpg.")
    assert page.locator("#welcome").is_visible()


def test_what_is_said_of_a_file_stays_when_the_server_answers_late(open_page, tmp_path):
    page = open_page()
    held = HeldRequests(page, "**/v1/models")
    page.reload()
    (tmp_path / "notes.jpg").write_text("these are notes")
    page.locator("#file").set_input_files(tmp_path / "notes.jpg")
    page.locator("#alert:visible").wait_for()
    with page.expect_response("**/v1/models"):
        held.next().continue_()
    page.locator("#model:has-text('tiny')").wait_for()
    assert page.locator("#alert").inner_text().startswith("This browser cannot show notes.jpg.")


def test_escape_stops_a_question_and_a_lost_server_is_named(open_page):
    page = open_page(expect=["ERR_FAILED"])
    upload(page)
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    page.locator("#question").fill(DATE)
    with page.expect_request("**/v1/chat/completions"):
        page.locator("#question").press("Enter")
    assert page.locator("#go").inner_text() == "Stop"
    with page.expect_event("requestfailed"):
        page.keyboard.press("Escape")
    assert page.locator("#go").inner_text() == "Ask"
    assert page.locator("#result").is_hidden()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#question").press("Enter")
    page.locator("#alert:visible").wait_for()
    assert page.locator("#alert").inner_text() == "The server does not answer. Is it still running?"


TELL = """() => {
  window.story = [];
  const shows = {
    cells: () => document.querySelector("#photo[data-coarse]"),
    map: () => document.querySelector("#photo[data-heat]"),
    box: () => document.querySelector(".box"),
  };
  const look = () => {
    for (const [name, shown] of Object.entries(shows)) if (!story.includes(name) && shown()) story.push(name);
  };
  new MutationObserver(look).observe(document.body, { attributes: true, childList: true, subtree: true });
}"""
"""Writes down what appears on the page, in order."""


def test_the_story_is_told_slowly_the_first_time(open_page):
    page = open_page(reduced_motion="no-preference")
    upload(page)
    page.evaluate(TELL)
    page.locator("#question").fill(DATE)
    page.locator("#question").press("Enter")
    page.locator("#photo[data-heat]:not([data-coarse])").wait_for()
    done(page)
    assert page.evaluate("story") == ["cells", "map", "box"]
    page.locator("#link[data-shown]").wait_for()


def test_a_late_refusal_leaves_the_focus_and_gives_way_to_a_newer_key(open_page, guarded):
    page = open_page(guarded, expect=["401"], http_credentials={"username": "any", "password": "open-sesame"})
    upload(page)
    page.locator("#settings summary").click()
    held = HeldRequests(page, "**/v1/models")

    def write(key):
        page.locator("#key").fill(key)
        page.locator("#question").focus()
        return held.next()

    refused = write("wrong")
    with page.expect_response("**/v1/models"):
        refused.continue_()
    page.locator("#alert:visible").wait_for()
    assert page.locator("#question:focus").count() == 1
    old, new = write("wrong too"), write("open-sesame")
    with page.expect_response("**/v1/models"):
        new.continue_()
    page.locator("#alert").wait_for(state="hidden")
    with page.expect_response("**/v1/models") as late:
        old.continue_()
    assert late.value.status == 401
    late.value.finished()
    assert page.locator("#model").inner_text() == "tiny"
    assert page.locator("#alert").is_hidden()


def test_key_and_byte_limit(open_page, guarded):
    page = open_page(guarded, expect=["401"], http_credentials={"username": "any", "password": "open-sesame"})
    upload(page)
    assert page.locator("#sent-note").inner_text().startswith("Sent smaller, as a JPEG of")
    page.locator("#settings summary").click()
    page.locator("#key").fill("wrong")
    page.locator("#question").fill(DATE)
    page.locator("#question").press("Enter")
    page.locator("#key:focus").wait_for()
    _, refusal = call(guarded, "/v1/chat/completions", {}, key="wrong")
    assert page.locator("#alert").inner_text() == refusal["error"]["message"]
    page.locator("#key").fill("open-sesame")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, DATE)
    assert sent.value.headers["authorization"] == "Bearer open-sesame"
    address = sent.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    data = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    assert len(data) <= 60_000
    width, height = Image.open(io.BytesIO(data)).size
    assert (900 * height) / (1900 * width) == pytest.approx(1, abs=0.01)
    box = page.locator(".box").first
    photo, shown = page.locator("#photo").bounding_box(), box.bounding_box()
    right = float(box.get_attribute("data-box").split(",")[2])
    assert shown["x"] + shown["width"] - photo["x"] == pytest.approx(right * photo["width"] / width, abs=1)
    command = page.locator("#curl").text_content()
    assert '-H "Authorization: Bearer $QZOOM_API_KEY"' in command
    assert "open-sesame" not in command
    assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
    assert page.context.cookies() == []
