"""Where a checkpoint comes from: the embedded model, a folder, or the hub; always ends as a local folder.

First step of loading. Whatever goes wrong on the way ends as one `CheckpointError` sentence; errors of the hub library
never reach the caller.
"""

from __future__ import annotations

import difflib
import errno
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from qzoom.checkpoints.weights import read_json
from qzoom.errors import CheckpointError, reason_of

EMBEDDED = "tiny"
_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
_TRANSPORT = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")  # first part of a module's name
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_LORA = ["lora/*.safetensors", "lora/*.json"]
_SKIPPED = ["*/*", "*.bin.index.json", "optimizer*", "trainer_state.json"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that lies in a local folder."""

    folder: Path  # where its files are
    name: str  # hub id, "tiny", or the folder as given
    revision: str | None = None  # the hub revision asked for; None for folders and the default branch
    is_hub: bool = False  # whether `name` is a hub id, so that an adapter may refer to it


def find_source(id_or_path: str | Path, revision: str | None = None) -> Source:
    """The local folder of a checkpoint, downloaded first if need be.

    Args:
        id_or_path: "tiny" (the embedded model; a folder of that name is "./tiny"), a folder, or a hub id.
        revision: branch, tag or commit on the hub; folders take none.

    Raises:
        CheckpointError: no such folder, model or revision; no network; a file instead of a folder; a revision of
            something that is not on the hub.
    """
    text = str(id_or_path).strip()
    if not text:
        raise CheckpointError("The model name is empty; give a folder, a hub id, or 'tiny' for the embedded model.")
    if text == EMBEDDED:
        if revision:
            raise CheckpointError(f"The embedded model has no revisions; leave out {revision!r}, or name a hub id.")
        return Source(_embedded_folder(), EMBEDDED)
    path = Path(text).expanduser()
    if path.is_dir():
        if revision:
            raise CheckpointError(f"The folder {text} has no revisions; leave out {revision!r}, or name a hub id.")
        return Source(path, text)
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the folder that holds the model's config.json and weights.")
    if isinstance(id_or_path, Path) or not _ID.fullmatch(text) or ".." in text or text.endswith((".", "-", ".git")):
        raise CheckpointError(
            f"There is no model folder {text}; check the path, or give a hub id such as 'owner/name'."
        )
    return Source(_download(text, revision), text, revision, is_hub=True)


def _embedded_folder() -> Path:
    folder = Path(str(importlib.resources.files("qzoom") / "assets" / "tiny"))
    if not folder.is_dir():
        raise CheckpointError(
            "The embedded model 'tiny' is not part of this installation; install qzoom again or name another model."
        )
    return folder


def _download(repo_id: str, revision: str | None) -> Path:
    """Fetch safetensors, settings and tokenizer files of a hub repository into the local cache."""
    import huggingface_hub
    from huggingface_hub import errors

    where = f"model {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_SKIPPED
            )
        )
        config = folder / "qzoom_config.json"
        if config.is_file() and read_json(config).get("lora_base_weights"):
            huggingface_hub.snapshot_download(repo_id, revision=folder.name, allow_patterns=_LORA)
        return folder
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"Access to {where} is restricted; accept its terms on the hub and set HF_TOKEN to a token for it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub has no {where}{_hint(repo_id)}; check the spelling, or set HF_TOKEN if it is private."
        ) from error
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError) as error:
        raise CheckpointError(f"The hub has no {where}; check the branch, tag or commit.") from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder nor a valid hub id; an id looks like 'owner/name'."
        ) from error
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise CheckpointError(_unreachable(repo_id, where, error)) from error


def is_transport_error(error: Exception) -> bool:
    """Whether an error comes from the network or from a library that speaks to it.

    The HTTP libraries' own errors derive from `Exception` alone, and the hub library changes which one it uses (httpx,
    httpx2), so they are told by where they are defined.
    """
    return isinstance(error, OSError) or any(kind.__module__.startswith(_TRANSPORT) for kind in type(error).__mro__)


def _unreachable(repo_id: str, where: str, error: Exception) -> str:
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f"The cache folder {constants.HF_HUB_CACHE}, into which {where} is downloaded, cannot be written "
            f"({error.strerror or reason_of(error)}); check space and rights, or set HF_HUB_CACHE to another folder."
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"There is no folder {repo_id!r} and {where} is not in the local cache{_hint(repo_id)}; "
            "unset HF_HUB_OFFLINE to download it."
        )
    return (
        f"There is no folder {repo_id!r} and {where} could not be downloaded{_hint(repo_id)} "
        f"({reason_of(error)}); check the network, or give the folder of a local copy."
    )


def _hint(repo_id: str) -> str:
    from qzoom.checkpoints.upstream import UPSTREAM_PRESETS

    close = difflib.get_close_matches(repo_id, [EMBEDDED, *UPSTREAM_PRESETS], n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close and close[0] != repo_id else ""
