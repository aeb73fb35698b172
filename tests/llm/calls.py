"""What a process of its own does in the tests of killed ones: calls from several threads, kept in one file."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from qzoom.cli.main import run
from qzoom.llm.cache import CallCache
from qzoom.llm.client import Client, SharedClient
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling

PROCESSES = get_context("forkserver")
"""Starts processes from one that has read the libraries already."""
PROCESSES.set_forkserver_preload(["openai", "qzoom.cli.distill", "qzoom.distill.run", __name__])


def make_calls(url: str, path: Path, count: int, threads: int, said: Connection) -> None:
    """Ask `count` questions; says at the end how many texts came and how many different ones."""
    shared = SharedClient(CallCache(path), CallSettings(backoff_s=0.01))
    client = Client("teacher", "one", [EndpointSettings(url, "m")], Sampling(), shared)
    with ThreadPoolExecutor(threads) as pool:
        texts = list(pool.map(lambda i: client.call([("user", (f"Question {i}?",))]).text, range(count)))
    said.send((len(texts), len(set(texts))))
    shared.close()


def run_interruptibly(words: list[str], errors: Path) -> None:
    """A command that ends at SIGINT, which suites in the background ignore, with its standard error in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(run(words))
