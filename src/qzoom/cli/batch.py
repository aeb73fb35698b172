"""`qzoom batch`: a file of questions in, a file of answers out."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli.console import Update
from qzoom.cli.flags import flatten
from qzoom.cli.options import (
    Fresh,
    GateThreshold,
    ModelOptions,
    OutputOptions,
    RegionThreshold,
    Zoom,
    find_device,
)
from qzoom.cli.serve import public_name
from qzoom.errors import DataError

if TYPE_CHECKING:
    from qzoom.serving.batch import AnswerFile, BatchLine, BatchReader
    from qzoom.serving.batch_run import Write
    from qzoom.serving.service import Service
    from qzoom.serving.settings import ServerSettings

_FOREVER_S = 86_400.0


@dataclasses.dataclass(frozen=True, slots=True)
class BatchOptions:
    """Who answers, and how much at once."""

    engine: Annotated[
        Literal["native", "ray"],
        typer.Option(envvar="QZOOM_BATCH_ENGINE", help="native: in this process; ray: by actors of Ray Data."),
    ] = "native"
    server: Annotated[
        str | None,
        typer.Option(
            envvar="QZOOM_BATCH_SERVER",
            show_default=False,
            help="Address of a running qzoom server, as http://127.0.0.1:8000; it answers instead of --engine.",
        ),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(envvar="QZOOM_API_KEY", show_default=False, help="Key that --server wants.")
    ] = None
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, envvar="QZOOM_BATCH_CONCURRENCY", help="Requests in flight per engine.")
    ] = 16
    actors: Annotated[int, typer.Option(min=1, max=4096, help="Ray actors, each with the model.")] = 2
    ray_address: Annotated[
        str, typer.Option(show_default=False, help='A running Ray cluster, or "auto"; empty starts Ray here.')
    ] = ""


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
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="File of answers: .jsonl or .parquet.")
    ],
    model: ModelOptions,
    options: BatchOptions,
    body: BodyOptions,
    media: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Folder that file:// addresses may name; else the input's folder."),
    ] = None,
    fresh: Fresh = False,
    out: OutputOptions,
) -> None:
    """Answer a file of questions about images, one line each.

    Questions about the same image are answered together. An interrupted run goes on with the same command; a line
    that is written is not asked again. Lines that cannot be answered get a line with the error, and the exit code is 1.

    Example: qzoom batch questions.jsonl -o answers.jsonl
    """
    from qzoom.serving.batch import AnswerFile, BatchReader, grouped, index_input
    from qzoom.serving.batch_tables import finish_table, is_table, open_table

    console = out.console
    _check_output(source, output)
    name = public_name(model.model)
    about = _about(source, model, body.defaults(name))
    with open_table(source, output) as lines_path:
        lines = index_input(lines_path)
        reader = BatchReader(lines_path, body.defaults(name), (media or source.parent).resolve())
        working = output.with_name(f"{output.name}.jsonl") if is_table(output) else output
        with AnswerFile(working, about, fresh=fresh) as answers:
            missing = [line for line in lines if line.key not in answers.answered]
            console.note(f"batch   {len(lines)} questions, {len(lines) - len(missing)} answered before")
            if missing:
                with console.progress("answers", note_every_s=10) as (update,):
                    write = _counting(answers, update, len(lines))
                    _run(grouped(missing), reader, write, model, options)
            answers.finish(lines)
            failures = sum(_has_failed(record) for record in answers.records())
            if is_table(output):
                finish_table(answers, output)
    console.result(f"{len(lines) - failures} answers and {failures} errors in {output}")
    if failures:
        raise typer.Exit(1)


def _check_output(source: Path, output: Path) -> None:
    if output.suffix not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"{output} must end in .jsonl or .parquet.", param_hint="--output")
    if output.resolve() == source.resolve():
        raise typer.BadParameter("the output is the input; name another file.", param_hint="--output")


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


def _run(
    groups: Sequence[Sequence[BatchLine]],
    reader: BatchReader,
    write: Write,
    model: ModelOptions,
    options: BatchOptions,
) -> None:
    """Have all lines answered by the chosen engine."""
    from qzoom.serving.batch_run import answer_groups, answer_with_ray, local_client

    settings = _settings(reader.defaults["model"], options)
    open_service = functools.partial(
        native_service, dataclasses.replace(model, device=find_device(model.device)), settings
    )
    if options.server is None and options.engine == "ray":
        results = answer_with_ray(
            groups,
            reader,
            open_service,
            width=options.concurrency,
            actors=options.actors,
            address=options.ray_address,
        )
        for line, record in results:
            write(line, record)
        return

    async def ask() -> None:
        client = local_client(open_service()) if options.server is None else _remote(options.server, options.api_key)
        async with client as opened:
            await answer_groups(groups, reader, opened, write, width=options.concurrency)

    asyncio.run(ask())


def _settings(name: str, options: BatchOptions) -> ServerSettings:
    """Limits for the owner of the file: those of a request stay, waiting has none."""
    from qzoom.serving.settings import SchedulerLimits, ServerSettings

    scheduler = SchedulerLimits(slots=options.concurrency, queue=options.concurrency + 1)
    return ServerSettings(model_name=name, scheduler=scheduler, deadline_s=_FOREVER_S, heartbeat_s=_FOREVER_S)


def native_service(model: ModelOptions, settings: ServerSettings) -> Service:
    """The application's service with the native engine; loads the model."""
    from qzoom.serving.engines.native import NativeEngine
    from qzoom.serving.service import Service

    dtype = "float32" if model.dtype == "auto" and model.device == "cpu" else model.dtype
    return Service(NativeEngine(dataclasses.replace(model, dtype=dtype).load(), settings), settings)


def _remote(url: str, key: str | None) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=600)
    except (httpx.InvalidURL, TypeError) as error:
        raise typer.BadParameter(f"{url!r} is no address; write http://HOST:PORT.", param_hint="--server") from error


def _has_failed(record: dict[str, Any]) -> bool:
    return record["response"] is None or record["response"]["status_code"] != 200
