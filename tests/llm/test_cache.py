import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qzoom.errors import BudgetSpentError, ConfigError
from qzoom.llm.cache import CallCache, Cost, Failure, Reply
from qzoom.llm.settings import CallSettings

COST = Cost("teacher", "one", "http://x/v1")


@pytest.fixture
def cache(tmp_path):
    made = CallCache(tmp_path / "deep" / "calls.sqlite")
    yield made
    made.close()


def test_what_is_stored_comes_back_also_in_another_process(cache):
    reply = Reply("täxt\n\x00", True, "m-1", 7, 3)
    cache.store("k1", reply, COST)
    cache.store("k2", Failure("refused", "HTTP 413"), COST)
    assert cache.find("k1") == reply
    assert cache.find("k2") == Failure("refused", "HTTP 413")
    assert cache.find("k3") is None
    code = (
        "import sys, pathlib\nfrom qzoom.llm.cache import CallCache\n"
        "print(CallCache(pathlib.Path(sys.argv[1])).find('k1').prompt_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(cache.path)], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


def test_costs_add_up_and_another_user_of_the_file_reads_them(cache):
    cache.reserve(Cost("teacher", "one", "u", requests=1), CallSettings(budget_requests=0, budget_money=0.0))
    cache.store("k", Reply("x"), Cost("teacher", "one", "u", prompt_tokens=100, completion_tokens=10, money=0.5))
    cache.count(Cost("teacher", "one", "u", failures=1))
    cache.count(Cost("asker", "two", "", kept=1))
    again = CallCache(cache.path)
    assert again.costs() == (Cost("asker", "two", "", kept=1), Cost("teacher", "one", "u", 1, 1, 0, 100, 10, 0.5))
    again.close()


def test_budgets_hold_for_all_time(cache):
    one = Cost("teacher", "one", "u", requests=1)
    cache.reserve(one, CallSettings(budget_requests=2, budget_money=0.0))
    cache.reserve(one, CallSettings(budget_requests=2, budget_money=0.0))
    with pytest.raises(BudgetSpentError, match="budget of 2 requests is used up"):
        cache.reserve(one, CallSettings(budget_requests=2, budget_money=0.0))
    cache.reserve(one, CallSettings(budget_requests=3, budget_money=1.0))
    cache.store("k", Reply("x"), Cost("teacher", "one", "u", money=1.25))
    with pytest.raises(BudgetSpentError, match=r"budget of 1 is used up \(1.25 spent\)"):
        cache.reserve(one, CallSettings(budget_requests=0, budget_money=1.0))
    assert cache.costs()[0].requests == 3


def test_who_has_answered_is_known_also_in_files_of_earlier_versions(cache):
    cache.store("k1", Reply("x"), COST)
    cache.store("k2", Reply("x", completion_tokens=3), Cost("teacher", "one", "http://y/v1", completion_tokens=3))
    cache.store("k3", Failure("refused", "HTTP 413"), Cost("teacher", "one", "http://z/v1"))
    assert cache.answered("teacher", "one") == {"http://x/v1", "http://y/v1"}
    assert cache.answered("teacher", "two") == set()
    cache.close()
    with sqlite3.connect(cache.path) as file:
        file.execute("DROP TABLE answered")
    file.close()
    assert cache.answered("teacher", "one") == {"http://y/v1"}
    cache.store("k4", Reply("x"), COST)
    assert cache.answered("teacher", "one") == {"http://x/v1", "http://y/v1"}


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "a.sqlite"
    text.write_text("not a database at all, but long enough to be looked at as one " * 20)
    with pytest.raises(ConfigError, match="is no call cache"):
        CallCache(text).find("k")
    foreign = tmp_path / "b.sqlite"
    with sqlite3.connect(foreign) as file:
        file.execute("CREATE TABLE things (a)")
    file.close()
    with pytest.raises(ConfigError, match="SQLite file of something else"):
        CallCache(foreign).find("k")
    with sqlite3.connect(foreign) as file:
        assert file.execute("SELECT name FROM sqlite_master").fetchall() == [("things",)]
    file.close()


def test_other_schemas_and_folders_are_refused(cache, tmp_path):
    cache.find("k")
    cache.close()
    with sqlite3.connect(cache.path) as file:
        file.execute("PRAGMA user_version = 9")
    file.close()
    with pytest.raises(ConfigError, match="is of schema 9; this version reads schema 1"):
        CallCache(cache.path).find("k")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"):
        CallCache(tmp_path / "file" / "calls.sqlite").find("k")


def test_only_one_holds_a_call(cache):
    inside, most = [0], [0]
    counted = threading.Lock()

    def hold(_: int) -> None:
        mine = CallCache(cache.path)
        for _ in range(10):
            with mine.claim("abc123"):
                with counted:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with counted:
                    inside[0] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hold, range(6)))
    assert most == [1]
    with cache.claim("abc123"), cache.claim("def456"):
        pass


def test_a_killed_holder_lets_go(cache):
    code = (
        "import sys, pathlib, time\nfrom qzoom.llm.cache import CallCache\n"
        "with CallCache(pathlib.Path(sys.argv[1])).claim('abc123'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(cache.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    got = threading.Event()

    def want() -> None:
        with cache.claim("abc123"):
            got.set()

    thread = threading.Thread(target=want)
    thread.start()
    assert not got.wait(0.2)
    process.kill()
    process.communicate()
    assert got.wait(30)
    thread.join()


def test_turns_are_handed_out_at_their_pace(cache):
    waits = [cache.turn("u", 10.0) for _ in range(4)]
    assert waits[0] == 0
    assert [round(wait / 10) for wait in waits] == [0, 1, 2, 3]
    assert cache.turn("v", 10.0) == 0
