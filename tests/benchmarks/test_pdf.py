import re

import pytest

from benchmarks.pdf import ARMS, PAGES, bind, compose, fuzzed, plan, read_fuzzed, report, summarise
from qzoom.images.load import load_pictures


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
    record = {"machine": {"cpu": "x"}, "rows": table, "memory": {"5": {"a": 1, "b": 2, "c": 3, "d": 4}}}
    text = report(record | {"fuzzed": {"files": 30, "read": 4, "refused": 26, "slowest_s": 0.5}})
    assert "| 5 | shared | 4 | 0.75 |" in text
    assert "Of 30 files fuzzed from good ones 4 were read and 26 refused" in text
