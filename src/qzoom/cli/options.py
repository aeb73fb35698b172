"""Options that several commands share, each described once, and their conversion to what the library takes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import optional
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.images.load import LoadedImage
    from qzoom.labels.workers import ModelSpec
    from qzoom.model import QZoom

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE... QUESTION",
        show_default=False,
        help="One or more images or PDFs (files, web addresses, or - for standard input), then the question.",
    ),
]
Device = Annotated[str, typer.Option(envvar="QZOOM_DEVICE", help="cpu, cuda, cuda:1 or auto (cuda if available).")]
Zoom = Annotated[
    Literal["auto", "never", "always"],
    typer.Option(
        "--zoom", help="auto: the gate decides; never: coarse pass only; always: zoom without asking the gate."
    ),
]
GateThreshold = Annotated[
    float | None, optional("Zoom at or above this score; lower values zoom more often.", min=0, max=1)
]
RegionThreshold = Annotated[
    float | None, optional("Value of the region map above which a cell belongs to a region.", min=0, max=1)
]
Positions = Annotated[
    Literal["second_image", "aligned"] | None,
    typer.Option(
        show_default="the checkpoint's",
        help="Positions of a crop's tokens: those of a second image, or between those of the coarse tokens below it.",
    ),
]
CoarseTokens = Annotated[str | None, optional("Visual tokens of the coarse view of an image.", metavar="MAX|MIN:MAX")]
RegionTokens = Annotated[str | None, optional("Visual tokens of all regions together.", metavar="MAX|MIN:MAX")]
Pages = Annotated[str, optional("Pages of a PDF, such as 1-5,9; default: all.", metavar="N,N-M,...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors to standard error.")]


Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what an earlier run left in the output folder.")]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model of a command, and where it runs."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", envvar="QZOOM_MODEL", help='"tiny" (embedded), a folder, or a model id on the hub.'
        ),
    ] = "tiny"
    revision: Annotated[
        str | None, typer.Option(envvar="QZOOM_REVISION", help="Branch, tag or commit of the model id.")
    ] = None
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            envvar="QZOOM_DTYPE",
            help="Number format of the weights; auto keeps the checkpoint's, or takes float32 (models of up to 4 GB) "
            "where a CPU computes bfloat16 slowly. float16 is for GPUs without bfloat16.",
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["4bit", "8bit"] | None,
        typer.Option(
            envvar="QZOOM_QUANTIZATION", help="Hold the base model's weights in few bits (needs bitsandbytes)."
        ),
    ] = None

    def load(self) -> QZoom:
        """The model (QZoomError: it cannot be found, read or placed)."""
        from qzoom.checkpoints.base import need_docstrings

        need_docstrings()  # before torch is imported, which takes long where nothing is compiled without docstrings
        from qzoom.model import QZoom

        return QZoom.from_pretrained(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            device_map=find_device(self.device),
            quantization=self.quantization,
        )

    def spec(self) -> ModelSpec:
        """The model for the workers of a labelling run."""
        from qzoom.labels.workers import ModelSpec

        return ModelSpec(self.model, self.revision, find_device(self.device), self.dtype, self.quantization)


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a command prints."""

    json: Json = False
    quiet: Quiet = False

    @property
    def console(self) -> Console:
        """The streams of the command."""
        return Console(quiet=self.quiet)


@dataclass(frozen=True, slots=True)
class LookOptions:
    """When a question zooms, and with how many visual tokens the coarse pass looks."""

    zoom: Zoom = "auto"
    coarse_tokens: CoarseTokens = None
    gate_threshold: GateThreshold = None
    region_threshold: RegionThreshold = None
    preset: Annotated[str | None, optional("Named pair of thresholds stored in the checkpoint.")] = None
    components: Annotated[
        Literal["union", "peak_component", "all", "groups"] | None,
        typer.Option(
            show_default="the checkpoint's",
            help="Boxes of a region map: one around all foreground cells, around the component with the peak, or one "
            "per component, the best first (all) or in reading order (groups).",
        ),
    ] = None
    max_regions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            show_default="the checkpoint's",
            help="Most regions per question; above 1 it implies --components all, unless that is given.",
        ),
    ] = None
    region_shares: Annotated[
        Literal["area", "equal"] | None,
        typer.Option(
            show_default="the checkpoint's",
            help="How several regions share --region-tokens: by their areas, or equally.",
        ),
    ] = None
    sparse: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=8,
            show_default="the checkpoint's",
            help="Read only a region's tokens on its foreground, its crop enlarged before by this at most along each "
            "side, so that about as many tokens stay.",
        ),
    ] = None
    positions: Positions = None
    decide_by: Annotated[
        Literal["gate", "map", "answer"] | None,
        typer.Option(
            show_default="the checkpoint's",
            help="What decides whether to zoom: the gate, how far the peak of the region map stands out (1 - mean / "
            "peak, so that --gate-threshold 0.667 zooms where the peak is 3 times the mean), or the doubt in the "
            "coarse answer's first tokens.",
        ),
    ] = None
    once: Annotated[
        bool,
        typer.Option("--read-once", help="Do not read an unsure answer again in a smaller crop (`reread`)."),
    ] = False

    def configured(self, model: QZoom) -> QZoom:
        """The model, with the arithmetic that was given in place of its own (ConfigError: the model has no aligned
        positions)."""
        from qzoom.engine.zoom import check_positions
        from qzoom.model import QZoom

        config, rule = model.config, model.config.box
        components, most = self.components, self.max_regions
        if most is not None and most > 1 and components is None and rule.components not in ("all", "groups"):
            components = "all"
        rule = dataclasses.replace(
            rule,
            components=components or rule.components,
            max_regions=most or rule.max_regions,
            shares=self.region_shares or rule.shares,
            sparse=self.sparse or rule.sparse,
        )
        positions, decide_by = self.positions or config.positions, self.decide_by or config.decide_by
        reread = None if self.once else config.reread
        config = config.replace(box=rule, positions=positions, decide_by=decide_by, reread=reread)
        if self.positions is not None:
            check_positions(model.engine.backbone, config)
        if config == model.config:
            return model
        return QZoom(dataclasses.replace(model.engine, config=config), model.name, model.image_limits)

    def coarse(self) -> TokenBudget | int | None:
        """The limit of the coarse pass."""
        return parse_tokens(self.coarse_tokens, "--coarse-tokens")

    def thresholds(self, model: QZoom) -> dict[str, float | None]:
        """Gate and region threshold: given ones first, then the preset's, then None for the checkpoint's
        (typer.BadParameter: no preset of that name)."""
        given = {"gate_threshold": self.gate_threshold, "region_threshold": self.region_threshold}
        if self.preset is None:
            return given
        try:
            chosen = model.config.with_preset(self.preset)
        except ConfigError as error:
            raise typer.BadParameter(str(error), param_hint="--preset") from error
        return {name: getattr(chosen, name) if value is None else value for name, value in given.items()}


def find_device(name: str) -> str:
    """The device of a name; "auto" is a GPU where there is one (typer.BadParameter: no name of a device)."""
    from qzoom.checkpoints.base import choose_device

    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise typer.BadParameter(f"{name!r} is no device; give cpu, cuda, cuda:0 or auto.", param_hint="--device")
    return str(choose_device(name)) if name == "auto" else name


def split_inputs(inputs: list[str]) -> tuple[list[str], str]:
    """Pictures and question of one command line (typer.BadParameter: fewer than two words, a picture in the question's
    place, or more than one picture from standard input)."""
    if len(inputs) < 2:
        raise typer.BadParameter(
            'name at least one picture and then the question, for example: receipt.jpg "What is the total amount?"'
        )
    pictures, question = inputs[:-1], decode_argument(inputs[-1])
    if not question.strip():
        raise typer.BadParameter("the question is empty; ask something about the picture.")
    if os.path.isfile(question):
        raise typer.BadParameter(f"the question comes last, but {question!r} is a file; add a question after it.")
    if pictures.count("-") > 1:
        raise typer.BadParameter("only one picture can come from standard input.")
    return pictures, question


def decode_argument(text: str) -> str:
    """A text of the command line; under a locale that is not UTF-8 its bytes were kept as surrogates."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        return text


def parse_tokens(text: str | None, flag: str) -> TokenBudget | int | None:
    """Read MAX or MIN:MAX (typer.BadParameter: not whole numbers of at least 1, or a minimum above the maximum)."""
    from qzoom.config import TokenBudget

    if text is None:
        return None
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is neither MAX nor MIN:MAX in visual tokens, such as 144 or 64:144.", param_hint=flag
        )
    numbers = [int(part) for part in parts]
    if numbers[0] < 1:
        raise typer.BadParameter(f"{numbers[0]} is too small; the least is 1 visual token.", param_hint=flag)
    if numbers[0] > numbers[-1]:
        raise typer.BadParameter(f"the minimum {numbers[0]} is above the maximum {numbers[1]}.", param_hint=flag)
    return TokenBudget(numbers[0], numbers[1]) if len(numbers) == 2 else numbers[0]


def read_pictures(names: list[str], pages: str = "") -> list[LoadedImage]:
    """Decode the pictures and the pages of PDFs; `-` is standard input (typer.BadParameter: `-` with nothing piped in,
    or pages that are not there; ImageError: a picture that cannot be used)."""
    from qzoom.images.load import load_pictures

    try:
        return list(load_pictures([_read_stdin() if name == "-" else name for name in names], pages=pages))
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--pages") from error


def _read_stdin() -> bytes:
    from qzoom.images.limits import ImageLimits

    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("- reads a picture from standard input, but none is piped in.")
    return sys.stdin.buffer.read(ImageLimits().max_bytes + 1)
