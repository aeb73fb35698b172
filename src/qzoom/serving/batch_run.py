"""Asking the questions of a batch: in this process, at a running server, or by Ray's actors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qzoom.cluster import ray_data, ray_running
from qzoom.errors import DataError, ImageError, QZoomError, StopRunError
from qzoom.serving.batch import PASSING, URLS, BatchLine, BatchReader, make_record

if TYPE_CHECKING:
    import httpx

    from qzoom.serving.service import Service

Write = Callable[[BatchLine, dict[str, Any]], None]
"""Called with every line and its record, as answers come."""
_RETRIES = 8  # of a server that is full, restarting or away
_OWN_RETRIES = 2  # of a failure that may be this line's own
_MOST_WAIT_S = 30.0
_OF_ADDRESSES = (301, 302, 303, 307, 308, 403, 404, 405)  # a reply to all lines, unless its code says otherwise
_LOST = ("not_found", "method_not_allowed")  # codes of a server that does not know the address


async def answer_groups(
    groups: Sequence[Sequence[BatchLine]], reader: BatchReader, client: httpx.AsyncClient, write: Write, *, width: int
) -> None:
    """Ask all lines, `width` at a time (StopRunError: the server does not answer any more; DataError: the output cannot
    be written). `groups`: lines about the same pictures together. `width`: requests in flight."""
    places = asyncio.Semaphore(width)

    async def one(line: BatchLine) -> None:
        async with places:
            write(line, await _answer(line, reader, client))

    async def group(lines: Sequence[BatchLine]) -> None:
        await one(lines[0])
        async with asyncio.TaskGroup() as tasks:
            for line in lines[1:]:
                tasks.create_task(one(line))

    waiting = iter(groups)

    async def worker() -> None:
        for lines in waiting:
            await group(lines)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(width):
                tasks.create_task(worker())
    except* QZoomError as errors:
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _answer(line: BatchLine, reader: BatchReader, client: httpx.AsyncClient) -> dict[str, Any]:
    """The record of a line; of several turns it is the last one's, with all texts in `turns`."""
    history: list[dict[str, Any]] = []
    texts: list[str] = []
    record = make_record(line, None)
    try:
        for url, body in reader.requests(line):
            if history:
                body["messages"] = history + body["messages"]
            response = await _send(client, "POST", url, body)
            reply = _reply_of(response, client)
            name = response.headers.get("x-request-id") or reply.get("id", "")
            record = make_record(line, {"status_code": response.status_code, "request_id": name, "body": reply})
            if response.status_code != 200 or url != URLS[0]:
                return record
            texts.append(reply["choices"][0]["message"]["content"])
            history = [*body["messages"], {"role": "assistant", "content": texts[-1]}]
    except (DataError, ImageError) as error:
        return make_record(line, None, str(error))
    return record | ({"turns": texts} if len(texts) > 1 else {})


def _reply_of(response: httpx.Response, client: httpx.AsyncClient) -> dict[str, Any]:
    """The reply, as long as it is one to this line and not to all of them (StopRunError: it is not)."""
    try:
        reply = response.json()
    except ValueError:
        reply = None
    status = response.status_code
    _check_key_taken(response, client)
    if not isinstance(reply, dict) or (status == 200 and "object" not in reply):
        raise StopRunError(
            f"{client.base_url} answers with status {status} and no reply of a qzoom server; check --server, and run "
            "the same command again to go on."
        )
    if status in _OF_ADDRESSES:
        error = reply.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if code is None or code in _LOST:
            raise StopRunError(
                f"{client.base_url} answers with status {status}, as it would to every line; check --server and "
                "--api-key, and run the same command again to go on."
            )
    return reply


def _check_key_taken(response: httpx.Response, client: httpx.AsyncClient) -> None:
    if response.status_code == 401:
        raise StopRunError(f"{client.base_url} refuses the key; give the right one with --api-key.")


async def served_models(client: httpx.AsyncClient) -> list[str]:
    """Names of the models that a server lists; none if it lists none (StopRunError: it does not answer, or refuses the
    key)."""
    response = await _send(client, "GET", "/v1/models")
    _check_key_taken(response, client)
    try:
        return [str(card["id"]) for card in response.json()["data"]] if response.status_code == 200 else []
    except (ValueError, KeyError, TypeError):
        return []


async def _send(client: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """The response. A full or restarting server is asked again, and so, a few times, is one that failed or was late
    (StopRunError: it does not answer, or goes on being full)."""
    import httpx

    # the body as it stands in the line; what is no JSON in it is the server's to refuse
    content, headers = (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})
    wait_s, failure, failed = 0.5, "", 0
    for left in range(_RETRIES, -1, -1):
        try:
            response = await client.request(method, url, content=content, headers=headers)
        except httpx.TransportError as error:
            failure, pause_s = type(error).__name__, wait_s
        else:
            # a picture that cannot be fetched is the line's own fault, a full or stopping server is not
            status, own = response.status_code, b'"media_' in response.content
            if own or status not in (429, *PASSING):
                return response
            if status not in (429, 503):
                failed += 1
                if failed > _OWN_RETRIES or not left:
                    return response
            asked = response.headers.get("retry-after", "")
            failure, pause_s = f"status {status}", float(asked) if asked.isdecimal() else wait_s
        if left:
            await asyncio.sleep(min(pause_s, _MOST_WAIT_S))
            wait_s = min(2 * wait_s, _MOST_WAIT_S)
    raise StopRunError(f"{client.base_url} does not answer ({failure}); run the same command again to go on.")


@asynccontextmanager
async def local_client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, whose service runs until the block ends."""
    import httpx

    from qzoom.serving.app import create_app

    transport = httpx.ASGITransport(app=create_app(service), raise_app_exceptions=False)
    service.start()
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            yield client
    finally:
        await service.close()


def answer_with_ray(
    groups: Sequence[Sequence[BatchLine]],
    reader: BatchReader,
    open_service: Callable[[], Service],
    *,
    width: int,
    actors: int,
    address: str = "",
) -> Iterator[tuple[BatchLine, dict[str, Any]]]:
    """Ask all lines by Ray's actors, each with an engine of its own; yields lines and records as groups are done.

    The input and its pictures must have the same path on all machines.

    Args:
        groups, reader: as in `answer_groups`.
        open_service: makes the service of one actor.
        width: requests in flight per actor.
        address: of a running cluster; empty starts Ray on this machine.

    Raises:
        ConfigError: Ray is not installed or cannot be reached.
        StopRunError: an actor could not start its engine.
    """
    with ray_running("data", address, cpus=actors + 1, advice=", or leave --engine out") as ray:
        data = ray_data(ray, [{"group": number} for number in range(len(groups))], blocks=len(groups))
        results = data.map_batches(
            _Actor,
            fn_constructor_args=(groups, reader, open_service, width),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
        )
        for row in results.iter_rows():
            result = json.loads(row["result"])
            if "stop" in result:
                raise StopRunError(result["stop"])
            by_key = {line.key: line for line in groups[result["group"]]}
            for key, record in result["records"]:
                yield by_key[key], record


class _Actor:
    """One of Ray's processes: an engine and the application before it, on an event loop that runs while it is asked."""

    def __init__(
        self,
        groups: Sequence[Sequence[BatchLine]],
        reader: BatchReader,
        open_service: Callable[[], Service],
        width: int,
    ) -> None:
        self._groups, self._reader, self._width, self._failed = groups, reader, width, ""
        self._loop = asyncio.new_event_loop()
        try:
            self._open = local_client(open_service())
            self._client = self._loop.run_until_complete(self._open.__aenter__())
        except QZoomError as error:
            self._failed = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """A column of group numbers to a column of their records, as JSON."""
        return {"result": [self._one(int(number)) for number in batch["group"]]}

    def _one(self, number: int) -> str:
        if self._failed:
            return json.dumps({"stop": self._failed})
        records: list[tuple[str, dict[str, Any]]] = []
        work = answer_groups(
            [self._groups[number]],
            self._reader,
            self._client,
            lambda line, record: records.append((line.key, record)),
            width=self._width,
        )
        try:
            self._loop.run_until_complete(work)
        except QZoomError as error:
            return json.dumps({"stop": str(error)})
        return json.dumps({"group": number, "records": records})
