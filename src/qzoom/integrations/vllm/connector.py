"""A KV connector that moves no keys: it reads the hidden states of a finished prompt and runs gate and region branch.

A look is a request with `max_tokens=1` and `kv_transfer_params={"qzoom": {"grids": ..., "mode": ...}}` (see
`heads.LookParams`); its response carries `kv_transfer_params["qzoom"]`. vLLM makes one connector for the scheduler and
one for every worker. In the step that ends a prompt the scheduler's side sends a job with the prompt's blocks, and the
worker's side fills a result that the scheduler's side has already handed out, so the reply comes with the very step.
An exception in a connector ends the whole engine; whatever fails here becomes the reply of its own request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import extract_from_kv_cache
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from qzoom import __version__
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import checkpoint_identity
from qzoom.errors import ConfigError
from qzoom.integrations.vllm.heads import Look, LookParams, read_params
from qzoom.integrations.vllm.models import StatesLayer


@dataclass(slots=True)
class LookJob:
    """One prompt whose states are complete after this step."""

    request_id: str  # vLLM's
    block_ids: list[int]  # where its states are
    token_ids: list[int]  # its prompt
    params: LookParams  # what is wanted
    pictures: tuple[str, ...]  # the salt of its cache and vLLM's names of its pictures


@dataclass
class LookJobs(KVConnectorMetadata):
    """What the scheduler's side sends with a step."""

    jobs: list[LookJob] = field(default_factory=list)


@dataclass
class LookResults(KVConnectorWorkerMetadata):
    """What the worker's side sends back, by request id."""

    replies: dict[str, dict[str, Any]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join what the ranks found; only the first has anything."""
        assert isinstance(other, LookResults)
        self.replies.update(other.replies)
        return self


@dataclass(slots=True)
class _Pending:
    """A look that waits for the end of its prompt: its blocks so far, and the reply to be filled."""

    request: Any
    params: LookParams
    reply: dict[str, Any]
    block_ids: list[int] = field(default_factory=list)


class QZoomConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides; see the module's text."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        own = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
        self._group = own[0] if own else 0
        cache = groups[self._group].kv_cache_spec if groups else vllm_config.cache_config
        self._block_size = int(cache.block_size)
        self._pending: dict[str, _Pending] = {}
        self._replies: dict[str, dict[str, Any]] = {}  # to hand out when the request ends
        self._unfilled: dict[str, dict[str, Any]] = {}  # of jobs that were sent
        self._layer: StatesLayer | None = None
        self._results = LookResults()
        self._identity: dict[str, str] = {}
        if role == KVConnectorRole.SCHEDULER:
            model = vllm_config.model_config
            base, checkpoint = find_source(model.model, model.revision), find_source(model.hf_config.qzoom_checkpoint)
            self._identity = {"version": __version__, **checkpoint_identity(checkpoint, base)}

    # -- scheduler ---------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Note a look."""
        values = (request.kv_transfer_params or {}).get("qzoom")
        if values is None:
            return
        reply: dict[str, Any] = {"engine": self._identity}
        self._replies[request.request_id] = reply
        if values == {}:
            return  # it only asks who is there
        try:
            self._pending[request.request_id] = _Pending(request, read_params(values), reply)
        except ConfigError as error:
            reply["error"] = str(error)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Follow the blocks of looks; those whose prompt ends with this step become jobs."""
        meta = LookJobs()
        if not self._pending:
            return meta
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._pending:
                computed[new.req_id] = new.num_computed_tokens
                self._pending[new.req_id].block_ids = list(new.block_ids[self._group])
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in self._pending:
                computed[request_id] = cached.num_computed_tokens[i]
                if request_id in cached.resumed_req_ids:  # it was preempted and begins again
                    self._pending[request_id].block_ids = []
                more = cached.new_block_ids[i]
                self._pending[request_id].block_ids += more[self._group] if more else []
        for request_id, past in computed.items():
            request = self._pending[request_id].request
            if past + scheduler_output.num_scheduled_tokens[request_id] >= request.num_prompt_tokens:
                look = self._pending.pop(request_id)
                self._unfilled[request_id] = look.reply
                tokens = list(request.prompt_token_ids)
                pictures = (request.cache_salt or "", *(each.identifier for each in request.mm_features))
                meta.jobs.append(LookJob(request_id, look.block_ids, tokens, look.params, pictures))
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Hand out the reply, which `update_connector_output` fills later in the same update; forget aborted looks."""
        self._pending.pop(request.request_id, None)
        reply = self._replies.pop(request.request_id, None)
        return False, None if reply is None else {"qzoom": reply}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        return self.request_finished(request, [])

    def update_connector_output(self, connector_output: Any) -> None:
        """Fill the replies of this step."""
        results = connector_output.kv_connector_worker_meta
        for request_id, values in (results.replies if results else {}).items():
            self._unfilled.pop(request_id, {}).update(values)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded from anywhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded from anywhere."""

    # -- worker ------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the layer that keeps the states."""
        layers = get_layers_from_vllm_config(self._vllm_config, StatesLayer, list(kv_caches))
        if len(layers) != 1:
            raise ConfigError(
                "The model keeps no states for qzoom; start the engine with what `qzoom vllm-args` prints."
            )
        if get_tensor_model_parallel_rank() == 0:  # every rank has the states, one runs the branches
            (self._layer,) = layers.values()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin a step."""
        super().bind_connector_metadata(connector_metadata)
        self._results = LookResults()

    def wait_for_save(self) -> None:
        """Run the branches for the prompts that ended; the states of this step are in the cache by now."""
        metadata = self._get_connector_metadata()
        if self._layer is None or not isinstance(metadata, LookJobs) or not metadata.jobs:
            return
        started = time.perf_counter()
        try:
            assert self._layer.heads is not None
            looks = [
                Look(self._states(self._layer, job), job.token_ids, job.params, job.pictures) for job in metadata.jobs
            ]
            replies = self._layer.heads.run(looks)
        except Exception as error:
            replies = [{"error": f"The look failed ({type(error).__name__}: {error})."} for _ in metadata.jobs]
        heads_ms = (time.perf_counter() - started) * 1000
        for job, reply in zip(metadata.jobs, replies, strict=True):
            self._results.replies[job.request_id] = reply | {"heads_ms": heads_ms}

    def _states(self, layer: StatesLayer, job: LookJob) -> torch.Tensor:
        """Hidden states (tokens, hidden) of a whole prompt."""
        count, size = len(job.token_ids), self._block_size
        index = torch.arange(count)
        slots = torch.tensor(job.block_ids)[index // size] * size + index % size
        return extract_from_kv_cache(layer.kv_cache, slots.to(layer.kv_cache.device), count)[:, 0]

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata:
        """The step's results; some runners ask before they are filled and send the object afterwards."""
        return self._results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Nothing is under way when a request has finished."""
        return None, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded from anywhere."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded from anywhere."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved anywhere."""
