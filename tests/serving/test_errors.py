import dataclasses

import httpx
import pytest

from qzoom import QZoom, errors
from qzoom.backbones.registry import build_backbone
from qzoom.serving.errors import INTERNAL, from_exception
from tests.serving.running import chat, running


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.ImageError("no"), 400, "invalid_request_error", "invalid_image"),
        (errors.QuestionError("no"), 400, "invalid_request_error", "invalid_question"),
        (errors.BudgetError("no"), 400, "invalid_request_error", "invalid_budget"),
        (errors.ConfigError("no"), 400, "invalid_request_error", "invalid_request"),
        (errors.HeadsMissingError("no"), 400, "invalid_request_error", "cannot_zoom"),
        (errors.FetchRefusedError("no"), 422, "invalid_request_error", "unprocessable_media"),
        (errors.FetchFailedError("no"), 503, "server_error", "media_unavailable"),
        (errors.FetchTimeoutError("no"), 504, "server_error", "media_timeout"),
        (errors.QueueFullError("no", 1.2), 429, "rate_limit_error", "queue_full"),
        (errors.StoppingError("no"), 503, "server_error", "stopping"),
        (errors.DeadlineError("no"), 504, "server_error", "deadline_exceeded"),
    ],
)
def test_every_kind_has_its_status(error, status, kind, code):
    refusal = from_exception(error)
    assert refusal.status == status
    assert refusal.body() == {"error": {"message": "no", "type": kind, "param": refusal.param, "code": code}}


def test_retry_after_is_whole_seconds():
    assert from_exception(errors.QueueFullError("no", 1.2)).headers == {"Retry-After": "2"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("/home/me/secret.py at 0x7f00"),
        errors.CheckpointError("/home/me"),
        errors.InternalError("x"),
        KeyError("k"),
    ],
)
def test_internals_never_leave(error):
    refusal = from_exception(error)
    assert (refusal.status, str(refusal), refusal.code) == (500, INTERNAL, "internal_error")


def test_messages_that_the_chat_template_refuses(model):
    backbone = model.engine.backbone
    template = "{{ raise_exception('System message must be at the beginning.') }}"
    own = build_backbone(backbone.model, backbone.tokenizer, backbone.image_processor, template)
    with running(QZoom(dataclasses.replace(model.engine, backbone=own))) as site:
        reply = httpx.post(f"{site.url}/v1/chat/completions", json=chat(), timeout=120)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_question")
    assert "System message must be at the beginning" in reply.json()["error"]["message"]
