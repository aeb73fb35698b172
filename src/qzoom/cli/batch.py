"""`qzoom batch`: a file of questions in, a file of answers out."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.console import Update
from qzoom.cli.engines import EngineOptions
from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import Fresh, GateThreshold, ModelOptions, OutputOptions, RegionThreshold, Zoom
from qzoom.cli.serve import public_name
from qzoom.errors import DataError
from qzoom.serving.settings import SchedulerLimits, ServerSettings

if TYPE_CHECKING:
    from qzoom.serving.batch import AnswerFile, BatchLine, BatchReader
    from qzoom.serving.batch_run import Write
    from qzoom.serving.engines.base import ServingEngine
    from qzoom.serving.service import Service

_FOREVER_S = 86_400.0


@dataclasses.dataclass(frozen=True, slots=True)
class BatchOptions:
    """How much is asked at once, and of whom."""

    server: Annotated[
        str | None,
        optional(
            "Address of a running qzoom server, as http://127.0.0.1:8000; it answers instead of --engine.",
            envvar="QZOOM_BATCH_SERVER",
        ),
    ] = None
    api_key: Annotated[str | None, optional("Key that --server wants.", envvar="QZOOM_API_KEY")] = None
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, envvar="QZOOM_BATCH_CONCURRENCY", help="Requests in flight per engine.")
    ] = 16
    actors: Annotated[
        int, typer.Option(min=0, max=4096, help="Actors of Ray Data, each with an engine; 0 works without Ray.")
    ] = 0


@dataclasses.dataclass(frozen=True, slots=True)
class BodyOptions:
    """What a line asks for unless its body says otherwise."""

    zoom: Zoom = "auto"
    gate_threshold: GateThreshold = None
    region_threshold: RegionThreshold = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128

    def defaults(self, model: str) -> dict[str, Any]:
        """Fields of a request body."""
        given = {"gate_threshold": self.gate_threshold, "region_threshold": self.region_threshold}
        zoom = {"zoom": self.zoom} if self.zoom != "auto" else {}
        controls = zoom | {name: value for name, value in given.items() if value is not None}
        return {"model": model, "max_tokens": self.max_tokens} | ({"qzoom": controls} if controls else {})


@flatten
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", show_default=False, help="JSONL of OpenAI's batch lines or of questions, or Parquet."
        ),
    ],
    *,
    output: Annotated[Path, optional("File of answers: .jsonl or .parquet.", "--output", "-o")],
    model: ModelOptions,
    engine: EngineOptions,
    options: BatchOptions,
    body: BodyOptions,
    media: Annotated[Path | None, optional("Folder whose images may be named; else the input's folder.")] = None,
    fresh: Fresh = False,
    out: OutputOptions,
) -> None:
    """Answer a file of questions about images, one line each.

    Questions about the same image are answered together. An interrupted run goes on with the same command; a line
    that is answered is not asked again. Lines that cannot be answered get a line with the error, and the exit code is
    1; failures that may pass are asked again by the same command.

    Example: qzoom batch questions.jsonl -o answers.jsonl
    """
    from qzoom.serving.batch import PASSING, AnswerFile, BatchReader, grouped, index_input
    from qzoom.serving.batch_tables import finish_table, is_table, open_table

    console = out.console
    if output.suffix not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"{output} must end in .jsonl or .parquet.", param_hint="--output")
    if output.resolve() == source.resolve():
        raise typer.BadParameter("the output is the input; name another file.", param_hint="--output")
    name = public_name(model.model)
    about = _about(source, model, body.defaults(name))
    with open_table(source, output) as lines_path:
        lines = index_input(lines_path)
        folder = source.parent.resolve()
        reader = BatchReader(lines_path.resolve(), body.defaults(name), folder, media.resolve() if media else folder)
        working = output.with_name(f"{output.name}.jsonl") if is_table(output) else output
        with AnswerFile(working, about, fresh=fresh) as answers:
            missing = [line for line in lines if line.key not in answers.answered]
            console.note(f"batch   {len(lines)} questions, {len(lines) - len(missing)} answered before")
            if missing:
                with console.progress("answers", note_every_s=10) as (update,):
                    write = _counting(answers, update, len(lines))
                    start = functools.partial(engine.start, model)
                    _run(grouped(missing), reader, write, options, start=start, ray_address=engine.ray_address)
            answers.finish(lines)
            replies = (record["response"] for record in answers.records())
            statuses = Counter(reply and reply["status_code"] for reply in replies)
            failures, passing = statuses.total() - statuses[200], sum(statuses[status] for status in PASSING)
            if is_table(output):
                finish_table(answers, output)
    if passing:
        console.note(f"{passing} of the errors may pass; the same command asks these lines again")
    console.result(f"{len(lines) - failures} answers and {failures} errors in {output}")
    if failures:
        raise typer.Exit(1)


def _about(source: Path, model: ModelOptions, defaults: dict[str, Any]) -> dict[str, Any]:
    """What decides the answers: the input's bytes, the model, and the options of every request."""
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}); give a JSONL or Parquet file.") from error
    folder = Path(model.model)
    files = (
        sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()) if folder.is_dir() else []
    )
    which = {"model": model.model, "revision": model.revision, "dtype": model.dtype}
    which |= {"files": hashlib.sha256(repr(files).encode()).hexdigest()[:16]} if files else {}
    return {"input": digest, "model": which, "request": defaults}


def _counting(answers: AnswerFile, update: Update, total: int) -> Write:
    """Writes answers and shows the rate, and tokens a second."""
    begun, tokens, count = time.monotonic(), 0, 0

    def write(line: BatchLine, record: dict[str, Any]) -> None:
        nonlocal tokens, count
        answers.write(line, record)
        usage = ((record["response"] or {}).get("body") or {}).get("usage") or {}
        tokens += usage.get("total_tokens", 0)
        count += 1
        seconds = max(1e-9, time.monotonic() - begun)
        left_s = (total - len(answers.answered)) * seconds / count
        text = f"{count / seconds:.2f} answers/s, {tokens / seconds:.0f} tokens/s, {left_s:.0f} s left"
        update(len(answers.answered), total, text)

    return write


def _open_service(name: str, width: int, start: Callable[[ServerSettings], ServingEngine]) -> Service:
    """The application's service; loads the model. Limits of a request stay, waiting has none."""
    from qzoom.serving.service import Service

    settings = ServerSettings(
        model_name=name,
        scheduler=SchedulerLimits(slots=width, queue=width + 1),
        deadline_s=_FOREVER_S,
        heartbeat_s=_FOREVER_S,
    )
    return Service(start(settings), settings)


def _run(
    groups: Sequence[Sequence[BatchLine]],
    reader: BatchReader,
    write: Write,
    options: BatchOptions,
    *,
    start: Callable[[ServerSettings], ServingEngine],
    ray_address: str,
) -> None:
    """Have all lines answered; `start` loads the model of this process or of an actor."""
    from qzoom.serving.batch_run import answer_groups, answer_with_ray, local_client

    open_service = functools.partial(_open_service, reader.defaults["model"], options.concurrency, start)
    if options.server is None and options.actors:
        results = answer_with_ray(
            groups, reader, open_service, width=options.concurrency, actors=options.actors, address=ray_address
        )
        for line, record in results:
            write(line, record)
        return

    async def ask() -> None:
        local = options.server is None
        client = local_client(open_service()) if local else _remote(options.server, options.api_key)
        async with client as opened:
            await answer_groups(groups, reader, opened, write, width=options.concurrency)

    asyncio.run(ask())


def _remote(url: Any, key: str | None) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not url.lower().startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} is no address; write http://HOST:PORT.", param_hint="--server")
    try:
        return httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=600)
    except (httpx.InvalidURL, TypeError) as error:
        raise typer.BadParameter(f"{url!r} is no address; write http://HOST:PORT.", param_hint="--server") from error
