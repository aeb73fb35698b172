"""Head lists: how they are written, and the authors' tables by a backbone's sizes."""

from __future__ import annotations

import pytest

from qzoom.errors import ConfigError
from qzoom.labels.find_heads import HeadSet, parse_heads, published_heads


def test_head_lists_are_read():
    assert parse_heads("22:1,4 23:6") == ((22, 1), (22, 4), (23, 6))
    assert parse_heads("1:2 1:2") == ((1, 2),)


@pytest.mark.parametrize("text", ["", "22", "22:", "a:1", "22:1;4", "22:-1"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="LAYER:HEAD"):
        parse_heads(text)


def test_the_tables_follow_the_sizes():
    assert published_heads("qwen2_5_vl", 3584, 28, "text") == HeadSet(((22, 1), (22, 4), (23, 6), (23, 11)))
    four = published_heads("qwen3_vl", 2560, 36, "natural")
    assert four == HeadSet(((20, 15), (20, 21), (20, 23), (21, 8), (21, 10), (21, 11)), ((20, 1), (20, 24)))
    assert published_heads("qwen3_vl", 64, 7, "text") is None
