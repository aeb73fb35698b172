"""Cache of paid calls: one SQLite file, keyed by content, shared by the threads and processes of a machine.

A reply is stored before the caller sees it, together with its cost, so that a killed run never pays for a stored call
again. Permanent refusals of an endpoint that answers are stored too and marked as such; transient failures are not.
Whoever makes a call holds a file lock on its content, which ends with its process, so two workers never pay for the
same call at once. The same folder of locks limits how many requests all processes send to an endpoint at once.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from qzoom.errors import BudgetSpentError, ConfigError, StopRunError
from qzoom.llm.settings import CallSettings, EndpointSettings


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer."""

    text: str  # what the model wrote; "" is an answer without content
    cut_off: bool = False  # it ran into its token limit
    model: str = ""
    prompt_tokens: int = 0  # as counted by the endpoint, 0 when it does not say
    completion_tokens: int = 0  # as counted by the endpoint


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a reply."""

    # "transient" (a retry may help), "refused" (this call is refused permanently) or "fatal" (every call is refused:
    # key, model name or address are wrong)
    kind: Literal["transient", "refused", "fatal"]
    reason: str  # why, for the error sentence
    wait_s: float | None = None  # pause that the endpoint asks for; None when it does not


CACHE_SCHEMA = 1
_APPLICATION = 0x715A6F6F
_BUCKET_DIGITS = 3
_POLL_S = 0.02
ENDED = "The run was ended while calls were under way; run it again to go on."
_TABLES = """
CREATE TABLE calls (key TEXT PRIMARY KEY, role TEXT NOT NULL, refused TEXT NOT NULL, text TEXT NOT NULL,
    cut_off INTEGER NOT NULL, model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    made REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE costs (role TEXT NOT NULL, name TEXT NOT NULL, url TEXT NOT NULL, requests INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, kept INTEGER NOT NULL DEFAULT 0, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, money REAL NOT NULL DEFAULT 0, PRIMARY KEY (role, name, url));
CREATE TABLE pace (url TEXT PRIMARY KEY, next REAL NOT NULL);
"""
_ANSWERED = "CREATE TABLE IF NOT EXISTS answered (role, name, url, PRIMARY KEY (role, name, url)) WITHOUT ROWID"
"""Who has given a reply. Files of earlier versions have no such table, and earlier versions do not look for it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Requests and cost of one endpoint in one role."""

    role: str
    name: str
    url: str  # of the endpoint; "" where cached replies are counted
    requests: int = 0  # sent, retries included
    failures: int = 0  # requests without a usable reply
    kept: int = 0  # replies taken from the cache instead
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0  # by the settings' prices

    def since(self, before: Cost | None) -> Cost:
        """This cost without what was spent before."""
        if before is None:
            return self
        spent = (now - then for now, then in zip(astuple(self)[3:], astuple(before)[3:], strict=True))
        return Cost(self.role, self.name, self.url, *spent)


class CallCache:
    """The cache file; opened at first use. Locks lie in a folder beside it (ConfigError: on first use, a file that is
    no call cache or one of another schema; StopRunError: the file can no longer be read or written)."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        self._slots: dict[tuple[str, int], threading.BoundedSemaphore] = {}
        self._ended = threading.Event()

    def end(self) -> None:
        """Let no further call begin: everybody who waits here, or comes later, gets a StopRunError."""
        self._ended.set()

    def pause(self, seconds: float) -> None:
        """Wait so many seconds (StopRunError: `end` was called before or meanwhile)."""
        if self._ended.wait(max(0.0, seconds)):
            raise StopRunError(ENDED)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def find(self, key: str) -> Reply | Failure | None:
        """The stored reply or refusal of a call."""
        with self._using() as file:
            row = file.execute(
                "SELECT refused, text, cut_off, model, prompt_tokens, completion_tokens FROM calls WHERE key = ?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        return Failure("refused", row[0]) if row[0] else Reply(row[1], bool(row[2]), *row[3:])

    def store(self, key: str, outcome: Reply | Failure, cost: Cost) -> None:
        """Store a reply or a refusal and its cost in one transaction."""
        reply = outcome if isinstance(outcome, Reply) else Reply("")
        refused = outcome.reason if isinstance(outcome, Failure) else ""
        row = (key, cost.role, refused, reply.text, int(reply.cut_off), reply.model)
        with self._writing() as file:
            file.execute(
                "INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, reply.prompt_tokens, reply.completion_tokens, time.time()),
            )
            if isinstance(outcome, Reply):
                file.execute("INSERT OR IGNORE INTO answered VALUES (?, ?, ?)", (cost.role, cost.name, cost.url))
            _add(file, cost)

    def count(self, cost: Cost) -> None:
        """Add to the costs."""
        with self._writing() as file:
            _add(file, cost)

    def reserve(self, cost: Cost, calls: CallSettings) -> None:
        """Count a request before it is sent (BudgetSpentError: a budget is used up). `calls`: the budgets; calls under
        way may exceed the budget in money."""
        with self._writing() as file:
            requests, money = file.execute("SELECT TOTAL(requests), TOTAL(money) FROM costs").fetchone()
            if calls.budget_requests and requests >= calls.budget_requests:
                raise BudgetSpentError(
                    f"The budget of {calls.budget_requests} requests is used up; what was answered is kept in "
                    f"{self.path}: raise calls: budget_requests and run again to go on."
                )
            if calls.budget_money and money >= calls.budget_money:
                raise BudgetSpentError(
                    f"The budget of {calls.budget_money:g} is used up ({money:.4g} spent); what was answered is kept "
                    f"in {self.path}: raise calls: budget_money and run again to go on."
                )
            _add(file, cost)

    def costs(self) -> tuple[Cost, ...]:
        """Costs of all runs with this cache, by role, name and endpoint."""
        with self._using() as file:
            rows = file.execute("SELECT * FROM costs ORDER BY role, name, url").fetchall()
        return tuple(Cost(*row) for row in rows)

    def answered(self, role: str, name: str) -> set[str]:
        """Endpoints that have given a member of a role a reply, in all runs with this cache."""
        with self._using() as file:
            rows = file.execute(
                "SELECT url FROM answered WHERE role = ?1 AND name = ?2 UNION "
                "SELECT url FROM costs WHERE role = ?1 AND name = ?2 AND completion_tokens > 0",
                (role, name),
            ).fetchall()
        return {url for (url,) in rows}

    def turn(self, url: str, interval_s: float) -> float:
        """Reserve the next time slot of an endpoint, `interval_s` after the last one. Returns seconds to wait for
        it."""
        now = time.time()
        with self._writing() as file:
            row = file.execute("SELECT next FROM pace WHERE url = ?", (url,)).fetchone()
            start = max(now, row[0]) if row and row[0] < now + 86_400 else now
            file.execute("INSERT OR REPLACE INTO pace VALUES (?, ?)", (url, start + interval_s))
        return start - now

    @contextmanager
    def slot(self, endpoint: EndpointSettings) -> Iterator[None]:
        """Hold one of the endpoint's concurrent slots, after waiting for its rate limit (StopRunError: `end` was
        called)."""
        with self._lock:
            key = (endpoint.url, endpoint.concurrency)
            semaphore = self._slots.setdefault(key, threading.BoundedSemaphore(endpoint.concurrency))
        with semaphore, self._slot_file(endpoint):
            rate = endpoint.requests_per_minute
            self.pause(self.turn(endpoint.url, 60.0 / rate) if rate else 0.0)
            yield

    def _slot_file(self, endpoint: EndpointSettings) -> AbstractContextManager[None]:
        """One of as many lock files as there are slots."""
        name = hashlib.sha256(endpoint.url.encode()).hexdigest()[:12]
        return self._one_of(f"place-{name}-{number}.lock" for number in range(endpoint.concurrency))

    def claim(self, key: str) -> AbstractContextManager[None]:
        """Hold the call of a key; others that want it wait, in this and every other process of the machine
        (StopRunError: `end` was called meanwhile)."""
        return self._one_of((f"{key[:_BUCKET_DIGITS]}.lock",))

    @contextmanager
    def _one_of(self, names: Iterable[str]) -> Iterator[None]:
        """Hold the first lock file that is free; the lock of a killed process is released."""
        from filelock import FileLock, Timeout

        locks = [FileLock(self.locks() / name, thread_local=False) for name in names]
        while True:
            for lock in locks:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            self.pause(_POLL_S)

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
                with self.claim("opening"):
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
        astuple(cost),
    )


def _opened(path: Path) -> sqlite3.Connection:
    """The file, created or checked. Several processes may do this at once."""
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
        if (application, schema) == (_APPLICATION, CACHE_SCHEMA):
            file.execute(_ANSWERED)
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
