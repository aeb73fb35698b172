"""POST /v1/perceive: gate, regions and map of a question, without an answer."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qzoom.serving.auth import TENANT
from qzoom.serving.bodies import json_body
from qzoom.serving.leaving import unless_gone
from qzoom.serving.protocol import PerceiveRequest
from qzoom.serving.replies import Header, perception_reply
from qzoom.serving.service import Service
from qzoom.types import Perception

__all__ = ["perceive"]


async def perceive(request: Request) -> Response:
    """Say where a question would make the model look.

    Regions are given whatever the gate says. The map comes along unless `qzoom.heatmap` is false.
    """
    service: Service = request.app.state.service
    arrived_s = time.monotonic()
    body = await json_body(request)
    asked, seen = await unless_gone(request, _look(service, request, body, arrived_s))
    heatmap = asked.qzoom is None or asked.qzoom.heatmap is not False
    return JSONResponse(perception_reply(Header(asked.model, "perc"), seen, heatmap=heatmap))


async def _look(
    service: Service, request: Request, body: bytes, arrived_s: float
) -> tuple[PerceiveRequest, Perception]:
    job = await service.read(PerceiveRequest, body, request.scope, arrived_s)
    assert isinstance(job.asked, PerceiveRequest)
    return job.asked, await service.perception(job, request.scope[TENANT])
