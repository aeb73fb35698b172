import dataclasses
import json
import os
import random
import shutil

import pytest
from PIL import Image

from qzoom.distill.items import ImageRef
from qzoom.distill.recipe import DatasetRecipe, step_settings
from qzoom.distill.run import add_kept, open_kept, read_kept, run_recipe
from qzoom.errors import ConfigError, DataError, StopRunError
from qzoom.settings import from_mapping
from qzoom.store.log import LogWriter
from tests.distill.data import code_of, make_pictures, recipe_values
from tests.distill.views import finished_item
from tests.llm.stub import Stub, serve, text_of

pq = pytest.importorskip("pyarrow.parquet")


def recipe_of(*pictures, **changes):
    return from_mapping(DatasetRecipe, recipe_values(*pictures, **changes), "test")


def rows_of(folder):
    return pq.read_table(folder / "dataset" / "train.parquet").to_pylist()


def test_answers_and_boxes_arrive(tmp_path):
    questions = make_pictures(tmp_path / "in", 3)
    report = run_recipe(recipe_of(questions), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert report.rows == {"train": 6, "validation": 0}
    assert {row["answer"] for row in rows} == {code_of(p, n) for p in range(3) for n in range(2)}
    row = next(row for row in rows if row["answer"] == code_of(1, 1))
    assert row["bbox"] == [160, 90, 220, 130]
    assert row["extra_info"]["question"] == "Which code stands at place 1 of sheet 1?"
    assert row["images"][0]["bytes"] == (tmp_path / "in/1.png").read_bytes()
    assert [report.stats.kept[step] for step in ("propose", "validate", "answer", "vote")] == [6, 6, 6, 6]
    card = (tmp_path / "out/dataset/README.md").read_text()
    assert "| Agreed answers | 6 | 6 | 0 |" in card
    assert "| ocr | 6 | 6 | 100.0% |" in card


def test_progress_is_told_of_pictures_and_of_the_export(tmp_path):
    pictures, exported = [], []
    recipe = recipe_of(make_pictures(tmp_path / "in", 2))
    run_recipe(
        recipe,
        tmp_path / "out",
        on_picture=lambda done, total: pictures.append((done, total)),
        on_export=lambda done, total: exported.append((done, total)),
    )
    assert pictures == [(1, 2), (2, 2)]
    assert exported == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_rerun_computes_nothing_and_writes_the_same(tmp_path):
    recipe = recipe_of(make_pictures(tmp_path / "in", 3))
    first = run_recipe(recipe, tmp_path / "out")
    before = (tmp_path / "out/dataset/train.parquet").read_bytes()
    again = run_recipe(recipe, tmp_path / "out")
    assert sum(first.computed.values()) == 3 + 3 + 5 * 6
    assert sum(again.computed.values()) == 0
    assert (tmp_path / "out/dataset/train.parquet").read_bytes() == before
    assert again.stats.to_dict() == first.stats.to_dict()


def test_new_pictures_in_front_leave_old_results_alone(tmp_path):
    old = make_pictures(tmp_path / "in", 3)
    run_recipe(recipe_of(old), tmp_path / "out")
    new = make_pictures(tmp_path / "more", 2, first=7)
    report = run_recipe(recipe_of(new, old), tmp_path / "out")
    assert report.computed == {
        **dict.fromkeys(("pictures", "propose"), 2),
        **dict.fromkeys(("crop", "ask", "validate", "answer", "vote"), 4),
    }
    assert report.rows["train"] == 10


def test_changed_settings_are_named_and_replaced_from_their_step_on(tmp_path):
    questions = make_pictures(tmp_path / "in", 2)
    run_recipe(recipe_of(questions), tmp_path / "out")
    changed = recipe_of(questions, answer={"samples": 5})
    with pytest.raises(ConfigError, match=r"samples was 4, is 5.*--fresh"):
        run_recipe(changed, tmp_path / "out")
    report = run_recipe(changed, tmp_path / "out", fresh_from="answer")
    assert report.computed == dict.fromkeys(report.computed, 0) | {"answer": 4, "vote": 4}
    assert len(json.loads(rows_of(tmp_path / "out")[0]["provenance"])["votes"]) == 10


def test_limit_takes_the_first_pictures_and_unknown_steps_are_refused(tmp_path):
    report = run_recipe(recipe_of(make_pictures(tmp_path / "in", 4)), tmp_path / "out", limit=1)
    assert (report.stats.pictures, report.rows["train"]) == (1, 2)
    recipe = recipe_of(make_pictures(tmp_path / "in", 1))
    with pytest.raises(ConfigError, match="No step 'difficulty' in this recipe; its steps: propose, crop"):
        run_recipe(recipe, tmp_path / "out", fresh_from="difficulty")


def test_pictures_that_make_trouble_cost_only_themselves(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    Image.effect_noise((640, 480), 80).convert("RGB").save(folder / "good.png")
    Image.effect_noise((600, 400), 60).convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.effect_noise((500, 300), 60).convert("RGB").save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (40, 30)).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    Image.effect_noise((640, 480), 30).convert("RGB").save(folder / "deep" / "good.png")
    shutil.copy(folder / "good.png", folder / "deep" / "twin.png")
    recipe = recipe_of(folder, propose={"by": ["grid"], "select": {"per_picture": 2}})
    report = run_recipe(recipe, tmp_path / "out")
    stats = report.stats
    assert (stats.pictures, stats.duplicates, sum(stats.refused_pictures.values())) == (5, 1, 4)
    assert stats.entered["propose"] == 5
    assert stats.kept["propose"] == 8
    assert stats.refused["propose"]["too few visual tokens"] + stats.refused["propose"]["too few pixels"] == 16
    assert all("in/" not in reason and ".png" not in reason for reason in stats.refused_pictures)
    stored = [json.loads(line) for line in (tmp_path / "out/steps/pictures.jsonl").read_text().splitlines()[1:]]
    sizes = {row["items"][0]["source"]: row["items"][0]["width"] for row in stored if "source" in row["items"][0]}
    assert sizes["turned.jpg"] == 300
    assert {"good.png", "deep/good.png"} <= set(sizes)


def test_names_that_are_no_utf8_are_taken(tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.effect_noise((640, 480), 80).convert("RGB").save(tmp_path / "in" / name)
    recipe = recipe_of(tmp_path / "in", propose={"by": ["grid"], "select": {"per_picture": 2}})
    for _ in range(2):
        report = run_recipe(recipe, tmp_path / "out")
        assert (report.stats.pictures, report.stats.kept["propose"]) == (1, 2)


def test_boxes_outside_are_counted_and_never_exported(tmp_path):
    path = make_pictures(tmp_path / "in", 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["boxes"] = [[900, 900, 990, 950]]
    lines[1]["boxes"] = [[380, 280, 460, 340]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run_recipe(recipe_of(path), tmp_path / "out")
    assert report.stats.refused["propose"] == {"outside the picture": 1, "too few visual tokens": 1}


def test_equal_pictures_of_different_folders_are_used_once(tmp_path):
    one, two = make_pictures(tmp_path / "one", 2), make_pictures(tmp_path / "two", 2)
    report = run_recipe(recipe_of(one, two), tmp_path / "out")
    assert (report.stats.pictures, report.stats.duplicates, report.rows["train"]) == (2, 2, 4)


def test_equal_names_in_different_folders_are_different_pictures(tmp_path):
    one, two = make_pictures(tmp_path / "one", 1), make_pictures(tmp_path / "two", 1, first=9)
    shutil.move(tmp_path / "two/9.png", tmp_path / "two/0.png")
    two.write_text(two.read_text().replace('"9.png"', '"0.png"'))
    report = run_recipe(recipe_of(one, two), tmp_path / "out")
    assert (report.stats.pictures, report.rows["train"]) == (2, 4)
    assert {row["answer"] for row in rows_of(tmp_path / "out")} == {"K00Z", "K01Z", "K90Z", "K91Z"}


def test_a_changed_file_is_read_anew(tmp_path):
    path = make_pictures(tmp_path / "in", 2)
    run_recipe(recipe_of(path), tmp_path / "out")
    Image.new("RGB", (400, 300), "blue").save(tmp_path / "in/0.png")
    report = run_recipe(recipe_of(path), tmp_path / "out")
    assert (report.computed["pictures"], report.computed["propose"], report.stats.pictures) == (1, 1, 2)
    assert (tmp_path / "in/0.png").read_bytes() in {row["images"][0]["bytes"] for row in rows_of(tmp_path / "out")}


def test_two_runs_in_one_folder_are_refused(tmp_path):
    recipe = recipe_of(make_pictures(tmp_path / "in", 1))
    run_recipe(recipe, tmp_path / "out")
    writing = LogWriter(tmp_path / "out/steps/vote.jsonl", "vote", step_settings(recipe, "vote"))
    with writing, pytest.raises(ConfigError, match="Another process is writing"):
        run_recipe(recipe, tmp_path / "out")


def test_pictures_of_a_benchmark_are_left_out(tmp_path):
    path = make_pictures(tmp_path / "in", 3)
    noise = Image.effect_noise((400, 300), 90).convert("RGB")
    noise.save(tmp_path / "in/1.png")
    (tmp_path / "bench").mkdir()
    noise.resize((300, 225)).save(tmp_path / "bench/leak.jpg", quality=80)
    recipe = recipe_of(path, decontaminate={"against": [str(tmp_path / "bench")]})
    report = run_recipe(recipe, tmp_path / "out")
    assert report.rows["train"] == 4
    assert [match.benchmark for match in report.matches] == ["leak.jpg"]
    kept = run_recipe(
        dataclasses.replace(recipe, decontaminate=dataclasses.replace(recipe.decontaminate, drop=False)),
        tmp_path / "out",
    )
    assert (kept.rows["train"], len(kept.matches)) == (6, 1)


def test_order_is_by_picture_and_id_and_equal_items_come_once(tmp_path):
    items = [
        finished_item(ImageRef(f"{picture:020x}", f"{picture}.png", 50, 50), text=f"Wie heißt {n}?")
        for picture in (3, 1, 2)
        for n in range(4)
    ]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(items)
        with open_kept(tmp_path / "kept.tmp") as kept:
            for item in (*items, items[0]):
                add_kept(kept, item)
            found.append(list(read_kept(kept)))
    assert found[0] == found[1] == found[2]
    assert found[0] == sorted(items, key=lambda one: (one.picture.digest, one.id))
    assert not (tmp_path / "kept.tmp").exists()


def test_a_full_disk_is_named(tmp_path):
    item = finished_item(ImageRef("a" * 20, "a.png", 50, 50), text="Which? " * 5000)
    path = tmp_path / "kept.tmp"
    with pytest.raises(DataError, match=r"kept\.tmp cannot be written"), open_kept(path) as kept:  # noqa: PT012
        kept.execute("PRAGMA max_page_count = 3")
        add_kept(kept, item)


FILES = ("dataset/train.parquet", "dataset/README.md")


def recipe_at(url, questions, **calls):
    members = [{"by": "endpoint", "name": name, "endpoints": [{"url": url, "model": name}]} for name in ("a", "b")]
    roles = {"teachers": members, "calls": {"retries": 1, "backoff_s": 0.001, **calls}}
    return from_mapping(DatasetRecipe, recipe_values(questions, roles=roles), "test")


def good(body, before):
    place, sheet = text_of(body).split("place ")[1].split("?")[0].split(" of sheet ")
    return f"<answer>K{sheet.strip()}{place.strip()}Z</answer>"


def test_a_rerun_finishes_what_had_to_wait(tmp_path):
    questions = make_pictures(tmp_path / "in", 3)
    failing = [True]

    def answer(body, before):
        if failing[0] and "of sheet 1?" in text_of(body):
            return 500, {}
        return good(body, before)

    with serve(Stub(answer)) as url:
        first = run_recipe(recipe_at(url, questions), tmp_path / "out")
        assert (first.rows["train"], sum(first.stats.waiting.values())) == (4, 2)
        assert first.stats.refused == {}
        failing[0] = False
        again = run_recipe(recipe_at(url, questions), tmp_path / "out")
        assert (again.rows["train"], sum(again.stats.waiting.values())) == (6, 0)
        assert again.computed["answer"] == 2
        run_recipe(recipe_at(url, questions), tmp_path / "calm")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_a_spent_budget_ends_the_run_and_more_budget_goes_on(tmp_path):
    questions = make_pictures(tmp_path / "in", 3)
    stub = Stub(good)
    with serve(stub) as url:
        with pytest.raises(StopRunError, match="budget"):
            run_recipe(recipe_at(url, questions, budget_requests=20), tmp_path / "out")
        assert sum(stub.asked.values()) == 20
        report = run_recipe(recipe_at(url, questions, budget_requests=100), tmp_path / "out")
        assert report.rows["train"] == 6
        assert sum(stub.asked.values()) == 3 * 2 * 2 * 4
        card = (tmp_path / "out/dataset/README.md").read_text()
    assert "teacher a:" in card
    assert "Look closely and think in a few sentences." in card
    assert url not in card
