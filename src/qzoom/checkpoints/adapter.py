"""Our format: `qzoom_config.json` and `qzoom.safetensors`, beside a base model or referring to one.

Tensor names are those of the branches with `gate.` or `region.` before them. What the region branch's last layer never
uses is left out, unless the branches came from a merged checkpoint, where nothing may be lost. LoRA weights that the
base was loaded or trained with lie in `lora/`; where the base is written too, they are part of it already.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tempfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom import __version__
from qzoom.backbones.lora import LoraWeights
from qzoom.checkpoints.base import quiet_transformers
from qzoom.checkpoints.branches import is_used_in_last
from qzoom.checkpoints.format import CONFIG_FILE, HERE, AdapterConfig, BaseReference
from qzoom.checkpoints.hub import EMBEDDED, is_transport_error
from qzoom.checkpoints.lora import LORA_FOLDER, write_lora
from qzoom.checkpoints.upstream import PROVENANCE_KEY, upstream_fields
from qzoom.checkpoints.weights import check_finite
from qzoom.checkpoints.writing import added_files, atomic_folder
from qzoom.errors import CheckpointError, ConfigError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

    from qzoom.backbones.base import Backbone
    from qzoom.engine.state import Engine

MAX_SHARD_SIZE = "5GB"


def save_pretrained(
    engine: Engine,
    path: str | Path,
    *,
    base_id: str | None = None,
    base_revision: str | None = None,
    include_base: bool | None = None,
    compact: bool | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write an adapter folder; it appears complete or not at all.

    Args:
        path: a new or empty folder, or an adapter to replace. With `base_id="."` and no `include_base`, the folder of
            a base model, to which the adapter is added; one that was added before is replaced, the base stays.
        base_id: hub id or folder of the base; None takes where the base was loaded from. `path` itself is the same as
            ".".
        base_revision: its hub revision; None takes the one that the base was loaded with if no `base_id` is given.
        include_base: write the base model too, so that the folder needs nothing else; None does so when the base was
            not loaded from the hub and no `base_id` is given.
        compact: leave out what the region branch never uses; None does so unless it came from a merged checkpoint.
        max_shard_size: largest weight file, in bytes or as "5GB".

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something else or cannot be written, or a weight is NaN or infinity.
        ConfigError: `max_shard_size` is no size.
    """
    folder = Path(path)
    _check_size(max_shard_size)
    here = not include_base and base_id is not None and (base_id == HERE or _is_same(Path(base_id), folder))
    if include_base is None:
        include_base = not here and base_id is None and not _hub_id(engine.backbone)
    lora = None if include_base else engine.lora
    where = (HERE, None) if include_base or here else (base_id, base_revision)
    config = AdapterConfig(
        base=_base_reference(engine.backbone, *where),
        zoom=engine.config,
        gate=engine.gate is not None,
        region=engine.region is not None,
        lora_base_weights="" if lora is None else lora.base_weights,
        qzoom_version=__version__,
    )
    tensors = branch_tensors(engine, compact=compact)
    added = [*tensors.items(), *([] if lora is None else lora.tensors.items())]
    base = engine.backbone.model.named_parameters() if include_base else ()
    check_finite(chain(added, base), f"{folder} is not written", remedy="load the weights again, or train them again")
    if here:
        _add_to_base(config, tensors, folder, max_shard_size, lora)
        return folder
    with atomic_folder(folder, "adapter") as part:
        if include_base:
            _write_base(engine.backbone, part, max_shard_size)
        _write_branches(tensors, part, max_shard_size)
        if lora is not None:
            write_lora(lora, part)
        config.save(part)
    return folder


def _is_same(base: Path, folder: Path) -> bool:
    return base.expanduser().resolve() == folder.resolve()


def _check_size(size: int | str) -> None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", size.strip().upper()) if isinstance(size, str) else None
    if (size if isinstance(size, int) else float(found[1]) if found else 0) <= 0:
        raise ConfigError(f"max_shard_size is {size!r}; give a number of bytes, or a text such as '5GB'.")


def _base_reference(backbone: Backbone, base_id: str | None, base_revision: str | None) -> BaseReference:
    """Where an adapter's base is: `HERE`, a hub id or a folder; None takes where it was loaded from (CheckpointError:
    that is unknown)."""
    reference = base_id or _hub_id(backbone) or ""
    revision = base_revision or (None if base_id else getattr(backbone.model.config, "_commit_hash", None))
    if not reference:
        raise CheckpointError("The base model of this adapter is unknown; give base_id, or include_base=True.")
    if reference not in (HERE, EMBEDDED) and Path(reference).expanduser().is_dir():
        reference = str(Path(reference).expanduser().resolve())
    return BaseReference(reference, revision, backbone.family, backbone.hidden_size, backbone.num_layers)


def push_to_hub(
    engine: Engine,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload qzoom adapter",
    create_pr: bool = False,
    base_id: str | None = None,
    base_revision: str | None = None,
    include_base: bool | None = None,
) -> str:
    """Save and upload to a model repository on the hub, which is created if need be.

    Args:
        repo_id: "owner/name".
        token: hub token; None uses HF_TOKEN or the stored login.
        revision: branch to commit to.
        commit_message: the commit's first line.
        create_pr: open a pull request instead of committing.
        base_id, base_revision, include_base: see `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: no network, no right to write, a malformed id.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(
            engine, Path(scratch) / "adapter", base_id=base_id, base_revision=base_revision, include_base=include_base
        )
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except HFValidationError as error:
            raise CheckpointError(f"{repo_id!r} is no valid hub id; an id looks like 'owner/name'.") from error
        except Exception as error:
            if not is_transport_error(error):
                raise
            raise CheckpointError(
                f"Uploading to {repo_id!r} failed ({reason_of(error)}); check the network, and that HF_TOKEN may write "
                "there."
            ) from error
    return str(getattr(done, "pr_url", None) or done.commit_url)


def branch_tensors(engine: Engine, *, compact: bool | None = None) -> dict[str, Tensor]:
    """The branches' tensors under the names of our format, on the CPU."""
    if compact is None:
        compact = PROVENANCE_KEY not in engine.config.provenance
    out: dict[str, Tensor] = {}
    for prefix, branch in (("gate.", engine.gate), ("region.", engine.region)):
        if branch is not None:
            out |= {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in branch.state_dict().items()}
    if compact and engine.region is not None:
        last = f"region.layers.{len(engine.region.layers) - 1}."
        out = {n: t for n, t in out.items() if not n.startswith(last) or is_used_in_last(n.removeprefix(last))}
    return out


def _write_branches(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    from huggingface_hub import save_torch_state_dict

    if tensors:
        save_torch_state_dict(
            tensors, folder, filename_pattern="qzoom{suffix}.safetensors", max_shard_size=max_shard_size
        )


def _add_to_base(
    config: AdapterConfig, tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str, lora: LoraWeights | None
) -> None:
    """Put an adapter beside the base model in its folder, in the place of one that may be there already."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no base model to add an adapter to; use include_base=True.")
    with added_files(folder, _is_ours) as part:
        _write_branches(tensors, part, max_shard_size)
        if lora is not None:
            write_lora(lora, part)
        config.save(part)


def _is_ours(name: str) -> bool:
    """Whether a file of this name is an adapter's, not its base's."""
    return name in (CONFIG_FILE, LORA_FOLDER) or fnmatch.fnmatchcase(name, "qzoom*.safetensors*")


def _write_base(backbone: Backbone, folder: Path, max_shard_size: int | str) -> None:
    """The base model with its tokenizer, template and image processor settings, as transformers writes them."""
    with quiet_transformers():
        backbone.model.save_pretrained(folder, max_shard_size=max_shard_size)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(str(backbone.chat_template), encoding="utf-8")
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in upstream_fields(settings):
        del settings[name]
    head = getattr(backbone.model, "lm_head", None)
    if head is not None and head.weight is not backbone.embedding.weight:  # it may have been replaced after loading
        for part in (settings, settings.get("text_config", {})):
            part.update({"tie_word_embeddings": False} if "tie_word_embeddings" in part else {})
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _hub_id(backbone: Backbone) -> str | None:
    """Where the base was loaded from, if that is the hub."""
    name = str(getattr(backbone.model.config, "_name_or_path", "") or "")
    known = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None
    return name if known and not Path(name).is_dir() else None
