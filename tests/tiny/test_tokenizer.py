import pytest

from tiny.tokenizer import SPECIAL_TOKENS, build_tokenizer, vocabulary_sentences


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(vocabulary_sentences(), 640)


@pytest.mark.parametrize("text", ["12.50", "03/04/2019", "SHELL (M) SDN. BHD.", "A-17#42", "RM 1,204.00"])
def test_answers_are_one_token_a_character(tokenizer, text):
    assert len(tokenizer(text).input_ids) == len(text)


@pytest.mark.parametrize(
    "text", ["What is the total amount?", "é 漢字 🙂", "line\nbreak\ttab", "  two  spaces ", "MiXeD 1a2B"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_questions_are_short_and_special_tokens_single(tokenizer):
    assert len(tokenizer("What is the total amount?").input_ids) <= 9
    assert len(tokenizer("What is the code on the red circle?").input_ids) <= 12
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert all(tokenizer(token).input_ids == [index] for token, index in zip(SPECIAL_TOKENS, ids, strict=True))
    assert tokenizer.eos_token == "<|im_end|>"


def test_template_has_the_turns_of_qwen3_vl(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "And now?"},
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{picture}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
