"""The library in one class: load a model, ask about pictures, see what it zoomed into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.config import ZoomConfig
from qzoom.engine.batch import answer_events, events
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import perceive
from qzoom.engine.request import Limit, Options, Request, check_heads, make_options, make_request
from qzoom.engine.session import Session, open_session
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, QuestionError, QZoomError
from qzoom.images.load import ImageLimits, load_pictures
from qzoom.types import Answer, Perception, StreamEvent

if TYPE_CHECKING:
    import torch


class QZoom:
    """A vision-language model that zooms. One instance may be used from several threads.

    Args:
        engine: backbone, branches and arithmetic; `from_pretrained` makes one.
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
        **unknown: Any,
    ) -> QZoom:
        """Load the embedded model ("tiny"), a qzoom adapter, a released Q-Zoom checkpoint or a plain base model.

        Args:
            id_or_path: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            dtype: "auto" (as stored), "float32", "bfloat16" or a torch dtype.
            device_map: "cpu", "cuda", "cuda:0", or "auto"; one device only.
            attn_implementation: "sdpa" or "eager".
            config: overrides the checkpoint's own arithmetic.
            quantization: "4bit" or "8bit" (bitsandbytes) or a quantization config of transformers, for the base; gate
                and region branch stay in `dtype`.
            **unknown: anything else is refused with the closest known name.

        Raises:
            ConfigError: an unknown option.
            CheckpointError: it cannot be found, read, or matched to its base.
            DeviceError: a placement that is not supported.
        """
        from qzoom.checkpoints.load import load_engine

        for name in unknown:
            raise ConfigError(f"from_pretrained has no option {name!r}; {_closest_option(name)}")
        engine = load_engine(
            id_or_path,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            config=config,
            quantization=quantization,
        )
        return cls(engine, str(id_or_path))

    @property
    def config(self) -> ZoomConfig:
        """The checkpoint's arithmetic."""
        return self.engine.config

    @property
    def has_gate(self) -> bool:
        """Whether "auto" can decide; without a gate it always zooms."""
        return self.engine.gate is not None

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
                ignore_eos, gate_threshold, region_threshold, coarse_tokens and region_tokens (a maximum, a (min, max)
                tuple or a `TokenBudget`), system (a system turn to put first), and pages (of PDFs, such as "1-5,9").

        Raises:
            ImageError, QuestionError, BudgetError, ConfigError, HeadsMissingError: one clear sentence each.
        """
        answer = None
        for _, event in answer_events(self.engine, self.request(image, question, **options), cancel):
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
        return (event for _, event in answer_events(self.engine, request, cancel))

    def ask_batch(self, samples: Sequence[tuple[Any, str | Sequence[dict[str, Any]]]], **options: Any) -> list[Answer]:
        """Answer many questions as one batch; every answer equals the one that `ask` gives.

        Args:
            samples: (image, question) pairs of any sizes.
            **options: as in `ask`, for all of them. A list holds one value per sample, except `stop`, whose list is the
                stop texts of every sample; a (min, max) tuple of tokens is one value.

        Raises:
            QuestionError: a sample that is no (image, question) pair.
            ConfigError: a list that is not as long as the samples; otherwise as in `ask`, with the sample's number.
        """
        if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
            raise QuestionError(f"ask_batch needs a list of (image, question) pairs, not {type(samples).__name__}.")
        requests = [self._batch_request(samples, i, options) for i in range(len(samples))]
        answers: dict[int, Answer] = {}
        if requests:
            for i, event in events(self.engine, requests):
                if event.answer is not None:
                    answers[i] = event.answer
        return [answers[i] for i in range(len(requests))]

    def _batch_request(self, samples: Sequence[Any], index: int, options: dict[str, Any]) -> Request:
        sample = samples[index]
        own = _options_of(options, index, len(samples))
        if isinstance(sample, str | bytes) or not isinstance(sample, Sequence) or len(sample) != 2:
            raise QuestionError(f"Sample {index + 1}: expected an (image, question) pair, not {_shown(sample)}.")
        try:
            return self.request(sample[0], sample[1], **own)
        except QZoomError as error:
            raise type(error)(f"Sample {index + 1}: {error}") from error

    def perceive(self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any) -> Perception:
        """Gate and regions only, without an answer; arguments as in `ask`.

        Raises:
            HeadsMissingError: the checkpoint has no region branch.
        """
        check_heads(self.engine, "auto")
        return perceive(self.engine, [self.request(image, question, **options)])[0]

    def request(self, image: Any, question: str | Sequence[dict[str, Any]], **options: Any) -> Request:
        """Decode the pictures and tokenise the question; arguments and errors as in `ask`."""
        system, pages = options.pop("system", None), options.pop("pages", None) or ""
        settled = self.make_options(**options)
        check_heads(self.engine, settled.zoom)
        return make_request(self.chat, image, question, settled, system=system, limits=self.image_limits, pages=pages)

    def session(
        self, image: Any, *, system: str | None = None, coarse_tokens: Limit = None, pages: str = ""
    ) -> Session:
        """Encode and prefill pictures once, for many questions.

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
        """Write the adapter (`qzoom_config.json`, `qzoom.safetensors`); see `checkpoints.adapter.save_pretrained`."""
        from qzoom.checkpoints.adapter import save_pretrained

        return save_pretrained(self.engine, Path(path), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload to the hub; options as in `huggingface_hub.HfApi.upload_folder`."""
        from qzoom.checkpoints.adapter import push_to_hub

        return push_to_hub(self.engine, repo_id, **options)


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


def _closest_option(name: str) -> str:
    """The end of the sentence about an unknown option of `from_pretrained`."""
    from qzoom.settings import closest

    return closest(name, ("revision", "dtype", "device_map", "attn_implementation", "config", "quantization"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
