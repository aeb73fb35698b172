"""The OpenAPI document: FastAPI's, completed with the request bodies, which our own parser reads."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from qzoom.serving.protocol import ChatRequest, PerceiveRequest

__all__ = ["describe"]

_BODIES: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatRequest, "/v1/perceive": PerceiveRequest}
_REF = "#/components/schemas/{model}"


def describe(app: FastAPI, *, model_name: str, with_keys: bool) -> None:
    """Make `app.openapi()` (and so /openapi.json) complete.

    Args:
        app: its routes are all there.
        model_name: the one that requests may name.
        with_keys: say that an API key is needed.
    """
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_document(app, model_name, with_keys))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, model_name: str, with_keys: bool) -> dict[str, Any]:
    out = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = out.setdefault("components", {}).setdefault("schemas", {})
    for path, model in _BODIES.items():
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"]["enum"] = [model_name]
        schemas[model.__name__] = schema
        content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
        out["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model_name]}}
    out["paths"]["/v1/models/{name}"]["get"]["parameters"] = [name]
    if with_keys:
        out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"key": []}]
    return out
