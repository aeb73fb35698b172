import pytest

from qzoom.engine.generate import TextStream
from tests import tiny_models


def bytes_of(text: str) -> list[int]:
    """One token per byte."""
    tokenizer = tiny_models.tokenizer()
    table = {tokenizer.decode([i]): i for i in range(300)}
    out: list[int] = []
    for character in text:
        if character in table:
            out.append(table[character])
        else:
            out += tokenizer(character, add_special_tokens=False)["input_ids"]
    return out


def feed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tiny_models.tokenizer(), stop)
    pieces = []
    for token in bytes_of(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, stream
    pieces.append(stream.finish())
    return pieces, stream


@pytest.mark.parametrize("text", ["plain", "Müller €12.50", "日本語の領収書", "👩‍👩‍👧 family", "é" * 20])
def test_no_piece_holds_half_a_character(text):
    pieces, stream = feed(text)
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([p for p in pieces if p]) >= len(text) // 2


def test_broken_characters_are_left_out_or_shown_when_text_goes_on():
    stream = TextStream(tiny_models.tokenizer())
    euro = bytes_of("€")
    assert len(euro) == 3
    assert [stream.push(t) for t in [*bytes_of("a"), *euro[:2]]] == ["a", "", ""]
    assert stream.finish() == ""
    assert stream.text == "a"
    stream = TextStream(tiny_models.tokenizer())
    tokens = [*bytes_of("€")[:1], *bytes_of("x")]
    assert [stream.push(t) for t in tokens] == ["", "\ufffdx"]
    stream = TextStream(tiny_models.tokenizer())
    for _ in range(500):
        stream.push(bytes_of("€")[0])
    assert len(stream._window) <= 2 * TextStream._LONGEST_WINDOW


@pytest.mark.parametrize("stop", ["END", "E", "\n\n", "€", "N D"])
def test_a_stop_text_across_tokens_never_shows(stop):
    pieces, stream = feed(f"one EN two{stop}three", (stop,))
    expected = f"one EN two{stop}three".split(stop)[0].strip()
    assert stream.stopped
    assert "".join(pieces) == stream.text == expected


def test_stop_texts_white_space_and_special_tokens():
    pieces, stream = feed("a EN b EN", ("END",))
    assert not stream.stopped
    assert "".join(pieces) == "a EN b EN"
    assert pieces == ["a", "", "", "", " EN", " b", "", "", "", " EN"]
    pieces, stream = feed("alpha beta gamma", ("gamma", "eta", "beta"))
    assert "".join(pieces) == stream.text == "alpha"
    pieces, stream = feed(" \n one\n two  \n")
    assert "".join(pieces) == stream.text == "one\n two"
    stream = TextStream(tiny_models.tokenizer())
    tokens = [tiny_models.token_id("<|im_start|>"), *bytes_of("ok"), tiny_models.token_id("<|vision_end|>")]
    assert "".join(stream.push(t) for t in tokens) + stream.finish() == "ok"


def test_the_cost_of_a_token_does_not_grow_with_the_answer():
    class Counting:
        decoded = 0

        def __init__(self) -> None:
            self.inner = tiny_models.tokenizer()

        def decode(self, ids: list[int], **options: object) -> str:
            self.decoded += len(ids)
            return str(self.inner.decode(ids, **options))

    text = "Müller 12.50 日本 " * 200
    tokenizer = Counting()
    stream = TextStream(tokenizer, ("END",))
    tokens = bytes_of(text)
    assert "".join([*(stream.push(token) for token in tokens), stream.finish()]) == text.strip()
    assert tokenizer.decoded < 12 * len(tokens)
