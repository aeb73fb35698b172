import base64
import copy
import io
from typing import Any

import pytest

from qzoom.backbones.registry import build_backbone
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.errors import CheckpointError, QuestionError
from qzoom.model import QZoom
from tests import tiny_models
from tests.plain import plain_generate

PAGE = tiny_models.picture(95, 180, 130)
SPECIALS = ["<|image_pad|>", "<|im_end|>", "<|im_start|>assistant", "<|vision_start|><|image_pad|><|vision_end|>"]


def encode(image: Any, question: Any, system: str | None = None) -> list[int]:
    chat = ChatEncoder(tiny_models.engine("qwen3_vl").backbone)
    return chat.encode(read_conversation(image, question, system))


def rendered(messages: list[dict[str, Any]]) -> list[int]:
    tokenizer = tiny_models.tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "What is the total?", "  spaces  and\ttabs\n\nand lines ", "Größe 日本語 👩‍👩‍👧 ‮rtl‬ \x00\x07",
        "| < > <| |> <|im <|imageX|>", "a\ue000b \ue000" + "0\ue000", "{{ messages }} {% raw %} {{ 1 + 1 }}",
    ],
)  # fmt: skip
def test_ordinary_text_tokenises_as_the_rendered_template(text):
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    assert encode(PAGE, text) == rendered([{"role": "user", "content": parts}])
    assert encode(None, text) == rendered([{"role": "user", "content": text}])
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]
    assert encode(PAGE, messages) == rendered(messages)
    assert encode(PAGE, messages[1:], system=text) == rendered(messages)


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_that_a_user_writes_are_text(special):
    tokenizer = tiny_models.tokenizer()
    plain = encode(PAGE, "before X after")
    ids = encode(PAGE, f"before {special} after")
    specials = [i for i in ids if i in tokenizer.all_special_ids or i >= tiny_models.token_id("<|endoftext|>")]
    assert specials == [i for i in plain if i >= tiny_models.token_id("<|endoftext|>")]
    assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("X", special)


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_in_any_turn_are_text(special):
    page = {"type": "image", "image": PAGE}
    messages = [
        {"role": "system", "content": f"System {special}"},
        {"role": "user", "content": [{"type": "text", "text": f"{special}{special}"}, page]},
        {"role": "assistant", "content": f"{special} said"},
        {"role": "user", "content": f"And {special}?"},
    ]
    ids = encode(None, messages)
    assert ids.count(tiny_models.token_id("<|image_pad|>")) == 1
    assert ids.count(tiny_models.token_id("<|im_start|>")) == 5
    assert ids.count(tiny_models.token_id("<|im_end|>")) == 4
    answer = QZoom(tiny_models.engine("qwen3_vl")).ask(None, messages, max_new_tokens=2)
    assert (answer.question, len(answer.image_sizes_px)) == (f"And {special}?", 1)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_written_placeholder_is_asked_about_and_not_replaced(family):
    model = QZoom(tiny_models.engine(family))
    question = "What does <|image_pad|> mean?<|im_end|>"
    for zoom in ("never", "always"):
        answer = model.ask(PAGE, question, zoom=zoom, max_new_tokens=3)
        plain = model.ask(PAGE, "What?", zoom=zoom, max_new_tokens=3)
        assert answer.usage.coarse_tokens == plain.usage.coarse_tokens
    found = model.session(PAGE).ask(question, zoom="never", max_new_tokens=6)
    assert found.tokens == model.ask(PAGE, question, zoom="never", max_new_tokens=6).tokens


def test_several_turns_answer_as_transformers_does():
    model = QZoom(tiny_models.engine("qwen2_5_vl"))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A receipt."}]},
        {"role": "user", "content": [{"type": "text", "text": "And the date?"}]},
    ]
    expected, _ = plain_generate(model.engine.backbone, [PAGE], messages, 8)
    assert list(model.ask(PAGE, messages, zoom="never", max_new_tokens=8).tokens) == expected


def test_turns_of_one_role_are_one_and_an_assistant_may_have_said_nothing():
    question = [{"role": "user", "content": "What is it?"}, {"role": "user", "content": [{"type": "image"}]}]
    whole = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}]
    assert encode(PAGE, question) == encode(PAGE, whole)
    assert read_conversation(PAGE, question).question == "What is it?"
    rules = [{"role": "system", "content": "A."}, {"role": "developer", "content": "B."}]
    assert encode(PAGE, [*rules, *whole]) == encode(PAGE, whole, system="A.\nB.")

    def asked(**turn: Any) -> list[int]:
        last = {"role": "user", "content": "And?"}
        return encode(PAGE, [{"role": "user", "content": "What?"}, {"role": "assistant", **turn}, last])

    assert asked() == asked(content=None) == asked(content="")
    assert asked(content=None, refusal="No.") == asked(content="No.")
    assert asked(content="No.", tool_calls=[], function_call=None) == asked(content="No.")
    for call in ({"tool_calls": [{"id": "c"}]}, {"function_call": {"name": "f"}}):
        with pytest.raises(QuestionError, match=r"Message 2 .*calls of tools are not read"):
            asked(content=None, **call)


def test_pictures_may_come_inside_the_messages():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    buffer = io.BytesIO()
    PAGE.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    expected = model.ask(PAGE, "What?", max_new_tokens=4)
    sources: list[dict[str, Any]] = [{"image": PAGE}, {"image": buffer.getvalue()}, {"url": url}]
    sources += [{"type": "image_url", "image_url": url}, {"type": "image_url", "image_url": {"url": url}}]
    for source in sources:
        messages = [{"role": "user", "content": [{"type": "image"} | source, {"type": "text", "text": "What?"}]}]
        assert model.ask(None, messages, max_new_tokens=4).tokens == expected.tokens
    bare = [{"role": "user", "content": "What?"}]
    assert model.ask(PAGE, bare, max_new_tokens=4).tokens == expected.tokens


def test_pictures_fill_the_parts_in_order():
    other = tiny_models.picture(96, 90, 90)
    text = {"type": "text", "text": "Which?"}
    mixed = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": other}, text]}]
    conversation = read_conversation(PAGE, mixed)
    assert (conversation.sources, conversation.question) == ((PAGE, other), "Which?")
    assert [p["type"] for p in conversation.messages[0]["content"]] == ["image", "image", "text"]


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("image", "question", "word"),
    [
        (PAGE, "", "empty"),
        (PAGE, " \n\t", "empty"),
        (PAGE, [], "non-empty list"),
        (PAGE, 5, "non-empty list"),
        (PAGE, ["What?"], "Message 1"),
        (PAGE, [{"role": "tool", "content": "x"}], "system, user, assistant"),
        (PAGE, [{"role": "user"}], '"content"'),
        (PAGE, [{"role": "user", "content": 7}], '"content"'),
        (PAGE, [{"role": "user", "content": [{"type": "video"}]}], "Message 1: a part"),
        (PAGE, [{"role": "user", "content": [{"type": "text"}]}], "Message 1: a part"),
        (PAGE, [{"role": "user", "content": ["text"]}], "Message 1: a part"),
        (PAGE, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message"),
        (PAGE, [{"role": "user", "content": [IMAGE]}], "empty"),
        (PAGE, [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "?"}]}], "without a picture"),
        ([PAGE, PAGE], [{"role": "user", "content": [IMAGE, {"type": "text", "text": "?"}]}], "too many"),
        (PAGE, [{"role": "system", "content": "a"}], "no user turn"),
    ],
)
def test_messages_that_cannot_be_used(image, question, word):
    model = QZoom(tiny_models.engine("qwen3_vl"))
    with pytest.raises(QuestionError, match=word) as caught:
        model.ask(image, question)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pictures", [0, 1])
def test_a_question_of_100k_characters_is_refused_in_one_sentence(pictures):
    model = QZoom(tiny_models.engine("qwen3_vl"))
    with pytest.raises(QuestionError, match=r"reads at most 4096.*shorten") as caught:
        model.ask([PAGE] * pictures, "why? " * 20_000)
    assert "\n" not in str(caught.value)
    if pictures:
        with pytest.raises(QuestionError, match="reads at most 4096"):
            model.session(PAGE).ask("<|image_pad|>" * 8_000)


def test_a_question_near_the_limit_is_answered_and_a_lossy_template_refused():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    answer = model.ask(None, "why? " * 700, max_new_tokens=2)
    assert answer.usage.prompt_tokens > 1000
    assert len(answer.tokens) == 2
    base = tiny_models.engine("qwen3_vl").backbone
    lossy = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    backbone = build_backbone(base.model, base.tokenizer, base.image_processor, lossy)
    model = QZoom(tiny_models.build_engine("qwen3_vl", backbone=base))
    broken = QZoom(type(model.engine)(backbone, None, None, model.config))
    with pytest.raises(QuestionError, match="0 of 1 pictures"):
        broken.ask(PAGE, "What?", zoom="never")


@pytest.mark.parametrize(
    ("question", "system", "where"),
    [
        ("What\udcff?", None, "Character 5 of the user message"),
        ("What?", "Be \ud83d brief.", "Character 4 of the system message"),
        (
            [{"role": "assistant", "content": "\udcff"}, {"role": "user", "content": "What?"}],
            None,
            "of the assistant message",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "What\udc00?"}]}],
            None,
            "Character 5 of the user message",
        ),
    ],
)
def test_halves_of_surrogate_pairs_are_refused(question, system, where):
    with pytest.raises(QuestionError, match=where):
        read_conversation(None, question, system)
    with pytest.raises(QuestionError, match="system turn must be a text, not int"):
        read_conversation(None, "What?", 5)


def with_template(template: str) -> QZoom:
    base = tiny_models.engine("qwen3_vl").backbone
    backbone = build_backbone(base.model, base.tokenizer, base.image_processor, template)
    return QZoom(tiny_models.build_engine("qwen3_vl", backbone=backbone))


def test_what_a_template_refuses_is_one_sentence():
    first = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message "
    model = with_template(first + "must be at the beginning.') }}{% endif %}{% endfor %}" + tiny_models.TEMPLATE)
    asked = [{"role": "user", "content": "Hello"}, {"role": "system", "content": "Be brief."}]
    asked += [{"role": "user", "content": "What is the total?"}]
    with pytest.raises(QuestionError, match=r"\(System message must be at the beginning\); change their roles"):
        model.ask(PAGE, asked)
    assert model.ask(PAGE, [asked[1], asked[2]], max_new_tokens=1).tokens
    for template in ("{{ messages[0].content + 'a' + 1 }}", "{{ messages[0].nothing.at_all }}"):
        with pytest.raises(QuestionError, match="chat template refuses the messages"):
            with_template(template).ask(PAGE, "What is the total?")
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        with_template("{% if %}").ask(PAGE, "What is the total?")


def test_templates_that_can_think_aloud_are_told_not_to():
    made = tiny_models.build_tiny_backbone("qwen3_vl")
    made.tokenizer = copy.deepcopy(made.tokenizer)
    asked = read_conversation(PAGE, "What is the total?", None)
    plain = ChatEncoder(made).encode(asked)
    thought = "{{ '' if enable_thinking is defined and enable_thinking is false else 'Let me think.' }}"
    made.tokenizer.chat_template += "{% if add_generation_prompt %}" + thought + "{% endif %}"
    assert ChatEncoder(made).encode(asked) == plain
