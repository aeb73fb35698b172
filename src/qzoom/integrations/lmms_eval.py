"""What lmms-eval finds under the entry point group `lmms_eval.models`: the model `qzoom`, without a fork.

    lmms_eval --model qzoom --model_args pretrained=tiny,zoom=auto,max_visual_tokens=288 \
        --tasks qzoom_receipts --include_path "$(python -m qzoom.integrations.lmms_eval)"

Run as a module it prints the folder of the tasks that come with the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def manifest() -> Any:
    """The entry point's payload; lmms-eval calls it when it starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="qzoom", chat_class_path="qzoom.integrations.lmms_eval_model.QZoomChat")


def tasks_folder() -> Path:
    """The folder for `--include_path`; it holds the task `qzoom_receipts`."""
    return Path(__file__).with_name("lmms_eval_tasks")


if __name__ == "__main__":
    print(tasks_folder())
