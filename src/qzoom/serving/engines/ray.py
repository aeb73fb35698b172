"""Replicas of an engine on Ray Serve, and the router that sends a picture's questions to the replica that has it.

`qzoom serve --replicas N` starts replicas and answers HTTP itself; in `deploy/ray-serve.yaml`, which names `app`, the
front end is a deployment too. Ray's own prefix router reads text only, so two questions about one picture part there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qzoom.errors import EngineDownError, InternalError, QueueFullError, QZoomError
from qzoom.model import QZoom
from qzoom.serving.engines.base import Job, ServingEngine
from qzoom.serving.memory import keep_trimmed, limit_arenas, settle
from qzoom.serving.routing import choose, picture_key, rank
from qzoom.serving.settings import SchedulerLimits, ServerSettings
from qzoom.types import Perception, StreamEvent

OpenEngine = Callable[[], ServingEngine]
APP, ENGINE = "qzoom", "engine"
_HEALTH_S = 5.0
_log = logging.getLogger("qzoom.serving")


class PictureRouter(RequestRouter):
    """Sends requests with one key, their first argument, to one replica while that is not overloaded."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, one after the other."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in replicas.items()}
        key = pending_request.args[0]
        first = choose(key, loads)
        return [[replicas[name]] for name in (first, *(name for name in rank(key, replicas) if name != first))]


_ROUTER: Any = RequestRouterConfig(request_router_class=PictureRouter)


class Replica:
    """One replica: an engine behind Ray Serve, in a process of its own."""

    def __init__(self, open_engine: OpenEngine) -> None:
        limit_arenas()
        self._engine = open_engine()
        self._engine.start()
        settle()
        keep_trimmed()

    async def events(
        self, key: bytes, job: Job, *, perceive: bool = False
    ) -> AsyncGenerator[StreamEvent | Perception | QZoomError, None]:
        """The engine's events; one that ends the job is an item, so that it arrives as it is."""
        try:
            if perceive:
                yield await self._engine.look(job)
                return
            begun = False
            async with aclosing(self._engine.answer(job)) as events:
                async for event in events:
                    if event.kind == "text" and begun and not job.streamed:
                        continue  # every event costs the front end and Ray a message
                    begun = begun or event.kind == "text"
                    if event.answer is not None:  # without the pictures, which the front end has
                        event = dataclasses.replace(event, answer=dataclasses.replace(event.answer, images=()))
                    yield event
        except QZoomError as error:
            yield error

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that fails."""
        if reason := await self._engine.health():
            raise RuntimeError(reason)


class RayEngine(ServingEngine):
    """Lets the replicas of a deployment answer.

    Args:
        model: tokenizer, arithmetic and limits; base weights are not needed.
        limits: `queue` jobs may wait.
        native: whether the replicas are native engines, which refuse nothing.
    """

    def __init__(
        self,
        model: QZoom,
        handle: Any,
        limits: SchedulerLimits,
        *,
        on_close: Callable[[], None] | None = None,
        native: bool = True,
    ) -> None:
        super().__init__(model)
        self.refused = () if native else self.refused
        self._handle = handle.options(stream=True)
        self._queue, self._on_close = limits.queue, on_close

    async def close(self) -> None:
        """End what was started for this engine."""
        closing, self._on_close = self._on_close, None
        if closing is not None:
            await asyncio.to_thread(closing)

    async def health(self) -> str:
        """See `ServingEngine.health`; one replica that runs is enough."""
        states: Any = (await asyncio.to_thread(serve.status)).applications.get(APP)
        deployment = states.deployments.get(ENGINE) if states else None
        return "" if deployment and deployment.replica_states.get("RUNNING", 0) else "no replica runs"

    async def look(self, job: Job) -> Perception:
        """See `ServingEngine.look`."""
        async with aclosing(self._items(job, perceive=True)) as items:
            perception: Perception = await anext(items)
            return perception

    async def answer(self, job: Job) -> AsyncGenerator[StreamEvent, None]:
        """See `ServingEngine.answer`."""
        async with aclosing(self._items(job, perceive=False)) as items:
            async for event in items:
                if event.answer is not None:
                    images = tuple(picture.image for picture in job.request.pictures)
                    event = dataclasses.replace(event, answer=dataclasses.replace(event.answer, images=images))
                yield event

    async def _items(self, job: Job, *, perceive: bool) -> AsyncGenerator[Any, None]:
        """What a replica sends; a replica that dies before it sent anything is replaced by another one, once."""
        if self._waiting >= self._queue:
            raise QueueFullError(f"{self._waiting} requests wait already; try again in a moment.", 1.0)
        key = await asyncio.to_thread(picture_key, job.request, job.tenant)
        for last in (False, True):
            self._waiting += 1
            begun = ended = False
            responses = None
            try:
                responses = self._handle.events.remote(key, job, perceive=perceive)
                async for item in responses:
                    if not begun:
                        begun = True
                        self._waiting -= 1
                        self._running += 1
                    ended = perceive or isinstance(item, QZoomError) or item.answer is not None
                    if isinstance(item, QZoomError):
                        raise item
                    yield item
                return
            except BackPressureError as error:
                raise QueueFullError("All replicas are full; try again in a moment.", 1.0) from error
            except (RayActorError, DeploymentUnavailableError) as error:
                if begun or last:
                    said = "ended in the middle of the answer; ask again" if begun else "cannot be reached; try again"
                    raise EngineDownError(f"The replica that answered {said}.") from error
            except RayTaskError as error:
                _log.exception("A replica failed.")
                raise InternalError("The server failed while it answered; its log says more.") from error
            finally:
                if responses is not None and not ended:
                    with suppress(Exception):
                        responses.cancel()
                self._running -= begun
                self._waiting -= not begun


def bind_engine(
    open_engine: OpenEngine, limits: SchedulerLimits, replicas: int, gpus: float = 0.0
) -> serve.Application:
    """The deployment of the replicas, to be run. `open_engine`: makes a replica's engine; it must be importable on all
    machines."""
    deployment: Any = serve.deployment(
        Replica,
        name=ENGINE,
        num_replicas=replicas,
        max_ongoing_requests=limits.slots + limits.queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        request_router_config=_ROUTER,
        health_check_period_s=_HEALTH_S,
    )
    return deployment.bind(open_engine)


def start_replicas(open_engine: OpenEngine, settings: ServerSettings, replicas: int, *, gpus: float = 0.0) -> Any:
    """Run replicas on the connected Ray, without Ray's HTTP proxy; returns when they answer (EngineDownError: a replica
    did not start; Ray's log says why). Returns their handle, for `RayEngine`."""
    serve.start(proxy_location="Disabled")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        return serve.run(bind_engine(open_engine, settings.scheduler, replicas, gpus), name=APP, route_prefix=None)
    except RuntimeError as error:
        raise EngineDownError(f"The replicas did not start ({' '.join(str(error).split())[:300]}).") from error


def stop_replicas() -> None:
    """End the replicas on a Ray that goes on."""
    serve.delete(APP)


def bind_front_end(engine: Any, front: Callable[[], QZoom], settings: ServerSettings, *, native: bool) -> Any:
    """The front end as a deployment before the replicas, for a cluster whose Serve answers HTTP. `engine`: from
    `bind_engine`. `front`: loads what `RayEngine` needs of the model."""

    def build() -> Any:
        from qzoom.serving.app import create_app
        from qzoom.serving.service import Service

        handle = serve.get_deployment_handle(ENGINE, APP)
        return create_app(Service(RayEngine(front(), handle, settings.scheduler, native=native), settings))

    deployment: Any = serve.deployment(serve.ingress(build)(), name="front-end")
    return deployment.bind(engine)
