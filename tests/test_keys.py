import pytest

from qzoom.errors import ConfigError
from qzoom.keys import check_key, read_key, read_keys


@pytest.mark.parametrize(
    ("text", "keys"), [("one", ("one",)), ("a b", ("a", "b")), (" a,b ,, c\n", ("a", "b", "c")), ("sk=/x", ("sk=/x",))]
)
def test_keys_are_separated_by_commas_and_blanks(monkeypatch, text, keys):
    monkeypatch.setenv("QZOOM_SOME_KEY", text)
    assert read_keys("QZOOM_SOME_KEY") == keys


@pytest.mark.parametrize("text", ["", " ", ",", " ,\t"])
def test_a_variable_without_a_key_is_refused(monkeypatch, text):
    monkeypatch.setenv("QZOOM_SOME_KEY", text)
    with pytest.raises(ConfigError, match="QZOOM_SOME_KEY is set but empty"):
        read_keys("QZOOM_SOME_KEY")
    monkeypatch.delenv("QZOOM_SOME_KEY")
    assert read_keys("QZOOM_SOME_KEY") == ()


@pytest.mark.parametrize("key", ["sk-\N{HORIZONTAL ELLIPSIS}", "two words", "line\n", "\x7f"])
def test_a_key_that_no_header_carries_is_refused(monkeypatch, key):
    monkeypatch.setenv("QZOOM_SOME_KEY", key)
    with pytest.raises(ConfigError, match=r"key in QZOOM_SOME_KEY.*use printable ASCII without spaces"):
        read_key("QZOOM_SOME_KEY")
    monkeypatch.setenv("QZOOM_SOME_KEY", "good")
    assert read_key("QZOOM_SOME_KEY") == "good"
    monkeypatch.delenv("QZOOM_SOME_KEY")
    assert read_key("QZOOM_SOME_KEY") == ""


@pytest.mark.parametrize(
    ("key", "fault"), [("", "is empty"), ("sk-…", "has characters"), ("a b", "has"), ("a\n", "has")]
)
def test_a_key_is_what_a_header_can_carry(key, fault):
    check_key("sk-1", "the key")
    with pytest.raises(ConfigError, match=f"^the key {fault}"):
        check_key(key, "the key")
