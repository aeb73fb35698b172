"""vLLM in this process (`AsyncLLM`), with qzoom's plug-in; its engine core and workers are processes of their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from qzoom.errors import ConfigError, EngineDownError
from qzoom.integrations.vllm.heads import LookMode
from qzoom.model import QZoom
from qzoom.serving.engines.zooming import Piece, View, ZoomingEngine, cache_salt, checked_reply, lower_max_positions
from qzoom.serving.settings import SchedulerLimits

_log = logging.getLogger("qzoom.serving")


class VllmEngine(ZoomingEngine):
    """Looks and answers by vLLM, which is started again when it ends.

    Args:
        model: tokenizer, arithmetic and limits of the same checkpoint.
        arguments: of `vllm.AsyncEngineArgs`, from `integrations.vllm.arguments.engine_arguments`.

    Raises:
        ConfigError: vLLM is not installed, or does not start.
    """

    def __init__(self, model: QZoom, limits: SchedulerLimits, arguments: dict[str, Any]) -> None:
        super().__init__(model, limits)
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output has the address alone
        try:
            from vllm import AsyncEngineArgs
            from vllm.config import KVTransferConfig
        except ImportError as error:
            raise ConfigError(
                f"The engine vllm needs vLLM ({error}); install it with: pip install 'qzoom[vllm]'."
            ) from error
        transfer = KVTransferConfig(**arguments["kv_transfer_config"])
        try:
            self._arguments = AsyncEngineArgs(**arguments | {"kv_transfer_config": transfer})
        except TypeError as error:
            raise ConfigError(f"vLLM does not know an option ({error}); see --engine-option.") from error
        self._llm = self._open()
        self._opening: asyncio.Task[None] | None = None
        lower_max_positions(model, self._llm.vllm_config.model_config.max_model_len)
        self._numbers = itertools.count()

    def _open(self) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            return AsyncLLM.from_engine_args(self._arguments)
        except Exception as error:
            reason = " ".join(str(error).split())[:300].rstrip(". ")
            raise ConfigError(f"vLLM did not start: {reason}; its messages above say more.") from error

    async def _open_again(self) -> None:
        """Replace a vLLM that has ended; until then requests are told so."""
        _log.error("vLLM has ended and is started again")
        try:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = await asyncio.to_thread(self._open)
        except ConfigError:
            _log.exception("vLLM was not started again; the next request tries it once more")
        finally:
            self._opening = None

    async def close(self) -> None:
        """End vLLM's processes."""
        await super().close()
        if self._opening is not None:
            await self._opening
        self._llm.shutdown()

    async def health(self) -> str:
        """See `ServingEngine.health`."""
        if not self._llm.errored:
            return ""
        self._opening = self._opening or asyncio.create_task(self._open_again())
        return "engine ended"

    async def send_look(self, view: View, mode: LookMode) -> tuple[dict[str, Any], Piece | None]:
        """See `ZoomingEngine.send_look`."""
        params = {"kv_transfer_params": {"qzoom": self.look_params(view, mode)}}
        reply = first = None
        async with aclosing(self._generate(view, self.sampling(view, 1) | {"extra_args": params})) as outs:
            async for out in outs:
                reply = (out.kv_transfer_params or {}).get("qzoom")
                first = Piece(tuple(out.outputs[0].token_ids), cached_tokens=out.num_cached_tokens or 0)
        return checked_reply(reply), first

    async def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
        """See `ZoomingEngine.send_answer`."""
        async with aclosing(self._generate(view, self.sampling(view))) as outs:
            async for out in outs:
                (only,) = out.outputs
                finish = only.finish_reason or ""
                yield Piece(tuple(only.token_ids), finish=finish, cached_tokens=out.num_cached_tokens or 0)

    async def _generate(self, view: View, sampling: dict[str, Any]) -> AsyncGenerator[Any, None]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt: dict[str, Any] = {"prompt_token_ids": [*view.ids, *view.begun]}
        if view.images:
            prompt["multi_modal_data"] = {"image": view.images}
        if view.tenant:
            prompt["cache_salt"] = cache_salt(view.tenant)
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling)
        try:
            async with aclosing(self._llm.generate(prompt, params, f"qzoom-{next(self._numbers)}")) as outs:
                async for out in outs:
                    yield out
        except EngineDeadError as error:
            await self.health()
            raise EngineDownError("The engine behind this server has ended; ask again when it is back.") from error
