"""The plain base model of a folder, unforked: weights by transformers, tokenizer and image processor beside it.

Number format, device and attention are decided here. Tensors of branches that lie in the same files are left alone.
Tokenizer, image processor and chat template are loaded one by one, without torchvision: the bundled multi-modal
processors insist on a video processor that needs it. Pictures are always prepared by the PIL implementation, which is
the one the release used.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.released import read_stock, stock_places
from qzoom.checkpoints.upstream import is_branch_key
from qzoom.checkpoints.weights import WeightIndex, check_finite, read_index, read_json
from qzoom.errors import CheckpointError, ConfigError, DeviceError, listed, reason_of

if TYPE_CHECKING:
    import torch

    from qzoom.backbones.base import Backbone

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_COMPILED = "128"
"""How many compiled programs oneDNN keeps."""
_WIDENED_GB = 4
"""Models of up to so many GB in float32 are computed in float32 where a CPU computes bfloat16 slowly."""
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


def need_docstrings() -> None:
    """Refuse an interpreter that leaves docstrings out (ConfigError)."""
    if sys.flags.optimize > 1:  # transformers builds parts of itself from docstrings
        raise ConfigError(
            "transformers does not run without docstrings, which Python leaves out with -OO or PYTHONOPTIMIZE=2; use "
            "-O or PYTHONOPTIMIZE=1 at most."
        )


def load_processor(folder: Path, settings: Mapping[str, Any] | None = None) -> tuple[Any, Any, str]:
    """The tokenizer, the image processor and the chat template of a folder.

    Args:
        folder: where they are.
        settings: the model's config.json, whose family may have an image processor and a template of its own for
            folders without one.

    Raises:
        CheckpointError: a part is missing or cannot be read.
        ConfigError: the interpreter leaves docstrings out.
    """
    need_docstrings()
    from transformers import AutoTokenizer

    # From its own module: without torchvision, transformers 5.17 offers only a stand-in by the short name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from qzoom.backbones.registry import backbone_class

    family = None if settings is None else backbone_class(str(settings.get("model_type")))
    standard = None if family is None or settings is None else family.image_processor_for(settings)
    present = {path.name for path in folder.iterdir()}
    if not present & {"tokenizer.json", "vocab.json", "tokenizer.model"}:
        raise CheckpointError(f"{folder} has no tokenizer files (tokenizer.json); copy them from the base model.")
    if not present & {"tokenizer.json", "vocab.json"} and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder} has its tokenizer as tokenizer.model only, which sentencepiece reads; run `pip install "
            "sentencepiece`, or copy tokenizer.json from the base model."
        )
    own = bool(present & {"preprocessor_config.json", "processor_config.json"})
    for name in sorted(present & {"preprocessor_config.json", "processor_config.json"}):
        read_json(folder / name)  # refuses what is not JSON, NaN included
    if not own and standard is None:
        raise CheckpointError(f"{folder} has no preprocessor_config.json; copy it from the base model.")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            image_processor = standard
            if own:
                image_processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, backend="pil")
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise CheckpointError(
            f"The tokenizer or image processor in {folder} cannot be loaded ({reason_of(error)}); "
            "copy the files from the base model."
        ) from error
    return tokenizer, image_processor, _chat_template(folder, tokenizer, "" if family is None else family.chat_format)


def _chat_template(folder: Path, tokenizer: Any, standard: str) -> str:
    jinja, in_json = folder / "chat_template.jinja", folder / "chat_template.json"
    template: Any = None
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    elif in_json.is_file():
        template = read_json(in_json).get("chat_template")
    template = template or tokenizer.chat_template or standard
    if not isinstance(template, str) or not template:
        raise CheckpointError(f"{folder} has no chat template (chat_template.jinja); copy it from the base model.")
    _check_template(template, tokenizer, folder)
    return template


def _check_template(template: str, tokenizer: Any, folder: Path) -> None:
    """Refuse a chat template that is not valid (CheckpointError); what it says to messages is another matter."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, chat_template=template)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"The chat template in {folder} is not valid (line {error.lineno}: {reason_of(error)}); copy it from the "
            "base model."
        ) from error
    except (TemplateError, TypeError):
        pass


def load_backbone(
    folder: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
    processor: Path | None = None,
    quantization: Any = None,
    weights: bool = True,
) -> Backbone:
    """Load a base model, in eval mode and frozen.

    Args:
        folder: config.json, safetensors, tokenizer and image processor settings.
        dtype: "auto" (see `choose_dtype`), "float32", "bfloat16", or a torch dtype.
        device_map: None or "cpu", "cuda", "cuda:0", "auto".
        attn_implementation: one of `ATTENTIONS`; flash attention serves the vision encoder, whose pictures have many
            sizes, and the decoder runs on sdpa, which takes its masks.
        processor: another folder to take tokenizer and image processor from.
        quantization: "4bit", "8bit" or a quantization config of transformers; None loads the weights as they are
            stored, which may be quantised too.
        weights: False leaves the base's weights on disk, for programs whose decoder runs elsewhere; tokenizer, image
            processor, positions, rotary table and branch layers work all the same.

    Raises:
        CheckpointError: files missing or damaged, an unsupported type, tensors missing or misshapen.
        ConfigError: an unknown number format or attention.
        DeviceError: a placement that is not supported.
    """
    from qzoom.backbones.quantized import quantization_config, settle
    from qzoom.backbones.registry import backbone_class, build_backbone

    if attn_implementation not in ATTENTIONS:
        raise ConfigError(f"attn_implementation must be one of {', '.join(ATTENTIONS)}, not {attn_implementation!r}.")
    device = choose_device(device_map)
    settings = read_json(folder / "config.json")
    family = backbone_class(settings.get("model_type"), str(folder))
    index = read_index(folder) if weights or dtype == "auto" else None
    number_format = choose_dtype(_stated_dtype(settings) if dtype == "auto" else dtype, device, index)
    check_flash(attn_implementation, device, number_format)
    options = _options(number_format, attn_implementation)
    if quantization is not None:
        if settings.get("quantization_config"):
            raise ConfigError(f"{folder} is quantised already; leave out quantization={quantization!r}.")
        options["quantization_config"] = quantization_config(quantization, number_format, family.unquantized)
    if device.type == "cuda" or quantization is not None or settings.get("quantization_config"):
        options["device_map"] = {"": str(device)}
    parts = load_processor(processor or folder, settings)
    if not weights:
        backbone = _without_weights(_build_model(folder, number_format, device, attn_implementation), parts, device)
        _check_end(backbone, folder)
        return backbone
    model = _load_model(folder, settings, device, options).eval().requires_grad_(False)
    if index is not None:
        check_finite(model.named_parameters(), str(folder), lambda name: _place(index, name))
    settle(model)
    backbone = build_backbone(model, *parts)
    _check_end(backbone, folder)
    backbone.folder = folder.resolve()
    return backbone


def _check_end(backbone: Backbone, folder: Path) -> None:
    """Refuse ids that end an answer and are none (CheckpointError)."""
    try:
        _ = backbone.eos_ids
    except (TypeError, ValueError) as error:
        stated = getattr(backbone.model.generation_config, "eos_token_id", None)
        raise CheckpointError(
            f"{folder / 'generation_config.json'} has eos_token_id={stated!r}, which is neither a token id nor a list "
            "of them; copy the file from the base model."
        ) from error


def _without_weights(empty: Any, parts: tuple[Any, Any, str], device: torch.device) -> Backbone:
    """A backbone around a model whose weights stay on disk; only the rotary table, which has none, is computed."""
    from qzoom.backbones.registry import build_backbone

    backbone = build_backbone(empty.eval().requires_grad_(False), *parts)
    with device:
        rotary: Any = type(backbone.decoder.rotary_emb)
        backbone.decoder.rotary_emb = rotary(config=backbone.text_config)
    return backbone


def check_flash(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse flash attention where it cannot run (DeviceError: on another device than a GPU; ConfigError: in float32,
    or without its package)."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if not attn_implementation.startswith("flash"):
        return
    if device.type != "cuda":
        raise DeviceError(f"{attn_implementation} runs on CUDA only, not on {device.type}; use 'sdpa'.")
    if dtype == torch.float32:
        raise ConfigError(f"{attn_implementation} has no float32; load with dtype='bfloat16' or 'float16'.")
    second = attn_implementation.endswith("2")
    if not (is_flash_attn_2_available() if second else is_flash_attn_3_available()):
        package = "flash-attn" if second else "flash-attn-3"
        raise ConfigError(f"{attn_implementation} needs {package}, which is not installed or fits no GPU; use 'sdpa'.")


def _place(index: WeightIndex, name: str) -> str:
    """A parameter with the file that it is from; transformers may have put other words before its last ones."""
    inner = name.split(".", 2)[-1] if name.count(".") > 2 else name
    stored = name if name in index.tensors else ""
    if not stored:
        own = (other for other in index.tensors if not is_branch_key(other))
        stored = next((other for other in own if other == inner or other.endswith(f".{inner}")), "")
    return f"{stored} in {index.tensors[stored].file}" if stored else name


def choose_device(device_map: Any) -> torch.device:
    """One device out of transformers' ways to say it (DeviceError: several devices, an unknown one, or one that this
    machine lacks)."""
    import torch

    cuda = torch.cuda.is_available()
    if device_map is None or device_map == "cpu":
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise DeviceError(
            f"device_map {device_map!r} spreads the model over devices; qzoom keeps it on one: "
            "give 'cpu', 'cuda', 'cuda:0' or 'auto'."
        )
    try:
        device = torch.device(f"cuda:{device_map}" if type(device_map) is int else device_map)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device_map!r} is no device; give 'cpu', 'cuda', 'cuda:0' or 'auto'.") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"Device {str(device)!r} is not supported; give 'cpu', 'cuda', 'cuda:0' or 'auto'.")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        seen = f"torch sees {torch.cuda.device_count()} of them" if cuda else "torch sees no GPU here"
        raise DeviceError(f"Device {str(device)!r} was asked for, but {seen}; give 'cpu' or 'auto'.")
    return device


def choose_dtype(dtype: str | torch.dtype, device: torch.device, index: WeightIndex | None) -> torch.dtype:
    """The number format to load in.

    "auto" takes what is stored, but float32 for float16 on a CPU, and for bfloat16 on a CPU that computes it slowly,
    if the model takes at most 4 GB so.

    Raises:
        ConfigError: an unknown format.
        DeviceError: float16 asked for on a CPU.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "auto" and index is not None:
        stored = _stored_dtype(index)
        if device.type != "cpu" or stored == torch.float32:
            return stored
        widen = stored == torch.float16 or (bfloat16_is_slow() and _numbers(index) * 4 <= _WIDENED_GB * 1e9)
        return torch.float32 if widen else stored
    chosen = known.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in known.values():
        raise ConfigError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}.")
    if chosen == torch.float16 and device.type == "cpu":
        raise DeviceError("float16 is hundreds of times slower on a CPU; use 'bfloat16' or 'float32'.")
    assert isinstance(chosen, torch.dtype)
    return chosen


def bfloat16_is_slow() -> bool:
    """Whether the CPU is an x86 one without AVX-512 (or AMX), on which matrix products in bfloat16 are several times
    slower than in float32."""
    import torch

    return platform.machine() in ("x86_64", "AMD64") and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def _numbers(index: WeightIndex) -> int:
    """How many numbers the tensors hold."""
    return sum(math.prod(info.shape) for info in index.tensors.values())


def _stored_dtype(index: WeightIndex) -> torch.dtype:
    """The format that most base tensors have; whatever is not a half format becomes float32."""
    import torch

    counts: dict[str, int] = {}
    for name, info in index.tensors.items():
        if not is_branch_key(name):
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    most = max(counts, key=lambda kind: counts[kind], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def _stated_dtype(settings: Mapping[str, Any]) -> str:
    """What a quantised checkpoint's config.json says of its other tensors; "auto" where they are all that there is."""
    if not settings.get("quantization_config"):
        return "auto"
    inner = settings.get("text_config") or {}
    stated = settings.get("dtype") or settings.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype")
    return str(stated) if stated in ("float32", "bfloat16") else "bfloat16"


def _options(dtype: torch.dtype, attn_implementation: str) -> dict[str, Any]:
    """Options of transformers' `from_pretrained`."""
    attention: Any = attn_implementation
    if attn_implementation.startswith("flash"):
        attention = {"": "sdpa", "text_config": "sdpa", "vision_config": attn_implementation}
    common = {"dtype": dtype, "attn_implementation": attention}
    return common | {"ignore_mismatched_sizes": True, "output_loading_info": True}


def _load_model(folder: Path, settings: Mapping[str, Any], device: torch.device, options: Mapping[str, Any]) -> Any:
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    from qzoom.backbones.registry import backbone_class

    layout = backbone_class(settings["model_type"]).released_layout(settings)
    if device.type == "cuda":
        # For the whole process. On Hopper torch prefers cuDNN's attention, which compiles a plan for every length it
        # meets, and pictures come in every size. vLLM turns it off too; flash and memory-efficient attention remain.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        # oneDNN, which multiplies bfloat16 on CPUs, compiles for every length that it meets and keeps about half a MB
        # of each, twice and for the last 1,024: with questions of many lengths, memory grows by hundreds of MB. It
        # reads these variables when it is used first.
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            os.environ.setdefault(name, _COMPILED)
    try:
        with quiet_transformers():
            if layout is None:
                kind: Any = AutoModelForImageTextToText
                loaded = kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **options)
            else:
                config, places = stock_places(folder, settings, layout)
                kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
                tensors = read_stock(config, layout, places)
                loaded = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    except CheckpointError:
        raise
    except ImportError as error:
        text = f"The model in {folder} is quantised, and a package that reads it is missing: {reason_of(error)}."
        raise CheckpointError(text) from error
    except Exception as error:  # transformers raises many kinds for settings and weights that do not fit
        raise CheckpointError(f"The model in {folder} cannot be loaded: {reason_of(error)}.") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"The weights in {folder} lack {listed(missing)}; fetch all weight files again.")
    misshapen = [f"{name} {tuple(has)} instead of {tuple(needs)}" for name, has, needs in report["mismatched_keys"]]
    if misshapen:
        raise CheckpointError(f"The weights in {folder} do not fit its config.json: {listed(sorted(misshapen))}.")
    return model


def _build_model(folder: Path, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Any:
    """The model of a config.json with tensors that have sizes and no values, wherever it would be placed."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for settings that do not fit
        raise CheckpointError(f"The config.json in {folder} cannot be used: {reason_of(error)}.") from error
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no report of tensors that belong to the branches."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
