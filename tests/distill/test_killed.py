"""The command, killed at random moments: the data is that of an undisturbed run, no stored call is repeated."""

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
import yaml

from qzoom.cli.main import run
from tests.distill.data import make_pictures, recipe_values
from tests.llm.calls import PROCESSES, run_interruptibly
from tests.llm.stub import Stub, completion, serve, text_of

KILLS = 8
LATE = 2
FILES = ("dataset/train.parquet", "dataset/validation.parquet", "dataset/README.md")


class Teachers(Stub):
    """Answers at once by the question's own words; every reply has a number, which the call cache keeps."""

    def __init__(self):
        super().__init__(self.reply)
        self.replies: list[str] = []
        self.wanted = 10**9
        self.reached = threading.Event()

    def reply(self, body, before):
        content = json.dumps(body, sort_keys=True)
        words = text_of(body).split("place ")[1].split("?")[0].split(" of sheet ")
        place, sheet = words[0].strip(), words[1].strip()
        with self.lock:
            self.replies.append(content)
            number = len(self.replies)
            if number >= self.wanted:
                self.reached.set()
        return completion(f"<answer>K{sheet}{place}Z</answer>", (number, 1))


@pytest.fixture
def teachers():
    stub = Teachers()
    with serve(stub):
        yield stub


def words(recipe, folder):
    return ["distill", str(recipe), "-o", str(folder), "--quiet"]


def start(recipe, folder):
    """The command in a process of its own."""
    process = PROCESSES.Process(target=run, args=(words(recipe, folder),))
    process.start()
    return process


def finish(recipe, folder):
    command = [sys.executable, "-m", "qzoom", *words(recipe, folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr


def stored_contents(teachers, folder):
    """What the call cache holds now, as the stub knows it."""
    path = folder / "calls.sqlite"
    if not path.exists():
        return set()
    with sqlite3.connect(path) as file:
        try:
            numbers = [row[0] for row in file.execute("SELECT prompt_tokens FROM calls")]
        except sqlite3.OperationalError:
            return set()
    return {teachers.replies[number - 1] for number in numbers}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_change_nothing_and_repeat_no_stored_call(tmp_path, teachers):
    questions = make_pictures(tmp_path / "in", 8, places=3)
    endpoint = {"url": teachers.url, "model": "m"}
    members = [
        {"by": "endpoint", "name": name, "endpoints": [endpoint | {"model": name}]} for name in ("first", "second")
    ]
    roles = {"teachers": members, "distractor_writer": {"by": "rule"}}
    values = recipe_values(questions, roles=roles, choices={"negatives": 0.5}, export={"validation": 0.3})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert run(words(recipe, tmp_path / "calm")) == 0
    calls = len(teachers.replies)
    assert calls == 8 * 3 * 2 * 4

    rng = random.Random(7)
    folder = tmp_path / "killed"
    kills = 0
    held: set[str] = set()
    while kills < KILLS:
        began = len(teachers.replies)
        teachers.reached.clear()
        teachers.wanted = began + rng.randint(1, 14)
        process = start(recipe, folder)
        while process.is_alive():
            exporting = kills >= KILLS - LATE and (folder / "dataset.partial").exists()
            if exporting or (teachers.reached.wait(0.02) and kills < KILLS - LATE):
                break
        kills += killed(process, rng.uniform(0, 0.08))
        assert not held & set(teachers.replies[began:])
        held = stored_contents(teachers, folder)
    began = len(teachers.replies)
    finish(recipe, folder)
    assert not held & set(teachers.replies[began:])
    assert stored_contents(teachers, folder) == set(teachers.replies[:calls])
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name


def killed(process, after_s):
    """Whether the process still ran so long after and was killed."""
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_an_interrupt_gives_the_calls_up_pays_no_more_and_keeps_the_replies(tmp_path, teachers):
    hanging, numbers = threading.Barrier(3), itertools.count()

    def answer(body, before):
        if next(numbers) in (4, 5):
            hanging.wait(300)
            return "hang"
        return teachers.reply(body, before)

    member = {"by": "endpoint", "name": "t", "endpoints": [{"url": teachers.url, "model": "m"}]}
    vote = {"quorum": 2, "per_teacher": 2, "teachers": 1}
    values = recipe_values(make_pictures(tmp_path / "in", 4), roles={"teachers": [member]}, vote=vote)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(values))
    teachers.answer = answer
    process = PROCESSES.Process(target=run_interruptibly, args=(words(recipe, folder), tmp_path / "errors"))
    process.start()
    hanging.wait(300)  # both workers wait for a reply
    os.kill(process.pid, signal.SIGINT)
    process.join(300)
    assert (process.exitcode, (tmp_path / "errors").read_text()) == (130, "qzoom: interrupted.\n")
    assert len(teachers.bodies) == 6
    assert stored_contents(teachers, folder) == set(teachers.replies)
    assert len(teachers.replies) == 4
    assert run(words(recipe, folder)) == 0
    assert len(set(teachers.replies)) == len(teachers.replies) == len(teachers.bodies) - 2


def test_an_endpoint_that_is_down_is_named_in_one_sentence(tmp_path, capfd):
    questions = make_pictures(tmp_path / "in", 1)
    member = {"by": "endpoint", "name": "t", "endpoints": [{"url": "http://127.0.0.1:9/v1", "model": "m"}]}
    roles = {"teachers": [member], "calls": {"connect_s": 1.0, "retries": 1, "backoff_s": 0.01}}
    values = recipe_values(questions, roles=roles, vote={"quorum": 3, "per_teacher": 3, "teachers": 1})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    assert run(words(recipe, tmp_path / "out")) == 1
    said, complaint = capfd.readouterr()
    assert said == ""
    lines = complaint.splitlines()
    assert len(lines) == 1
    assert "http://127.0.0.1:9/v1" in lines[0]
    assert "teacher" in lines[0]
