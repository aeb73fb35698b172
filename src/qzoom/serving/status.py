"""The small addresses: /health, /ready, /metrics, /version, /v1/models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qzoom import __version__
from qzoom.serving.metrics import CONTENT_TYPE
from qzoom.serving.service import Service

__all__ = ["health", "metrics", "model", "models", "ready", "version"]


async def health(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """The worker gave a sign of life a moment ago, and the server is not stopping; else status 503."""
    reason = _service(request).ready()
    return JSONResponse({"status": reason or "ready"}, status_code=503 if reason else 200)


async def metrics(request: Request) -> Response:
    """Counters in Prometheus's text format."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def version(request: Request) -> Response:
    """The version of qzoom."""
    return JSONResponse({"version": __version__})


async def models(request: Request) -> Response:
    """The one model served, with what it can do and what a request may ask for."""
    return JSONResponse({"object": "list", "data": [_card(_service(request))]})


async def model(request: Request) -> Response:
    """One model by name."""
    service = _service(request)
    name = request.path_params["name"]
    if name != service.settings.model_name:
        raise service.no_model(name)
    return JSONResponse(_card(service))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _card(service: Service) -> dict[str, Any]:
    engine, config, limits = service.model.engine, service.model.config, service.settings.limits
    coarse = config.coarse_tokens or engine.backbone.default_budget()
    region = config.region_tokens or coarse
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "qzoom",
        "max_model_len": engine.backbone.max_positions,
        "qzoom": {
            "zooms": service.model.has_region,
            "gate": service.model.has_gate,
            "gate_threshold": config.gate_threshold,
            "region_threshold": config.region_threshold,
            "coarse_tokens": [coarse.min_tokens, coarse.max_tokens],
            "region_tokens": [region.min_tokens, region.max_tokens],
            "cell_px": engine.backbone.token_px,
            "embedded": service.model.name == "tiny",
            "limits": {
                "body_bytes": limits.body_bytes,
                "pictures": limits.pictures,
                "picture_bytes": limits.picture_bytes,
                "picture_pixels": limits.picture_pixels,
                "max_tokens": limits.max_new_tokens,
                "max_visual_tokens": limits.visual_tokens,
            },
        },
    }
