import io
import json
import sys

import pytest

from qzoom.cli.console import Console, one_line, printable


def test_control_characters_and_lines():
    assert printable("a\x1b[31mb\x07\r\u202ec\x9bd\n\te") == "a[31mbcd\n\te"
    assert printable("naïve 价格 👩\u200d👧") == "naïve 价格 👩\u200d👧"
    assert one_line("  two\nlines\t here ") == "two lines here"


def test_quiet_silences_notes_only_and_records_are_one_ascii_line(capsys):
    Console(quiet=True).note("hidden")
    Console().note("shown")
    Console(quiet=True).result("answer")
    assert capsys.readouterr() == ("answer\n", "shown\n")
    Console().record({"text": "line\nfeed é"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.isascii()
    assert json.loads(out) == {"text": "line\nfeed é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        Console().record({"score": float("nan")})


def test_text_that_the_stream_cannot_encode_becomes_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console().result("5 €")
    assert raw.getvalue() == b"5 \\u20ac\n"
