"""Tokenizer, image processor and chat template of a folder, without torchvision.

The bundled multi-modal processors insist on a video processor that needs torchvision; the three parts alone do not.
Pictures are always prepared by the PIL implementation, which is the one the release used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qzoom.checkpoints.weights import read_json
from qzoom.errors import CheckpointError

__all__ = ["PROCESSOR_FILES", "is_processor_file", "load_processor"]

PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


def is_processor_file(name: str) -> bool:
    """Whether a file belongs to the tokenizer, the image processor or the chat template."""
    return name in PROCESSOR_FILES


def load_processor(folder: Path) -> tuple[Any, Any, str]:
    """The tokenizer, the image processor and the chat template of a folder.

    Raises:
        CheckpointError: a part is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    # From its own module: without torchvision, transformers 5.17 offers only a stand-in by the short name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    present = {path.name for path in folder.iterdir()}
    if not present & {"tokenizer.json", "vocab.json", "tokenizer.model"}:
        raise CheckpointError(f"{folder} has no tokenizer files (tokenizer.json); copy them from the base model.")
    if not present & {"preprocessor_config.json", "processor_config.json"}:
        raise CheckpointError(f"{folder} has no preprocessor_config.json; copy it from the base model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        image_processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, backend="pil")
    except Exception as error:  # transformers raises many kinds for a damaged file
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        raise CheckpointError(
            f"The tokenizer or image processor in {folder} cannot be loaded ({reason}); "
            "copy the files from the base model."
        ) from error
    return tokenizer, image_processor, _chat_template(folder, tokenizer)


def _chat_template(folder: Path, tokenizer: Any) -> str:
    jinja, in_json = folder / "chat_template.jinja", folder / "chat_template.json"
    template: Any = None
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    elif in_json.is_file():
        template = read_json(in_json).get("chat_template")
    template = template or tokenizer.chat_template
    if not isinstance(template, str):
        raise CheckpointError(f"{folder} has no chat template (chat_template.jinja); copy it from the base model.")
    return template
