"""kill -9 of a process that makes calls: what was stored is never asked again."""

import hashlib
import json
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.llm.stub import Stub, serve, text_of

CALLS, THREADS = 120, 4
WORK = """
import pathlib, sys
from concurrent.futures import ThreadPoolExecutor
from qzoom.llm.cache import CallCache
from qzoom.llm.client import Client, SharedClient
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling

url, path, count, threads = sys.argv[1:]
shared = SharedClient(CallCache(pathlib.Path(path)), CallSettings(backoff_s=0.01))
client = Client("teacher", "one", [EndpointSettings(url, "m")], Sampling(), shared)
with ThreadPoolExecutor(int(threads)) as pool:
    texts = list(pool.map(lambda i: client.call([("user", (f"Question {i}?",))]).text, range(int(count))))
print(len(texts), len(set(texts)))
shared.close()
"""


@pytest.mark.slow
def test_killed_at_random_moments_nothing_stored_is_paid_again(tmp_path):
    rng = random.Random(5)
    path = tmp_path / "calls.sqlite"
    lives: list[list[str]] = [[]]
    lock = threading.Lock()
    kill_at: list[Any] = [None]

    def answer(body: dict[str, Any], before: int) -> str:
        text = hashlib.sha256(text_of(body).encode()).hexdigest()
        with lock:
            lives[-1].append(text)
            due = kill_at[0] is not None and len(lives[-1]) == kill_at[0][0]
        if due:
            _, delay, process = kill_at[0]
            threading.Timer(delay, process.kill).start()
        return text

    with serve(Stub(answer)) as url:
        words = [sys.executable, "-c", WORK, url, str(path), str(CALLS), str(THREADS)]
        held: set[str] = set()
        for _ in range(5):
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            with lock:
                kill_at[0] = (rng.randint(5, 20), rng.choice([0.0, 0.001, 0.005, 0.02]), process)
            process.communicate(timeout=300)
            assert process.returncode == -9
            assert not held & set(lives[-1])
            assert len(set(lives[-1])) == len(lives[-1])
            before, held = held, stored(path)
            assert before <= held
            assert len(set(lives[-1]) - held) <= THREADS
            with lock:
                lives.append([])
                kill_at[0] = None
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == f"{CALLS} {CALLS}\n"
    assert len(lives[-1]) == CALLS - len(held)
    assert not held & set(lives[-1])
    assert json.dumps(sorted(stored(path))) == json.dumps(
        sorted(hashlib.sha256(f"Question {i}?".encode()).hexdigest() for i in range(CALLS))
    )


def test_several_processes_pay_once(tmp_path):
    stub = Stub(lambda body, before: hashlib.sha256(text_of(body).encode()).hexdigest())
    with serve(stub) as url:
        words = [sys.executable, "-c", WORK, url, str(tmp_path / "calls.sqlite"), "60", "4"]
        processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = [process.communicate(timeout=300)[0] for process in processes]
    assert said == ["60 60\n"] * 3
    assert list(stub.asked.values()) == [1] * 60


def stored(path: Path) -> set[str]:
    file = sqlite3.connect(path)
    try:
        return {row[0] for row in file.execute("SELECT text FROM calls")}
    finally:
        file.close()
