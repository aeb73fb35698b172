"""`qzoom doctor` and `qzoom convert`: check an installation, and convert checkpoints and label files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import qzoom
from qzoom import __version__
from qzoom.cli.console import Console
from qzoom.cli.flags import optional
from qzoom.cli.options import Quiet

Level = Literal["ok", "warn", "fail"]
_MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about this installation."""

    name: str  # what was looked at
    value: str  # what was found
    level: Level = "ok"  # "ok", "warn" (works, could be better) or "fail" (needed and missing)
    remedy: str = ""  # what to do about it; empty when nothing


def doctor(
    *, json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of a list.")] = False
) -> None:
    """Check the installation: versions, device, threads, models.

    The exit code is 1 if something required is missing.
    """
    console = Console()
    findings = examine()
    healthy = all(finding.level != "fail" for finding in findings)
    if json:
        console.record({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            console.result(f"{_MARKS[finding.level]}  {finding.name:<{width}}  {finding.value}")
            if finding.remedy:
                console.result(f"      {'':<{width}}  -> {finding.remedy}")
        console.result(
            "qzoom can work here." if healthy else "Something qzoom needs is missing; see the lines marked FAIL."
        )
    if not healthy:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """All findings, in the order in which they matter."""
    findings = [Finding("qzoom", __version__), Finding("python", platform.python_version())]
    findings += _libraries()
    if all(finding.level != "fail" for finding in findings):
        findings += [_device(), *_threads(), _attention()]
    return [*findings, _torchvision(), _quantization(), _model_cache(), _embedded_model()]


def _libraries() -> list[Finding]:
    """Every needed library against the range that qzoom declares."""
    from packaging.requirements import Requirement

    findings = []
    for line in importlib.metadata.requires("qzoom") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(need.name, "not installed", "fail", f"pip install '{need}'"))
            continue
        if need.specifier.contains(found, prereleases=True):
            findings.append(Finding(need.name, found))
        else:
            findings.append(Finding(need.name, f"{found}, needs {need.specifier}", "fail", f"pip install '{need}'"))
    return findings


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", f"cuda ({names})")
    built = "built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda} build, no usable GPU"
    return Finding(
        "device", f"cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch {built})"
    )


def _threads() -> list[Finding]:
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY")
    waiting = Finding("OMP_WAIT_POLICY", policy or "not set")
    if (policy or "").lower() != "passive":
        remedy = "export OMP_WAIT_POLICY=passive: spinning threads are many times slower when cores are shared."
        waiting = Finding("OMP_WAIT_POLICY", policy or "not set", "warn", remedy)
    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    return [Finding("torch threads", threads), waiting]


def _attention() -> Finding:
    import torch

    kinds = ["eager"]
    if hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        kinds.insert(0, "sdpa")
    return Finding("attention", ", ".join(kinds))


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "absent (not needed)")
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError):
        return Finding(
            "torchvision",
            "installed, does not import",
            "fail",
            "pip uninstall torchvision: a broken one stops transformers.",
        )
    return Finding("torchvision", str(torchvision.__version__))


def _quantization() -> Finding:
    try:
        return Finding("bitsandbytes", importlib.metadata.version("bitsandbytes"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("bitsandbytes", "absent (only --quantization needs it: pip install 'qzoom[quantized]')")


def _model_cache() -> Finding:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    mode = (
        ", offline (HF_HUB_OFFLINE)"
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        else ""
    )
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        remedy = "set HF_HOME to a folder that can be written, or models cannot be downloaded."
        return Finding("model cache", f"{cache} cannot be written", "warn", remedy)
    return Finding("model cache", f"{cache} ({models} models{mode})")


def _embedded_model() -> Finding:
    folder = Path(qzoom.__file__).parent / "assets" / "tiny"
    parts: list[Any] = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if not any(path.name.endswith(".safetensors") for path in parts):
        return Finding("embedded model", "missing", "fail", "install qzoom again, or name another model with --model.")
    size_mb = sum(path.stat().st_size for path in parts) / 1e6
    return Finding("embedded model", f"tiny, {size_mb:.1f} MB in {folder}")


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help='A model folder, a model id on the hub, or the word "labels".')
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="The folder to write: new, empty, or a checkpoint to replace. With labels: the pickle file.",
        ),
    ],
    *,
    answer_only: Annotated[
        bool,
        typer.Option(
            "--answer-only", help="Leave out gate and region branch, so that other engines can load the model."
        ),
    ] = False,
    base: Annotated[str | None, optional("A complete model, for what SRC lacks.", metavar="MODEL")] = None,
    output: Annotated[Path | None, optional("labels: folder for the records.", "--output", "-o")] = None,
    images: Annotated[Path | None, optional("labels: folder that the image paths are relative to.")] = None,
    made_with: Annotated[str, typer.Option(metavar="MODEL", help="labels: the model that made them.")] = "unknown",
    fresh: Annotated[bool, typer.Option("--fresh", help="labels: discard earlier records in --output.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert the authors' merged checkpoint to an adapter, or an adapter to a merged checkpoint.

    With --answer-only the result is a plain model of its family, without heads.

    With the word labels, a published label file (a pickle) is converted to records; no code in it is executed.

    Example: qzoom convert path/to/merged path/to/adapter

    Example: qzoom convert labels stage1.pkl --images pictures --output labels/published
    """
    console = Console(quiet=quiet)
    if source == "labels":
        if output is None:
            raise typer.BadParameter("name the folder for the records with --output.")
        _convert_labels(target, output, images or target.parent, model=made_with, fresh=fresh, console=console)
        return
    for flag, given in (("--output", output), ("--images", images), ("--fresh", fresh or None)):
        if given is not None:
            raise typer.BadParameter(f"{flag} is for `qzoom convert labels PICKLE` only.")
    from qzoom.checkpoints.convert import convert as run

    console.hush_libraries()
    report = run(source, target, answer_only=answer_only, base=base)
    kinds = f"{report.read_kind} to {report.written_kind}"
    console.note(f"saved   {report.target}: {kinds}, {report.tensors} tensors, {report.size_bytes / 1e6:.1f} MB")
    for note in report.notes:
        console.note(f"note    {note}")


def _convert_labels(pickle: Path, output: Path, images: Path, *, model: str, fresh: bool, console: Console) -> None:
    from qzoom.labels.published import convert_published

    report = convert_published(pickle, output, images, model=model, fresh=fresh)
    console.note(f"saved   {output}: {report.usable} usable label maps of {report.questions} entries")
    if report.skipped:
        console.note(f"note    {report.skipped} entries skipped; the first: {report.reasons[0]}")
    if report.unread:
        console.note(
            f"note    {report.unread} entries not converted, since their image cannot be read; the first: "
            f"{report.unread_reason} Run the same command again to convert them."
        )
        raise typer.Exit(1)
