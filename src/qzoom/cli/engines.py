"""Which engine answers behind a command, and `qzoom vllm-args`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import ModelOptions, find_device
from qzoom.errors import ConfigError
from qzoom.keys import read_key, read_keys

if TYPE_CHECKING:
    from qzoom.model import QZoom
    from qzoom.serving.engines.base import ServingEngine
    from qzoom.serving.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What answers: this process, vLLM inside it, or vLLM servers elsewhere."""

    engine: Annotated[
        Literal["native", "vllm", "remote", "answer"] | None,
        optional(
            "native (default) answers in this process, vllm starts vLLM with qzoom's plug-in, remote asks the "
            "vLLM servers of --engine-url, answer looks here and lets the model of --answer-url answer. "
            "docs/deploy.md says which one for whom.",
            envvar="QZOOM_SERVE_ENGINE",
        ),
    ] = None
    engine_url: Annotated[
        list[str] | None,
        optional(
            "Address of a `vllm serve $(qzoom vllm-args MODEL)`, as http://HOST:PORT; may be repeated. Its API "
            "key is read from QZOOM_ENGINE_KEY.",
            envvar="QZOOM_SERVE_ENGINE_URL",
        ),
    ] = None
    engine_option: Annotated[
        list[str] | None,
        optional(
            "Option of vLLM for --engine vllm, such as tensor_parallel_size=2 or max_model_len=32768; may be repeated.",
            envvar="QZOOM_SERVE_ENGINE_OPTION",
            metavar="NAME=VALUE",
        ),
    ] = None

    answer_url: Annotated[
        str | None,
        optional(
            "OpenAI-compatible endpoint that answers, as http://HOST:PORT/v1. Its API key is read from "
            "QZOOM_ANSWER_KEY.",
            envvar="QZOOM_SERVE_ANSWER_URL",
        ),
    ] = None
    answer_model: Annotated[
        str | None, optional("Name of the model at --answer-url.", envvar="QZOOM_SERVE_ANSWER_MODEL")
    ] = None
    replicas: Annotated[
        int,
        typer.Option(
            envvar="QZOOM_SERVE_REPLICAS",
            min=0,
            max=4096,
            help="Engines on Ray Serve, each with the model; 0 starts none and answers without Ray.",
        ),
    ] = 0
    ray_address: Annotated[
        str,
        optional(
            'A running Ray cluster for --replicas, or "auto" for this machine\'s; else Ray is started here.',
            envvar="QZOOM_SERVE_RAY_ADDRESS",
        ),
    ] = ""

    @property
    def name(self) -> str:
        """The engine; addresses alone mean `remote` or `answer` (typer.BadParameter: options that contradict each
        other)."""
        name = self.engine or ("remote" if self.engine_url else "answer" if self.answer_url else "native")
        if (name == "remote") != bool(self.engine_url):
            text = "--engine remote needs --engine-url." if name == "remote" else f"--engine {name} takes no address."
            raise typer.BadParameter(text, param_hint="--engine-url")
        answers = (self.answer_url, self.answer_model)
        if not all(answers) if name == "answer" else any(answers):
            text = "--engine answer needs --answer-url and --answer-model; other engines take neither."
            raise typer.BadParameter(text, param_hint="--answer-url")
        if self.replicas and name not in ("native", "vllm"):
            raise typer.BadParameter(f"--engine {name} has no replicas here.", param_hint="--replicas")
        if self.engine_option and name != "vllm":
            raise typer.BadParameter("only --engine vllm takes them.", param_hint="--engine-option")
        return name

    def check(self, model: ModelOptions) -> None:
        """Refuse what no engine of `qzoom serve` would be told (typer.BadParameter)."""
        name = self.name
        if self.ray_address and not self.replicas:
            raise typer.BadParameter("it is of use with --replicas only.", param_hint="--ray-address")
        if name in ("native", "answer"):
            return
        where = "set it in --engine-option" if name == "vllm" else "set it where vLLM is started"
        if model.quantization is not None:
            raise typer.BadParameter(f"--engine {name} is not told; {where}.", param_hint="--quantization")
        if model.device not in ("auto", "cuda") and not self.replicas:
            text = f"--engine {name} is not told; choose the GPU with CUDA_VISIBLE_DEVICES."
            raise typer.BadParameter(text, param_hint="--device")

    def start(self, model: ModelOptions, settings: ServerSettings) -> ServingEngine:
        """Load the model, or what of it the front end needs, and start or greet the engine (QZoomError: the model
        cannot be used, or the engine does not start or answer)."""
        if self.replicas:
            return self._start_replicas(model, settings)
        if self.name in ("native", "answer"):
            return self._start_native(model, settings)
        from qzoom.integrations.vllm.arguments import engine_arguments

        own = {"dtype": model.dtype, "max_num_seqs": settings.scheduler.slots} | parse_options(self.engine_option)
        limits = settings.limits
        arguments = engine_arguments(
            model.model, revision=model.revision, visual_tokens=limits.visual_tokens, pictures=limits.pictures
        )
        front = front_model(model)
        if self.name == "vllm":
            from qzoom.serving.engines.vllm import VllmEngine

            return VllmEngine(front, settings.scheduler, arguments | own)
        from qzoom.checkpoints.hub import find_source
        from qzoom.checkpoints.load import checkpoint_identity
        from qzoom.serving.engines.remote import RemoteEngine

        identity = checkpoint_identity(find_source(model.model, model.revision))
        key = read_key("QZOOM_ENGINE_KEY")
        return RemoteEngine(front, settings.scheduler, self.engine_url or (), identity=identity, key=key)

    def _start_native(self, model: ModelOptions, settings: ServerSettings) -> ServingEngine:
        """The model in this process, which answers or only looks."""
        device = find_device(model.device)
        dtype = "float32" if model.dtype == "auto" and device == "cpu" else model.dtype
        loaded = dataclasses.replace(model, device=device, dtype=dtype).load()
        if self.answer_url and self.answer_model:
            from qzoom.serving.engines.answer import KEY, AnswerEngine

            return AnswerEngine(loaded, settings, self.answer_url, self.answer_model, key=read_key(KEY))
        from qzoom.serving.engines.native import NativeEngine

        return NativeEngine(loaded, settings)

    def _start_replicas(self, model: ModelOptions, settings: ServerSettings) -> ServingEngine:
        """Replicas of this engine on Ray Serve."""
        from qzoom.cluster import start_ray

        if self.name == "vllm" and not self.ray_address and find_spec("vllm") is None:
            raise ConfigError("The replicas need vLLM here; install it with: pip install 'qzoom[vllm]'.")
        ray, own = start_ray("serve", self.ray_address, self.replicas + 1, ", or leave --replicas out")
        from qzoom.serving.engines.ray import RayEngine, start_replicas, stop_replicas

        one = dataclasses.replace(self, replicas=0)
        placed = dataclasses.replace(model, device=find_device(model.device))
        gpus = 1.0 if placed.device.startswith("cuda") else 0.0
        handle = start_replicas(partial(one.start, placed, settings), settings, self.replicas, gpus=gpus)
        on_close = ray.shutdown if own else stop_replicas
        native = self.name == "native"
        return RayEngine(front_model(model), handle, settings.scheduler, on_close=on_close, native=native)


def front_model(model: ModelOptions) -> QZoom:
    """Tokenizer, arithmetic and limits of a model whose base runs elsewhere."""
    from qzoom.checkpoints.load import load_engine
    from qzoom.model import QZoom

    engine = load_engine(model.model, revision=model.revision, dtype="float32", base_weights=False)
    return QZoom(engine, model.model)


def ray_app(args: dict[str, str]) -> Any:
    """The application of `deploy/ray-serve.yaml`: front end and replicas as deployments of a Ray cluster.

    Args:
        args: of the file: `model`, and optionally `name` (for clients), `engine` (native or vllm), `device`, `dtype`.
            Keys of clients come from QZOOM_API_KEY, separated by commas or blanks.

    Raises:
        ConfigError: an unknown argument, or QZOOM_API_KEY is set but holds no key.
    """
    from qzoom.serving.engines.ray import bind_engine, bind_front_end
    from qzoom.serving.settings import ServerSettings
    from qzoom.settings import closest

    known = ("model", "name", "engine", "device", "dtype")
    for name in args:
        if name not in known:
            raise ConfigError(f"args of the Serve file: unknown {name!r}; {closest(name, known)}")
    model = ModelOptions(
        args.get("model", "tiny"),
        device=find_device(args.get("device", "auto")),
        dtype=args.get("dtype", "auto"),  # type: ignore[arg-type]
    )
    settings = ServerSettings(model_name=args.get("name", model.model), api_keys=read_keys("QZOOM_API_KEY"))
    one = EngineOptions(engine=args.get("engine", "native"))  # type: ignore[arg-type]
    gpus = 1.0 if model.device.startswith("cuda") else 0.0
    engine = bind_engine(partial(one.start, model, settings), settings.scheduler, 1, gpus)
    return bind_front_end(engine, partial(front_model, model), settings, native=one.name == "native")


def parse_options(words: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE words; values are JSON, or texts (typer.BadParameter: not of that form)."""
    values: dict[str, Any] = {}
    for word in words or ():
        name, mark, text = word.partition("=")
        if not mark or not name.isidentifier():
            text = f"{word!r} is not NAME=VALUE, such as max_model_len=32768."
            raise typer.BadParameter(text, param_hint="--engine-option")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


@flatten
def vllm_args(
    *,
    model: Annotated[str, typer.Argument(help="The model: tiny, a folder or a hub id, as for other commands.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    visual_tokens: Annotated[
        int, typer.Option(min=1, help="Most visual tokens of one picture; vLLM sets memory aside for such a picture.")
    ] = 16_384,
    pictures: Annotated[int, typer.Option(min=1, help="Most pictures of one request.")] = 8,
) -> None:
    """Print the arguments with which vLLM serves a model that looks: vllm serve $(qzoom vllm-args MODEL).

    Add vLLM's own options behind it. qzoom must be installed beside vLLM, which finds the plug-in by itself. Then start
    the front end with qzoom serve --model MODEL --engine-url http://HOST:PORT.
    """
    from qzoom.integrations.vllm.arguments import command_line, engine_arguments

    found = engine_arguments(model, revision=revision, visual_tokens=visual_tokens, pictures=pictures)
    print(" ".join(command_line(found)))
