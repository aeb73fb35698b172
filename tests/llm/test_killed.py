"""kill -9 of a process that makes calls: what was stored is never asked again."""

import hashlib
import json
import random
import sqlite3
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.llm.calls import PROCESSES, make_calls
from tests.llm.stub import Stub, serve, text_of

CALLS, THREADS = 120, 4


def start(url: str, path: Path, count: int) -> tuple[Any, Connection]:
    """A process that makes calls, and where it says what came."""
    heard, said = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=make_calls, args=(url, path, count, THREADS, said))
    process.start()
    said.close()
    return process, heard


def result(process: Any, heard: Connection) -> tuple[int, int]:
    """How many texts a process got, and how many different ones."""
    process.join(300)
    assert process.exitcode == 0
    texts: tuple[int, int] = heard.recv()
    return texts


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
        held: set[str] = set()
        for _ in range(5):
            with lock:
                process, _ = start(url, path, CALLS)
                kill_at[0] = (rng.randint(5, 20), rng.choice([0.0, 0.001, 0.005, 0.02]), process)
            process.join(300)
            assert process.exitcode == -9
            assert not held & set(lives[-1])
            assert len(set(lives[-1])) == len(lives[-1])
            before, held = held, stored(path)
            assert before <= held
            assert len(set(lives[-1]) - held) <= THREADS
            with lock:
                lives.append([])
                kill_at[0] = None
        assert result(*start(url, path, CALLS)) == (CALLS, CALLS)
    assert len(lives[-1]) == CALLS - len(held)
    assert not held & set(lives[-1])
    assert json.dumps(sorted(stored(path))) == json.dumps(
        sorted(hashlib.sha256(f"Question {i}?".encode()).hexdigest() for i in range(CALLS))
    )


def test_several_processes_pay_once(tmp_path):
    stub = Stub(lambda body, before: hashlib.sha256(text_of(body).encode()).hexdigest())
    with serve(stub) as url:
        started = [start(url, tmp_path / "calls.sqlite", 60) for _ in range(3)]
        assert [result(*each) for each in started] == [(60, 60)] * 3
    assert list(stub.asked.values()) == [1] * 60


def stored(path: Path) -> set[str]:
    file = sqlite3.connect(path)
    try:
        return {row[0] for row in file.execute("SELECT text FROM calls")}
    finally:
        file.close()
