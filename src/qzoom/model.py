"""The library in one class: load a model, ask about pictures, see what it zoomed into."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qzoom.config import ZoomConfig
from qzoom.engine.batch import answer_all, answer_events, raise_error
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import perceive
from qzoom.engine.request import Limit, Options, Request, check_heads, check_requests, make_options, make_request
from qzoom.engine.session import Session, open_session
from qzoom.engine.state import Engine
from qzoom.engine.worker import Worker
from qzoom.errors import ConfigError, QuestionError, QZoomError
from qzoom.images.load import ImageLimits, LoadedImage, load_groups, load_pictures, pixel_digest
from qzoom.settings import closest
from qzoom.types import Answer, Perception, StreamEvent


class QZoom:
    """A vision-language model that zooms. One instance may be used from several threads.

    Args:
        name: what it was loaded from.
        image_limits: what pictures are accepted.
    """

    def __init__(self, engine: Engine, name: str = "", image_limits: ImageLimits | None = None) -> None:
        self.engine = engine
        self.name = name
        self.image_limits = image_limits or ImageLimits()
        self.chat = ChatEncoder(engine.backbone)
        """Renders and tokenises conversations."""

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path = "tiny",
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
        attn_implementation: str = "sdpa",
        config: ZoomConfig | None = None,
        quantization: Any = None,
        image_limits: ImageLimits | None = None,
        **unknown: Any,
    ) -> QZoom:
        """Load the embedded model ("tiny"), a qzoom adapter, a released Q-Zoom checkpoint or a plain base model.

        Args:
            id_or_path: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            dtype: "auto", "float32", "bfloat16", "float16" (CUDA) or a torch dtype; `torch_dtype` is taken as another
                name. "auto" is what is stored; on CPUs float32 for float16, and for bfloat16 on x86 without AVX-512 if
                the model takes at most 4 GB so.
            device_map: "cpu", "cuda", "cuda:0", or "auto"; one device only.
            attn_implementation: "sdpa" or "eager"; "flash_attention_2" or "flash_attention_3" on CUDA, for the vision
                encoder.
            config: overrides the checkpoint's own arithmetic.
            quantization: "4bit" or "8bit" (bitsandbytes) or a quantization config of transformers, for the base; gate
                and region branch stay in `dtype`.
            image_limits: what pictures are accepted; None takes the defaults of `ImageLimits`.
            **unknown: anything else is refused with the closest known name.

        Raises:
            ConfigError: an unknown option.
            CheckpointError: it cannot be found, read, or matched to its base.
            DeviceError: a placement that is not supported.
        """
        from qzoom.checkpoints.load import load_engine

        if "torch_dtype" in unknown:
            other = unknown.pop("torch_dtype")
            if dtype not in ("auto", other):
                raise ConfigError(f"dtype={dtype!r} and torch_dtype={other!r} name the same option; give one of them.")
            dtype = other
        _refuse_options(cls.from_pretrained, unknown)
        engine = load_engine(
            id_or_path,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            config=config,
            quantization=quantization,
        )
        return cls(engine, str(id_or_path), image_limits)

    @property
    def config(self) -> ZoomConfig:
        """The checkpoint's arithmetic."""
        return self.engine.config

    @property
    def has_gate(self) -> bool:
        """Whether "auto" can decide, by a gate or by what takes its place; otherwise it always zooms."""
        return self.engine.gate is not None or (self.has_region and self.engine.config.decide_by != "gate")

    @property
    def has_region(self) -> bool:
        """Whether it can zoom at all."""
        return self.engine.region is not None

    def ask(
        self,
        image: Any,
        question: str | Sequence[dict[str, Any]],
        *,
        on_text: Callable[[str], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one question.

        Args:
            image: a path, web address, bytes, file object, data URL, array, tensor or PIL picture, or a list of them;
                None if the messages carry their pictures. Of a PDF all pages are pictures of the question.
            question: a text, or chat messages in transformers' format.
            on_text: called with each new piece of the answer.
            cancel: asked between steps; True ends the answer.
            **options: zoom ("auto", "never", "always"), max_new_tokens, temperature, top_p, top_k, stop, seed,
                ignore_eos, presence_penalty, frequency_penalty, logprobs (how many of the likeliest tokens to name),
                json_schema (a JSON schema, which the answer then follows), gate_threshold, region_threshold,
                coarse_tokens and region_tokens (a maximum, a (min, max) tuple or a `TokenBudget`), system (a system
                turn to put first), and pages (of PDFs, such as "1-5,9").

        Raises:
            ImageError, QuestionError, BudgetError, ConfigError, HeadsMissingError: one clear sentence each.
        """
        answer = None
        for _, event in answer_events(self.engine, self.request(image, question, **options), cancel):
            raise_error(event)
            if on_text is not None and event.kind == "text":
                on_text(event.text)
            answer = event.answer or answer
        assert answer is not None
        return answer

    def stream(
        self,
        image: Any,
        question: str | Sequence[dict[str, Any]],
        *,
        cancel: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """The same as events: "perception" first, then "text" pieces, then "answer". Arguments as in `ask`."""
        request = self.request(image, question, **options)
        return (raise_error(event) for _, event in answer_events(self.engine, request, cancel))

    async def ask_async(self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any) -> Answer:
        """`ask` for notebooks and web apps: a thread of the model's own works, one question after the other.

        A task that is cancelled ends its answer before the next token, or before it begins. Arguments and errors as in
        `ask`, without `on_text` and `cancel`.
        """
        answer = None
        async for event in self.stream_async(image, question, **options):
            answer = event.answer or answer
        assert answer is not None
        return answer

    def stream_async(
        self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """`stream` as an asynchronous iterator; leaving it early (`aclose`, or a cancelled task) ends the answer."""
        return self._worker.events(lambda cancel: self.stream(image, question, cancel=cancel, **options))

    @cached_property
    def _worker(self) -> Worker:
        return Worker()

    def ask_batch(
        self,
        samples: Sequence[tuple[Any, str | Sequence[dict[str, Any]]]],
        *,
        memory_mib: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer many questions. In float32 the answers equal those of `ask`; see `session` for other formats.

        Questions run in chunks that fit into memory. A picture that several of them are about is decoded, encoded and
        read by the shared layers once, which `usage.reused_tokens` shows. Answers hold their pictures, for drawing:
        each different one takes four bytes a pixel for as long as its answer is kept.

        Args:
            samples: (image, question) pairs of any sizes.
            memory_mib: MiB that the questions running together may take beside the model (an estimate); None takes
                half of what is free on a GPU, and half of the weights' size on a CPU, at least 256.
            **options: as in `ask`, for all of them. A list holds one value per sample, except `stop`, whose list is the
                stop texts of every sample; a (min, max) tuple of tokens is one value.

        Raises:
            QuestionError: a sample that is no (image, question) pair.
            ConfigError: a list that is not as long as the samples; otherwise as in `ask`, with the sample's number.
        """
        if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
            raise QuestionError(f"ask_batch needs a list of (image, question) pairs, not {type(samples).__name__}.")
        if memory_mib is not None and (type(memory_mib) is not int or memory_mib < 1):
            raise ConfigError(f"memory_mib must be a whole number of at least 1, not {memory_mib!r}.")
        load = _loading_once()
        requests = []
        each = [_options_of(options, index, len(samples)) for index in range(len(samples))]
        for index, own in enumerate(each):
            with _numbered(index):
                sample = samples[index]
                if isinstance(sample, str | bytes) or not isinstance(sample, Sequence) or len(sample) != 2:
                    raise QuestionError(f"expected an (image, question) pair, not {_shown(sample)}.")
                image, question = sample
                requests.append(self._request(image, question, load, **own))
                check_requests(self.engine, requests[-1:])
        answers: dict[int, Answer] = {}
        for index, answer in answer_all(self.engine, requests, memory_mib and memory_mib * 2**20):
            if not isinstance(answer, Answer):
                with _numbered(index):
                    raise answer
            answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def perceive(self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any) -> Perception:
        """Gate and regions only, without an answer; arguments as in `ask`.

        Raises:
            HeadsMissingError: the checkpoint has no region branch.
        """
        check_heads(self.engine, "always")
        return perceive(self.engine, [self.request(image, question, **options)])[0]

    def request(self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any) -> Request:
        """Decode the pictures and tokenise the question; arguments and errors as in `ask`."""
        return self._request(image, question, load_groups, **options)

    def _request(self, image: Any, question: Any, load: Callable[..., Any], **options: Any) -> Request:
        system, pages = options.pop("system", None), options.pop("pages", None) or ""
        settled = self.make_options(**options)
        check_heads(self.engine, settled.zoom)
        limits = self.image_limits
        return make_request(self.chat, image, question, settled, system=system, limits=limits, pages=pages, load=load)

    def session(
        self, image: Any, *, system: str | None = None, coarse_tokens: Limit = None, pages: str = ""
    ) -> Session:
        """Encode and prefill pictures once, for many questions.

        In float32 its answers equal those of `ask`; in bfloat16 and float16 they may differ, since products of other
        shapes round differently.

        Args:
            image: as in `ask`.
            system: a system turn.
            coarse_tokens: visual tokens of the coarse pass, per picture; the pages of PDFs share those of one picture.
            pages: as in `ask`.
        """
        pictures = load_pictures(image, self.image_limits, pages)
        options = self.make_options(coarse_tokens=coarse_tokens)
        return open_session(self.engine, self.chat, pictures, system=system, options=options)

    def make_options(self, **options: Any) -> Options:
        """Validated options of one question, from keyword arguments as in `ask`.

        Raises:
            ConfigError: an unknown option (with the closest known one) or a bad value.
        """
        return make_options(self.engine, **options)

    def save_pretrained(self, path: str | Path, **options: Any) -> Path:
        """Write the adapter (`qzoom_config.json`, `qzoom.safetensors`); options and errors as in
        `checkpoints.adapter.save_pretrained` (ConfigError: an unknown one)."""
        from qzoom.checkpoints.adapter import save_pretrained

        _refuse_options(save_pretrained, options)
        return save_pretrained(self.engine, Path(path), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload to the hub; options and errors as in `checkpoints.adapter.push_to_hub` (ConfigError: an
        unknown one)."""
        from qzoom.checkpoints.adapter import push_to_hub

        _refuse_options(push_to_hub, options)
        return push_to_hub(self.engine, repo_id, **options)


def _refuse_options(call: Callable[..., Any], options: Iterable[str]) -> None:
    """Refuse what a function has no keyword for, with the closest one (ConfigError)."""
    known = [name for name, one in inspect.signature(call).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ConfigError(f"{call.__name__} has no option {name!r}; {closest(name, known)}")


@contextmanager
def _numbered(index: int) -> Iterator[None]:
    """Errors of a block name the sample."""
    try:
        yield
    except QZoomError as error:
        error.args = (f"Sample {index + 1}: {error}",)
        raise


def _loading_once() -> Callable[[Sequence[Any], ImageLimits, str], list[tuple[LoadedImage, ...]]]:
    """`load_groups` for a batch: a source is read once, and equal pictures are one in memory."""
    read: dict[Any, tuple[Any, tuple[LoadedImage, ...]]] = {}  # with the source, so that its id stays its own
    different: dict[Any, LoadedImage] = {}

    def one(picture: LoadedImage) -> LoadedImage:
        picture = dataclasses.replace(picture, digest=picture.digest or pixel_digest(picture.image))
        facts = (picture.digest, picture.size_px, picture.format, picture.notes, picture.page)
        return different.setdefault(facts, picture)

    def load(sources: Sequence[Any], limits: ImageLimits, pages: str) -> list[tuple[LoadedImage, ...]]:
        if pages:
            return [tuple(map(one, group)) for group in load_groups(sources, limits, pages)]
        keys = [source if isinstance(source, str) else id(source) for source in sources]
        for key, source in zip(keys, sources, strict=True):
            if key not in read:
                read[key] = (source, tuple(map(one, load_groups([source], limits)[0])))
        return [read[key][1] for key in keys]

    return load


def _options_of(options: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """One sample's options; lists give one value each (stop texts excepted)."""
    out = {}
    for name, value in options.items():
        per_sample = isinstance(value, list) and name != "stop"
        if per_sample and len(value) != count:
            hint = "; write a (min, max) pair as a tuple" if name.endswith("_tokens") else ""
            raise ConfigError(f"{name} is a list of {len(value)} values for {count} samples; give one each{hint}.")
        out[name] = value[index] if per_sample else value
    return out


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
