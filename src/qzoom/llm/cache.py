"""How many requests an endpoint gets at once and per minute, counted over all processes of the machine.

What an endpoint's answer means: a reply, a failure that may pass, a refusal of this call, or the end of the run.

Calls that were paid for, kept by content in one SQLite file that threads and processes of a machine share.

A reply is stored before anyone sees it, together with what it cost, so that a killed run pays for no stored call
again. Refusals for good are stored too, marked as such; failures that may pass are not. Whoever makes a call holds a
file lock on its content, which ends with its process: two workers never pay for the same call at once.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import ConfigError, StopRunError
from qzoom.llm.settings import EndpointSettings

__all__ = [
    "CACHE_SCHEMA",
    "BudgetSpentError",
    "CallCache",
    "Cost",
    "Fatal",
    "Limits",
    "Outcome",
    "Passing",
    "Refused",
    "Reply",
    "read_reply",
]


_POLL_S = 0.02


class Limits:
    """Hands out turns at endpoints.

    Args:
        cache: beside whose file the places lie.
    """

    def __init__(self, cache: CallCache) -> None:
        self._cache = cache
        self._gates: dict[tuple[str, int], threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()

    @contextmanager
    def place(self, endpoint: EndpointSettings) -> Iterator[None]:
        """Wait for one of the endpoint's places, then for its next turn, and hold the place."""
        with self._lock:
            key = (endpoint.url, endpoint.concurrency)
            gate = self._gates.setdefault(key, threading.BoundedSemaphore(endpoint.concurrency))
        with gate, self._file_place(endpoint):
            if endpoint.requests_per_minute:
                time.sleep(self._cache.turn(endpoint.url, 60.0 / endpoint.requests_per_minute))
            yield

    @contextmanager
    def _file_place(self, endpoint: EndpointSettings) -> Iterator[None]:
        """One of as many lock files as there are places; a killed process gives its places back."""
        from filelock import FileLock, Timeout

        folder = self._cache.locks()
        name = hashlib.sha256(endpoint.url.encode()).hexdigest()[:12]
        while True:
            for number in range(endpoint.concurrency):
                lock = FileLock(folder / f"place-{name}-{number}.lock", thread_local=False)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            time.sleep(_POLL_S)


_PASSING = {408, 409, 425, 429}
_REFUSED = {400, 413, 422, 451}
_UNKNOWN_MODEL = ("model_not_found", "model not found", "does not exist", "unknown model")


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer.

    Args:
        text: what the model wrote; it may be empty, which is an answer of no content.
        cut_off: it ran into its token limit.
        model: what the endpoint says answered.
        prompt_tokens: as counted by the endpoint, 0 when it does not say.
        completion_tokens: likewise.
    """

    text: str
    cut_off: bool = False
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Passing:
    """A failure that another try may mend; `wait_s` is what the endpoint asks for, None when it does not."""

    reason: str
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """This call is refused for good."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """All calls are refused: key, model name or address are wrong."""

    reason: str


Outcome = Reply | Passing | Refused | Fatal


def read_reply(status: int, retry_after: str | None, body: bytes) -> Outcome:
    """What a response means.

    Args:
        status: HTTP status.
        retry_after: that header.
        body: of the response.
    """
    if 200 <= status < 300:
        return _completion(body)
    if status in _PASSING or status >= 500:
        return Passing(f"HTTP {status}", _wait(retry_after))
    said = _complaint(body)
    if status in (401, 403):
        return Fatal(f"it refuses the key (HTTP {status})")
    if status in _REFUSED and not any(word in said.casefold() for word in _UNKNOWN_MODEL):
        return Refused(f"HTTP {status}" + (f": {said}" if said else ""))
    if status in (400, 404):
        return Fatal(f"it does not know the model or the address (HTTP {status})" + (f": {said}" if said else ""))
    return Fatal(f"HTTP {status}" + (f": {said}" if said else ""))


def _completion(body: bytes) -> Outcome:
    try:
        value: Any = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is None:
            text = choice["message"].get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Passing("a reply that is no chat completion")
    if not isinstance(text, str):
        return Passing("a reply that is no chat completion")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    model = value.get("model")
    return Reply(
        text.encode("utf-8", "replace").decode(),
        choice.get("finish_reason") == "length",
        model if isinstance(model, str) else "",
        _tokens(usage.get("prompt_tokens")),
        _tokens(usage.get("completion_tokens")),
    )


def _tokens(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _complaint(body: bytes) -> str:
    """What an error body says, on one line, cut where it is long."""
    try:
        error = json.loads(body).get("error", "")
        said = error.get("message", "") if isinstance(error, dict) else error
        if isinstance(error, dict) and isinstance(error.get("code"), str):
            said = f"{said} ({error['code']})"
    except (ValueError, AttributeError, RecursionError):
        said = body[:200].decode("utf-8", "replace")
    return " ".join(str(said).split())[:200]


def _wait(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


CACHE_SCHEMA = 1
_APPLICATION = 0x715A6F6F
_BUCKET_DIGITS = 3
_TABLES = """
CREATE TABLE calls (key TEXT PRIMARY KEY, role TEXT NOT NULL, refused TEXT NOT NULL, text TEXT NOT NULL,
    cut_off INTEGER NOT NULL, model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    made REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE costs (role TEXT NOT NULL, name TEXT NOT NULL, url TEXT NOT NULL, requests INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, kept INTEGER NOT NULL DEFAULT 0, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, money REAL NOT NULL DEFAULT 0, PRIMARY KEY (role, name, url));
CREATE TABLE pace (url TEXT PRIMARY KEY, next REAL NOT NULL);
"""


class BudgetSpentError(StopRunError):
    """The requests or the money that a run may spend are used up."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one endpoint was asked and paid in one role.

    Args:
        role: "teacher" and so on.
        name: of the role's member.
        url: of the endpoint; "" where kept replies are counted.
        requests: sent, repeated ones included.
        failures: requests without a usable reply.
        kept: replies taken from the cache instead.
        prompt_tokens: as the endpoint counts them.
        completion_tokens: likewise.
        money: by the settings' prices.
    """

    role: str
    name: str
    url: str
    requests: int = 0
    failures: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0


class CallCache:
    """The file; opened when it is first used.

    Args:
        path: of the SQLite file; its folder is made. Locks lie in a folder beside it.

    Raises:
        ConfigError: on first use, a file that is no call cache or one of another schema.
        StopRunError: the file can no longer be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def find(self, key: str) -> Reply | Refused | None:
        """What is stored for a call."""
        with self._using() as file:
            row = file.execute(
                "SELECT refused, text, cut_off, model, prompt_tokens, completion_tokens FROM calls WHERE key = ?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        return Refused(row[0]) if row[0] else Reply(row[1], bool(row[2]), *row[3:])

    def store(self, key: str, outcome: Reply | Refused, cost: Cost) -> None:
        """Keep a reply or a refusal and add up what it cost, as one.

        Args:
            key: of the call.
            outcome: what came back.
            cost: who paid what for it; its requests were counted before.
        """
        reply = outcome if isinstance(outcome, Reply) else Reply("")
        refused = outcome.reason if isinstance(outcome, Refused) else ""
        row = (key, cost.role, refused, reply.text, int(reply.cut_off), reply.model)
        with self._writing() as file:
            file.execute(
                "INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, reply.prompt_tokens, reply.completion_tokens, time.time()),
            )
            _add(file, cost)

    def count(self, cost: Cost) -> None:
        """Add to the costs."""
        with self._writing() as file:
            _add(file, cost)

    def reserve(self, cost: Cost, budget_requests: int, budget_money: float) -> None:
        """Count a request before it is sent.

        Args:
            cost: with one request.
            budget_requests: most requests of all time, 0 for any number.
            budget_money: most money of all time, 0 for any sum. Calls under way may take it beyond.

        Raises:
            BudgetSpentError: nothing more may be spent.
        """
        with self._writing() as file:
            requests, money = file.execute("SELECT TOTAL(requests), TOTAL(money) FROM costs").fetchone()
            if budget_requests and requests >= budget_requests:
                raise BudgetSpentError(
                    f"The budget of {budget_requests} requests is used up; what was answered is kept in {self.path}: "
                    "raise calls: budget_requests and run again to go on."
                )
            if budget_money and money >= budget_money:
                raise BudgetSpentError(
                    f"The budget of {budget_money:g} is used up ({money:.4g} spent); what was answered is kept in "
                    f"{self.path}: raise calls: budget_money and run again to go on."
                )
            _add(file, cost)

    def costs(self) -> tuple[Cost, ...]:
        """All costs of all time, by role, name and endpoint."""
        with self._using() as file:
            rows = file.execute("SELECT * FROM costs ORDER BY role, name, url").fetchall()
        return tuple(Cost(*row) for row in rows)

    def turn(self, url: str, interval_s: float) -> float:
        """Take the next turn of an endpoint with a rate limit.

        Args:
            url: of the endpoint.
            interval_s: between two turns.

        Returns:
            Seconds to wait for it.
        """
        now = time.time()
        with self._writing() as file:
            row = file.execute("SELECT next FROM pace WHERE url = ?", (url,)).fetchone()
            start = max(now, row[0]) if row and row[0] < now + 86_400 else now
            file.execute("INSERT OR REPLACE INTO pace VALUES (?, ?)", (url, start + interval_s))
        return start - now

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold the call of a key; whoever else wants it waits, in this and any other process of the machine."""
        with self._one_at_a_time(key[:_BUCKET_DIGITS]):
            yield

    @contextmanager
    def _one_at_a_time(self, name: str) -> Iterator[None]:
        from filelock import FileLock

        with FileLock(self.locks() / f"{name}.lock", thread_local=False, poll_interval=0.02):
            yield

    def locks(self) -> Path:
        """The folder of lock files."""
        folder = self.path.with_name(self.path.name + ".locks")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The folder {folder} of the call cache cannot be made ({error}); name another."
            ) from error
        return folder

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._open is None:
                with self._one_at_a_time("open"):
                    self._open = _opened(self.path)
            try:
                yield self._open
            except sqlite3.Error as error:
                raise StopRunError(
                    f"The call cache {self.path} cannot be used ({error}); check disk and folder and run again."
                ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._using() as file:
            file.execute("BEGIN IMMEDIATE")
            try:
                yield file
            except BaseException:
                file.execute("ROLLBACK")
                raise
            file.execute("COMMIT")


def _add(file: sqlite3.Connection, cost: Cost) -> None:
    file.execute(
        "INSERT INTO costs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (role, name, url) DO UPDATE SET "
        "requests = requests + excluded.requests, failures = failures + excluded.failures, kept = kept + excluded.kept,"
        " prompt_tokens = prompt_tokens + excluded.prompt_tokens, completion_tokens = completion_tokens + "
        "excluded.completion_tokens, money = money + excluded.money",
        (cost.role, cost.name, cost.url, cost.requests, cost.failures, cost.kept, cost.prompt_tokens,
         cost.completion_tokens, cost.money),
    )  # fmt: skip


def _opened(path: Path) -> sqlite3.Connection:
    """The file, made or checked. Several processes may do this at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(path, timeout=120.0, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"The call cache {path} cannot be opened ({error}); check the folder.") from error
    try:
        file.execute("PRAGMA busy_timeout = 120000")
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        file.execute("BEGIN IMMEDIATE")
        application, schema = (
            file.execute(f"PRAGMA {what}").fetchone()[0] for what in ("application_id", "user_version")
        )
        tables = file.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not application and not schema and not tables:
            for statement in _TABLES.split(";"):
                file.execute(statement)
            file.execute(f"PRAGMA application_id = {_APPLICATION}")
            file.execute(f"PRAGMA user_version = {CACHE_SCHEMA}")
            application, schema = _APPLICATION, CACHE_SCHEMA
        file.execute("COMMIT")
    except sqlite3.Error as error:
        file.close()
        raise ConfigError(f"{path} is no call cache ({error}); name another file or move it away.") from error
    if application != _APPLICATION:
        file.close()
        raise ConfigError(f"{path} is an SQLite file of something else; name another file for the call cache.")
    if schema != CACHE_SCHEMA:
        file.close()
        raise ConfigError(
            f"The call cache {path} is of schema {schema}; this version reads schema {CACHE_SCHEMA}. Use the version "
            "that wrote it, or move the file away and pay for the calls again."
        )
    return file
