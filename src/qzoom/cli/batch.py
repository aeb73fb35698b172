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
from qzoom.cli.engines import EngineOptions, parse_options
from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import Fresh, GateThreshold, ModelOptions, OutputOptions, RegionThreshold, Zoom
from qzoom.cli.serve import public_name
from qzoom.errors import ConfigError, DataError, listed
from qzoom.keys import check_key
from qzoom.serving.settings import SchedulerLimits, ServerSettings

if TYPE_CHECKING:
    from qzoom.serving.batch import AnswerFile, BatchLine, BatchReader
    from qzoom.serving.batch_run import Write
    from qzoom.serving.engines.base import ServingEngine
    from qzoom.serving.service import Service

_FOREVER_S = 86_400.0
_HERE = (
    *("revision", "device", "dtype", "quantization", "engine", "engine_url", "engine_option", "answer_url"),
    *("answer_model", "replicas", "ray_address", "actors"),
)
"""Options of a model that runs here; --server takes none of them."""


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
    ctx: typer.Context,
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
    from qzoom.serving.batch import AnswerFile, BatchReader, grouped, index_input
    from qzoom.serving.batch_tables import finish_table, is_table, open_table

    console = out.console
    _check_call(ctx, source, output, options)
    job = {"input": _digest_of(source)} | _who_answers(model, engine, options)
    with open_table(source, output) as lines_path:
        lines = index_input(lines_path)
        defaults = body.defaults(_model_name(ctx, model, options))
        if options.server is not None:
            job["model"] |= {"model": defaults["model"]}
        folder = source.parent.resolve()
        reader = BatchReader(lines_path.resolve(), defaults, folder, media.resolve() if media else folder)
        working = output.with_name(f"{output.name}.jsonl") if is_table(output) else output
        with AnswerFile(working, job | {"request": defaults}, fresh=fresh) as answers:
            missing = [line for line in lines if line.key not in answers.answered]
            console.note(f"batch   {len(lines)} questions, {len(lines) - len(missing)} answered before")
            if missing:
                with console.progress("answers", note_every_s=10) as (update,):
                    write = _counting(answers, update, len(lines))
                    start = functools.partial(engine.start, model)
                    _run(grouped(missing), reader, write, options, start=start, ray_address=engine.ray_address)
            answers.finish(lines)
            if is_table(output):
                finish_table(answers, output)
            _report(answers, output, len(lines), out)


def _report(answers: AnswerFile, output: Path, questions: int, out: OutputOptions) -> None:
    """Numbers of answers and errors; with errors the exit code is 1."""
    from qzoom.serving.batch import PASSING

    replies = (record["response"] for record in answers.records())
    statuses = Counter(reply and reply["status_code"] for reply in replies)
    errors, passing = statuses.total() - statuses[200], sum(statuses[status] for status in PASSING)
    if passing:
        out.console.note(f"{passing} of the errors may pass; the same command asks these lines again")
    if out.json:
        counts = {"questions": questions, "answers": questions - errors, "errors": errors, "passing": passing}
        out.console.record(counts | {"output": str(output)})
    else:
        out.console.result(f"{questions - errors} answers and {errors} errors in {output}")
    if errors:
        raise typer.Exit(1)


def _check_call(ctx: typer.Context, source: Path, output: Path, options: BatchOptions) -> None:
    """The output can be written beside the input, and no option is there in vain."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"{output} must end in .jsonl or .parquet.", param_hint="--output")
    if output.resolve() == source.resolve():
        raise typer.BadParameter("the output is the input; name another file.", param_hint="--output")
    for name in _HERE if options.server is not None else ():
        if _source_of(ctx, name) == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("the server of --server answers; leave one of them out.", param_hint=flag)


def _source_of(ctx: typer.Context, name: str) -> str:
    """Where an option's value is from: COMMANDLINE, ENVIRONMENT or DEFAULT."""
    found = ctx.get_parameter_source(name)
    return found.name if found is not None else "DEFAULT"


def _digest_of(source: Path) -> str:
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}); give a JSONL or Parquet file.") from error


def _who_answers(model: ModelOptions, engine: EngineOptions, options: BatchOptions) -> dict[str, Any]:
    """What decides the answers besides input and requests: the model, and what runs it. Addresses of servers do not
    decide, as long as they have the same model."""
    from qzoom.checkpoints.hub import EMBEDDED

    if options.server is not None:
        return {"model": {"revision": None, "dtype": "auto"}, "engine": {"name": "server"}}
    folder = Path(model.model)
    is_folder = model.model != EMBEDDED and folder.is_dir()
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()) if is_folder else []
    which = {"model": model.model, "revision": model.revision, "dtype": model.dtype}
    which |= {"files": hashlib.sha256(repr(files).encode()).hexdigest()[:16]} if files else {}
    by = {"name": engine.name, "options": parse_options(engine.engine_option), "quantization": model.quantization}
    by |= {"answer_url": engine.answer_url, "answer_model": engine.answer_model}
    return {"model": which, "engine": by}


def _model_name(ctx: typer.Context, model: ModelOptions, options: BatchOptions) -> str:
    """The model that requests name: the one here, or that of --server."""
    name = public_name(model.model)
    if options.server is None:
        return name
    from qzoom.serving.batch_run import served_models

    async def ask() -> list[str]:
        async with _remote(options.server, options.api_key) as client:
            return await served_models(client)

    names = asyncio.run(ask())
    if _source_of(ctx, "model") != "DEFAULT":
        if names and name not in names:
            text = f"{options.server} has {listed(names)} and not {name!r}; leave --model (QZOOM_MODEL) out, or name"
            raise typer.BadParameter(f"{text} one that it has.", param_hint="--model")
        return name
    if len(names) != 1:
        text = f"{options.server} " + (f"has {listed(names)}" if names else "does not list its models")
        raise typer.BadParameter(f"{text}; name the one to ask.", param_hint="--model")
    return names[0]


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
        if key:
            check_key(key, "the key")
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--api-key") from error
    try:
        return httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=600)
    except (httpx.InvalidURL, TypeError) as error:
        raise typer.BadParameter(f"{url!r} is no address; write http://HOST:PORT.", param_hint="--server") from error
