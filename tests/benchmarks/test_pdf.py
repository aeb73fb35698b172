import re

import pytest

from benchmarks.pdf import ARMS, PAGES, bind, compose, fuzzed, open_log, plan, read_fuzzed, report, summarise
from qzoom import QZoom
from qzoom.checkpoints.weights import weights_digest
from qzoom.errors import ConfigError
from qzoom.images.load import load_pictures
from tests.tiny_models import engine


def test_a_question_is_about_one_page_of_documents_of_all_sizes():
    samples, at, chosen = compose(3, 3)
    question = samples[at].questions[chosen].question
    assert [any(q.question == question for q in sample.questions) for sample in samples] == [i == at for i in range(3)]
    again, other, _ = compose(3, 3)
    assert (other, [s.seed for s in again]) == (at, [s.seed for s in samples])
    pages = load_pictures(bind(samples))
    assert [p.page.number for p in pages] == [1, 2, 3]
    sizes = [pages for _, pages in plan(200)]
    assert {pages: sizes.count(pages) for pages in PAGES} == {1: 60, 5: 100, 20: 40}


@pytest.mark.parametrize("number", range(5))
def test_a_broken_file_is_read_or_refused_in_a_sentence(number):
    assert fuzzed(number) == fuzzed(number)
    outcome = read_fuzzed(number)
    assert outcome.get("read") or re.fullmatch(r"Cannot read [^\n]+\.", outcome["refused"])


def test_the_page_of_results():
    row = {"box_hit": True, "right": False, "coarse_tokens": 320, "drawing_s": 0.2, "answering_s": 1.0}
    rows = [row | {"arm": arm, "pages": 5, "page_hit": i < 3} for arm in ARMS for i in range(4)]
    table = summarise(rows)
    assert [(line["arm"], line["page_hit"], line["chance"]) for line in table] == [
        ("shared", 0.75, 0.2),
        ("whole", 0.75, 0.2),
    ]
    record = {"model": "tiny", "weights": "0123abcd", "dtype": "float32", "machine": {"cpu": "x"}, "rows": table}
    record["memory"] = {"5": {"a": 1, "b": 2, "c": 3, "d": 4}}
    text = report(record | {"fuzzed": {"files": 30, "read": 4, "refused": 26, "slowest_s": 0.5}})
    assert "| 5 | shared | 4 | 0.75 |" in text
    assert "Model `tiny` (weights `0123abcd`, float32). Made by `python -m benchmarks.pdf`; cpu x." in text
    assert "Of 30 files fuzzed from good ones 4 were read and 26 refused" in text


def test_answers_of_other_weights_or_other_documents_are_not_resumed(tmp_path):
    first, other = (QZoom(engine("qwen3_vl", seed=seed), "model") for seed in (0, 1))
    with open_log(tmp_path, first, 200) as log:
        log.append("document-0", [{"arm": "shared"}])
        assert log.settings["model"]["weights"] == weights_digest(first.engine)
    with open_log(tmp_path, first, 200) as log:
        assert dict(log) == {"document-0": [{"arm": "shared"}]}
    with pytest.raises(ConfigError, match=r"model\.weights was .* name another folder with --output"):
        open_log(tmp_path, other, 200)
    with pytest.raises(ConfigError, match="documents was 200, is 60"):
        open_log(tmp_path, first, 60)
