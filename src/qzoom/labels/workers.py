"""Fill a record store with the labels of a question set, in one process or in data-parallel workers.

Every worker loads the model, takes its share of the questions and writes its own file in the store. If one dies, the
others continue: finished questions stay in the store, and the same command resumes. If the command dies, its workers
end after the questions that they are working on; until then no other command may label into the folder.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qzoom.checkpoints.branches import zoom_identity
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import base_digest
from qzoom.data.questions import load_picture
from qzoom.engine.state import Engine
from qzoom.errors import DataError, HeadsMissingError, ImageError, LaterError, QZoomError, may_pass
from qzoom.images.load import LoadedImage
from qzoom.store.records import RecordWriter, StoreLock, note_pending, start_store
from qzoom.store.schema import Provenance, Question, Record, Skip, content_id

LabelRecords = list[tuple[Record, Mapping[str, np.ndarray]]]
Labeller = Callable[[Question], LabelRecords]
"""Makes all records of one question; a question that cannot be labelled gives a `Skip` record (LaterError: its picture
cannot be read now, so that it has none)."""
MakeLabeller = Callable[[Engine], Labeller]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model labels, so that every worker can load it."""

    name: str  # hub id, folder or "tiny"
    revision: str | None = None  # hub revision
    device: str = "cpu"  # "cpu", "cuda" or "cuda:1"; with "cuda" worker i takes device i
    dtype: str = "auto"  # "auto", "float32" or "bfloat16"
    quantization: str | None = None  # "4bit" or "8bit"

    def load(self, number: int = 0, *, zooms: bool = False) -> Engine:
        """The engine for worker `number` (HeadsMissingError: it has to zoom and has no region branch)."""
        device = self.device
        if device == "cuda":
            device = f"cuda:{number % max(1, torch.cuda.device_count())}"
        engine = load_engine(
            self.name, revision=self.revision, dtype=self.dtype, device_map=device, quantization=self.quantization
        )
        if zooms and engine.region is None:
            raise HeadsMissingError(f"{self.name} has no region branch, so it cannot zoom; name the model of stage 1.")
        return engine


@dataclass(frozen=True, slots=True)
class LabelRun:
    """Where and how a labelling command runs; none of it but the model decides a label."""

    model: ModelSpec  # which model
    folder: Path  # the store to fill; a rerun continues it
    images: str = ""  # folder of the pictures when they have moved; "" takes the records' own
    seed: int = 0  # noted in the provenance
    processes: int = 1  # number of workers
    fresh: bool = False  # discard the records in `folder`
    on_question: Callable[[int], None] = lambda _: None  # called with the number of questions done since the last call


def read_picture(question: Question, images: str) -> LoadedImage:
    """The picture of a question (LaterError: it is missing or cannot be read now, as on a disk that is not mounted;
    ImageError: it is there and cannot be used). `images`: as in `LabelRun`."""
    try:
        return load_picture(question, Path(images) if images else None)
    except ImageError as error:
        if may_pass(error) or not (Path(images or question.root) / question.image).is_file():
            raise LaterError(str(error)) from error
        raise
    except OSError as error:
        raise LaterError(
            f"The picture of question {question.name!r} cannot be opened ({error.strerror or error}); check its folder."
        ) from error


def turn_labeller(
    images: str, no_answer: str, label: Callable[[LoadedImage, Question, list[int]], Sequence[Record]]
) -> Labeller:
    """A labeller of the turns that have a known answer; a question without one, or with an error, is skipped.

    Args:
        images: folder of the pictures when they have moved; "" takes the records' own.
        no_answer: the reason of a question without any such turn.
        label: picture, question and indices of the turns to records.
    """

    def records_of(question: Question) -> LabelRecords:
        turns = [i for i, turn in enumerate(question.turns) if turn.answers]
        records: Sequence[Record] = [Skip(content_id(question), no_answer)]
        try:
            if turns:
                records = label(read_picture(question, images), question, turns)
        except LaterError:
            raise
        except QZoomError as error:
            records = [Skip(content_id(question), str(error))]
        return [(record, {}) for record in (question, *records)]

    return records_of


def sample_key(question: Question) -> str:
    """The key of a question's records in a store."""
    return f"{question.source}/{question.name}/{content_id(question)}"


def fill_store(
    run: LabelRun,
    engine: Engine,
    questions: Sequence[Question],
    make: MakeLabeller,
    *,
    lock: StoreLock,
    purpose: str,
    settings: Mapping[str, Any],
    sizes: Mapping[str, Any],
    prompt: str = "question",
    zooms: bool = False,
) -> list[str]:
    """Label all questions that the store of a run does not have yet.

    Args:
        make: gives each worker its labeller; picklable.
        lock: on the run's folder, for as long as the command and its workers run.
        settings: everything that decides the labels, as JSON values.
        sizes: visual tokens and the like, for the provenance.
        prompt: how questions are put, for the provenance.
        zooms: whether the region branch and its settings decide the labels, too.

    Returns:
        Why pictures could not be read, one sentence per question that was left for a later run for that reason.

    Raises:
        ConfigError: the folder's records were made in another way.
        DataError: a worker died or ended with an error, or the disk refuses.
    """
    open_store(run, engine, purpose=purpose, settings=settings, sizes=sizes, prompt=prompt, zooms=zooms)
    note_pending(run.folder, map(sample_key, questions))
    if run.processes == 1:
        return label_share(make(engine), questions, run.folder, on_question=lambda: run.on_question(1))
    return _run_workers(run, questions, make, lock)


def open_store(
    run: LabelRun,
    engine: Engine,
    *,
    purpose: str,
    settings: Mapping[str, Any],
    sizes: Mapping[str, Any],
    prompt: str = "question",
    zooms: bool = False,
) -> None:
    """Make the store of a run, or check that the one there was made in the same way; see `fill_store`."""
    provenance = Provenance(
        model=run.model.name,
        weights=base_digest(engine),
        revision=getattr(engine.backbone.model.config, "_commit_hash", None) or run.model.revision,
        prompt=prompt,
        seed=run.seed,
        sizes=dict(sizes),
    )
    added = {"zoom": zoom_identity(engine)} if zooms else {}
    start_store(run.folder, purpose, settings, provenance, added_later=added, fresh=run.fresh)


def label_share(
    labeller: Labeller,
    questions: Sequence[Question],
    folder: Path,
    number: int = 0,
    *,
    on_question: Callable[[], None] = lambda: None,
) -> list[str]:
    """Label the questions that a store does not have yet, as writer `number` of the store; returns as `fill_store`."""
    unread: list[str] = []
    with RecordWriter(folder, number) as writer:
        for question in questions:
            key = sample_key(question)
            if key not in writer.done:
                try:
                    writer.append(key, labeller(question))
                except LaterError as error:
                    unread.append(str(error))
            on_question()
    return unread


def _run_workers(run: LabelRun, questions: Sequence[Question], make: MakeLabeller, lock: StoreLock) -> list[str]:
    context = multiprocessing.get_context("spawn")
    messages: Queue[int | str | list[str]] = context.Queue()
    errors: list[str] = []
    unread: list[str] = []
    workers = [
        context.Process(
            target=_work,
            args=(make, run.model, list(questions[i :: run.processes]), run.folder, i, messages, lock),
            daemon=True,
        )
        for i in range(run.processes)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(timeout=0.2)
        _drain(messages, run.on_question, errors, unread)
    _drain(messages, run.on_question, errors, unread)
    if errors:
        raise DataError(errors[0])
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if codes:
        raise DataError(
            f"A labelling process ended with code {codes[0]}; finished questions are stored, run the command again."
        )
    return unread


def _drain(
    messages: Queue[int | str | list[str]], on_question: Callable[[int], None], errors: list[str], unread: list[str]
) -> None:
    """Read the workers' messages: counts of finished questions, error sentences, and what `label_share` returned."""
    count = 0
    while not messages.empty():
        message = messages.get()
        if isinstance(message, str):
            errors.append(message)
        elif isinstance(message, list):
            unread += message
        else:
            count += message
    if count:
        on_question(count)


def _work(make: MakeLabeller, spec: ModelSpec, questions: list[Question], *where: Any) -> None:
    """One worker: its store folder, its number, the queue of messages and the lock, which it holds, come last."""
    folder, number, messages, _ = where
    if spec.device == "cpu":
        torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def tell() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit("The labelling command has ended.")
        messages.put(1)

    try:
        messages.put(label_share(make(spec.load(number)), questions, folder, number, on_question=tell))
    except QZoomError as error:
        messages.put(str(error))
