import json

QUESTION = "What is the total amount?"


def test_a_json_line_has_no_answer_and_a_heat_map_of_the_coarse_cells(here, picture):
    result = here("perceive", picture, QUESTION, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values.keys() >= {"gate", "regions", "usage", "timing_ms"}
    assert not {"text", "tokens", "heat_maps"} & values.keys()
    assert values["usage"]["completion_tokens"] == 0
    result = here("perceive", picture, QUESTION, "--json", "--heatmap", "--quiet")
    values = json.loads(result.out)
    (heat_map,) = values["heat_maps"]
    rows = heat_map["values"]
    assert len(rows) * len(rows[0]) == values["usage"]["coarse_tokens"]
    assert all(0 <= value <= 1 for row in rows for value in row)


def test_regions_are_those_that_ask_reads_and_do_not_wait_for_the_gate(here, picture):
    words = (picture, QUESTION, "--json", "--quiet", "--gate-threshold", "0")
    seen = json.loads(here("perceive", *words).out)
    answered = json.loads(here("ask", *words).out)
    assert [r["box"] for r in seen["regions"]] == [r["box"] for r in answered["regions"]]
    assert abs(seen["gate"]["score"] - answered["gate"]["score"]) < 1e-6
    result = here("perceive", picture, QUESTION, "--json", "--gate-threshold", "1", "--region-threshold", "0")
    values = json.loads(result.out)
    assert values["gate"]["zoomed"] is False
    assert values["regions"]


def test_words_for_people(here, picture):
    result = here("perceive", picture, QUESTION, "--region-threshold", "0")
    lines = result.out.splitlines()
    assert lines[0].startswith("gate ")
    assert lines[1].startswith("region ")
    assert result.err.startswith("cost ")
