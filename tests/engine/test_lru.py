import threading

import pytest

from qzoom.engine.cache import LRUCache


def test_the_least_recently_used_value_makes_room():
    kept = LRUCache[str](6, len)
    kept.put(b"a", "aa")
    kept.put(b"b", "bb")
    kept.put(b"c", "cc")
    assert kept.get(b"a") == "aa"
    kept.put(b"d", "ddd")
    assert [kept.peek(key) for key in (b"a", b"b", b"c", b"d")] == ["aa", None, None, "ddd"]
    assert (kept.nbytes, kept.entries, kept.hits, kept.misses) == (5, 2, 1, 0)
    assert kept.get(b"b") is None
    assert kept.misses == 1
    kept = LRUCache[str](4, len)
    kept.put(b"a", "aa")
    kept.put(b"b", "bb")
    assert kept.peek(b"a") == "aa"
    kept.put(b"c", "cc")
    assert kept.peek(b"a") is None
    assert (kept.hits, kept.misses) == (0, 0)
    kept = LRUCache[str](0, len)
    kept.put(b"a", "a")
    assert (kept.get(b"a"), kept.entries, kept.nbytes) == (None, 0, 0)


@pytest.mark.parametrize(("new", "held", "nbytes"), [("aaa", "aaa", 5), ("a", "a", 3), ("aaaaaa", "aa", 4)])
def test_a_value_takes_the_place_of_an_earlier_one_unless_it_is_too_large(new, held, nbytes):
    kept = LRUCache[str](5, len)
    kept.put(b"a", "aa")
    kept.put(b"b", "bb")
    kept.put(b"a", new)
    assert (kept.peek(b"a"), kept.peek(b"b"), kept.nbytes) == (held, "bb", nbytes)


def test_several_threads_leave_the_books_in_order():
    kept = LRUCache[bytes](100, len)

    def work(seed: int) -> None:
        for i in range(500):
            key = bytes([(seed + 7 * i) % 40])
            if kept.get(key) is None:
                kept.put(key, key * (1 + (seed + i) % 9))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.hits + kept.misses == 2000
    assert kept.nbytes <= 100
    assert kept.nbytes == sum(len(value) for i in range(40) if (value := kept.peek(bytes([i]))) is not None)
