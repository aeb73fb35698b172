import gc
import platform
import subprocess
import sys
import threading
import weakref

import pytest

from qzoom.serving import memory
from tests.serving.engines.simulated import SimulatedEngine, front
from tests.serving.running import running, wait_until

SCRIPT = """
import sys, threading
from pathlib import Path
from qzoom.serving.memory import limit_arenas, trim_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

assert limit_arenas()
small = resident()
def work():
    for _ in range(3):
        held = [bytearray(b"x" * (2 * 2**20 + i)) for i in range(40)]
        del held
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
trim_memory()
print(resident() - small)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_blocks_of_many_threads_are_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 60  # of 320 MiB that were held at once


class Left:
    """What an ended request leaves behind: it refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_a_server_gives_back_what_requests_leave_behind_whatever_answers(monkeypatch):
    monkeypatch.setattr(memory, "TRIM_S", 0.01)
    others = set(threading.enumerate())  # servers of other tests trim, too
    collected = threading.Event()
    gc.disable()
    try:
        with running(SimulatedEngine(None, front())):
            left = weakref.ref(Left(), lambda _: collected.set())
            assert collected.wait(60)
            assert left() is None
    finally:
        gc.enable()
    wait_until(lambda: not any(thread.name == "qzoom-trim" for thread in set(threading.enumerate()) - others))
