"""A qzoom model as lmms-eval's harness drives it: chat messages in, answers and token counts out.

The harness makes the prompts and scores the answers; qzoom only answers, with the same engine and the same
token limits as `qzoom eval`.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

import torch
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger

from qzoom.engine.request import share_tokens
from qzoom.errors import ConfigError, QZoomError
from qzoom.integrations.lmms_eval import decoding
from qzoom.model import QZoom
from qzoom.settings import closest
from qzoom.types import Answer

_ARGUMENTS = (
    *("pretrained", "zoom", "max_visual_tokens", "coarse_tokens", "region_tokens", "gate_threshold"),
    *("region_threshold", "max_new_tokens", "batch_size", "device", "dtype", "revision"),
)


class QZoomChat(lmms):
    """The model `qzoom` of lmms-eval; arguments are those of `--model_args`.

    They mean what they mean in `QZoom.from_pretrained` and `QZoom.ask`.

    Args:
        max_visual_tokens: most visual tokens of a question, shared as `qzoom eval` shares them.
        max_new_tokens: most tokens of an answer; None for the task's, else 128.
        **others: what the harness adds without a value; anything else is refused.

    Raises:
        ConfigError: an unknown argument or a bad value.
        QZoomError: the model cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        zoom: Any = "auto",
        max_visual_tokens: int | None = None,
        coarse_tokens: int | None = None,
        region_tokens: int | None = None,
        gate_threshold: float | None = None,
        region_threshold: float | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(others)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.qzoom = QZoom.from_pretrained(str(pretrained), revision=revision, dtype=dtype, device_map=device or "auto")
        coarse, region = share_tokens(
            zoom,
            self.qzoom.config,
            self.qzoom.engine.backbone.default_budget(),
            coarse=coarse_tokens,
            region=region_tokens,
            total=max_visual_tokens,
        )
        self.options: dict[str, Any] = {
            "zoom": zoom,
            "coarse_tokens": coarse,
            "region_tokens": region,
            "gate_threshold": gate_threshold,
            "region_threshold": region_threshold,
        }
        self.qzoom.make_options(**self.options)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer every request, in order; one that cannot be asked is logged and gets the empty answer."""
        ordered = utils.Collator(
            [request.args for request in requests],
            lambda args: (0, args[0]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results: list[GenerationResult] = []
        start = time.perf_counter()
        for chunk in ordered.get_batched(n=self.batch_size, batch_fn=None):
            for args, result in zip(chunk, self._answer(list(chunk)), strict=True):
                self.cache_hook.add_partial("generate_until", (args[0], args[2]), result.text)
                results.append(result)
        seconds = time.perf_counter() - start
        tokens = sum((result.token_counts.output_tokens or 0) if result.token_counts else 0 for result in results)
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"rank": self.rank},
        )
        return ordered.get_original(results)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered (NotImplementedError: always)."""
        raise NotImplementedError("qzoom answers questions; it does not rate given answers.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered (NotImplementedError: always)."""
        raise NotImplementedError("qzoom answers one question at a time; tasks with several rounds are not supported.")

    def _answer(self, chunk: list[Any]) -> list[GenerationResult]:
        """One batch; where it fails, its requests are asked one by one to find the one that cannot be."""
        options = self.options | decoding(chunk[0][2], self.max_new_tokens)
        if "temperature" in options:  # drawn answers follow the harness's seed, each question with one of its own
            options["seed"] = [(torch.initial_seed() + zlib.crc32(repr(args[3:]).encode())) % 2**63 for args in chunk]
        try:
            samples = [(None, self._messages(args)) for args in chunk]
            return [_result(answer) for answer in self.qzoom.ask_batch(samples, **options)]
        except Exception as problem:  # whatever it is, also the task's own when it opens a picture, it must be counted
            if len(chunk) == 1:
                reason = problem if isinstance(problem, QZoomError) else f"{type(problem).__name__}: {problem}"
                logger.error(f"Question {chunk[0][3]} of {chunk[0][4]} cannot be asked and counts as wrong: {reason}")
                return [GenerationResult("", TokenCounts(output_tokens=0))]
            return [result for args in chunk for result in self._answer([args])]

    def _messages(self, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return messages.to_hf_messages()


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens)
    return GenerationResult(answer.text, counts)


def _refuse_unknown(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name == "max_batch_size" or value is None:
            continue
        raise ConfigError(f"model_args: unknown argument {name!r}; {closest(name, _ARGUMENTS)}")
