"""Loaded by schemathesis: what a document cannot say is put right in requests that fit it.

They get readable pictures, not too many, a question at the end, and token numbers that this server allows.
"""

import base64
import io

import schemathesis
from PIL import Image
from schemathesis import GenerationMode

from tests.pdfs import pdf

_FILE = io.BytesIO()
Image.new("RGB", (32, 32), "white").save(_FILE, "PNG")
PICTURE = "data:image/png;base64," + base64.b64encode(_FILE.getvalue()).decode()

DOCUMENT = "data:application/pdf;base64," + base64.b64encode(pdf(["a"])).decode()
QUESTION = {"role": "user", "content": "What is the date?"}


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE or not isinstance(case.body, dict):
        return
    body = case.body
    pictures, documents = 0, "file" in body
    if documents:
        body["file"]["file_data"] = DOCUMENT
    for message in body.get("messages", ()):
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                if part["type"] == "image_url":
                    pictures += 1
                    if isinstance(part["image_url"], str):
                        part["image_url"] = PICTURE
                    else:
                        part["image_url"]["url"] = PICTURE
                if part["type"] == "file":
                    pictures, documents = pictures + 1, True
                    part["file"]["file_data"] = DOCUMENT
            if pictures > 8:  # more than the server takes
                message["content"] = "What?"
    if body.get("messages", [QUESTION])[-1] != QUESTION:  # generated lists are shared between requests
        body["messages"].append(dict(QUESTION))
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name):
            body[name] = min(body[name], 1)
    if body.get("top_logprobs"):
        body["logprobs"] = True
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":  # made-up schemas are seldom ones that can be followed
        form["json_schema"]["schema"] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
    controls = body.get("qzoom") or {}
    if controls.get("pages") is not None:
        controls["pages"] = "1" if documents else None
    if controls.get("max_visual_tokens"):
        controls["max_visual_tokens"] = min(max(controls["max_visual_tokens"], 200), 1000)
