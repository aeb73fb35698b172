"""What lmms-eval finds under the entry point group `lmms_eval.models`: the model `qzoom`, without a fork.

    lmms_eval --model qzoom --model_args pretrained=tiny,zoom=auto,max_visual_tokens=288 \
        --tasks qzoom_receipts --include_path "$(python -m qzoom.integrations.lmms_eval)"

Run as a module it prints the folder of the tasks that come with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def manifest() -> Any:
    """The entry point's payload; lmms-eval calls it when it starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="qzoom", chat_class_path="qzoom.integrations.lmms_eval_model.QZoomChat")


def tasks_folder() -> Path:
    """The folder for `--include_path`; it holds the task `qzoom_receipts`."""
    return Path(__file__).with_name("lmms_eval_tasks")


def decoding(wanted: Mapping[str, Any], max_new_tokens: int | None = None) -> dict[str, Any]:
    """A task's generation settings as options of `QZoom.ask`.

    A temperature decides whether answers are drawn, as in the harness's own models; without one `do_sample` does.

    Args:
        wanted: the harness's `generation_kwargs`.
        max_new_tokens: in place of the task's; None takes that, else 128.
    """
    stops = wanted.get("until") or []
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or int(wanted.get("max_new_tokens") or 128),
        "stop": [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop],
    }
    temperature = wanted.get("temperature")
    temperature = float(bool(wanted.get("do_sample")) if temperature is None else temperature)
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": float(wanted.get("top_p") or 1.0)}
        if wanted.get("top_k"):
            options["top_k"] = int(wanted["top_k"])
    return options


if __name__ == "__main__":
    print(tasks_folder())
