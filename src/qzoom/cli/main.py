"""The `qzoom` command: the table of its commands, and how errors become exit codes.

0 done, 1 failed, 2 wrong usage, 130 interrupted. A failure is one sentence on standard error.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
from typer.exceptions import TyperException
from typer.models import CommandInfo

from qzoom import __version__
from qzoom.cli.console import one_line
from qzoom.errors import BudgetError, LengthError, QZoomError, RecipeError

INTERRUPTED = 130

_COMMANDS: dict[str, Any] = {
    "ask": ("ask:ask", "Ask a question about an image."),
    "perceive": ("ask:perceive", "Print the gate's score and the regions, without an answer."),
    "serve": ("serve:serve", "Serve a model over HTTP: OpenAI's chat completions, and a web page."),
    "vllm-args": ("engines:vllm_args", "Print the arguments with which vLLM serves a model that looks."),
    "mcp": ("mcp:mcp", "Serve tools to agents: ask about a picture, get the region as a picture."),
    "batch": ("batch:batch", "Answer a file of questions: OpenAI's batch lines or our own, resumable."),
    "convert": ("doctor:convert", "Convert checkpoints, and published label files to records."),
    "models": ("models:models", "List the model ids that work, and the memory that they need."),
    "recipes": ("models:recipes", "List the recipes that come with qzoom."),
    "recipes copy": ("models:copy_recipe", "Copy a recipe, to edit it and to run it."),
    "doctor": ("doctor:doctor", "Check the installation: versions, device, threads, models."),
    "eval": ("eval:evaluate", "Evaluate answers, regions, tokens and time on images with known answers."),
    "eval zoomgap": ("zoomgap:zoomgap", "Measure the accuracy on the region minus that on the whole image."),
    "eval coverage": ("zoomgap:coverage", "Measure how much attention falls on the answer box."),
    "calibrate": ("calibrate:calibrate", "Choose thresholds for a share of zooms, a latency or a loss."),
    "report": ("eval:report", "Compare evaluations on one page."),
    "train": {
        "regions": ("train:regions", "Train the region branch (stages 1 and 2.5)."),
        "answers": ("train:answers", "Train the decoder to answer from coarse pass and region (stage 2)."),
        "gate": ("train:gate", "Train the gate (stage 3)."),
        "student": ("train:student", "Train a student on distilled questions: sft, grpo, or both."),
    },
    "label": {
        "regions": ("label:regions", "Make region labels from attention, or from known boxes (stage 1)."),
        "gate": ("label:gate", "Make gate labels by resolution, or by zoom (stage 3)."),
        "hard-cases": ("label:hard_cases", "Find questions that zooming makes wrong, or right (stage 2)."),
    },
    "distill": ("distill:distill", "Make training data: teachers answer from crops."),
    "distill decontaminate": ("distill:decontaminate", "Find images of benchmarks in the training data."),
}
"""Every command: the function that runs it, below `qzoom.cli`, and its line in the help. A module is imported when its
command is called or the help of that command is shown."""
_GROUPS = {"train": "Train models from recipes.", "label": "Make training labels from the model's own answers."}


class _Commands(dict[str, Any]):
    """Commands by name, imported when one is taken."""

    def __getitem__(self, name: str) -> Any:
        entry = super().__getitem__(name)
        if isinstance(entry, tuple):
            entry = self[name] = _load(name, entry[0])
        return entry

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


class _Group(typer.core.TyperGroup):
    """A group that imports commands late, and finds one of two words before one of its first word."""

    commands: _Commands

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        table: dict[str, Any] = _COMMANDS if self.name in (None, "", "qzoom") else _COMMANDS[self.name]
        self.commands = _Commands(table | dict(self.commands))
        self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table; a shell completes single words."""
        return [name for name in self.commands if not ctx.resilient_parsing or " " not in name]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; while the help lists commands, one with a name and a line only."""
        entry = dict.get(self.commands, cmd_name)
        if self._listing and isinstance(entry, tuple):
            return typer.core.TyperCommand(cmd_name, help=entry[1])
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, without importing any command."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command of the first two words, else of the first."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)


def _load(name: str, target: str) -> Any:
    module, _, function = target.partition(":")
    info = CommandInfo(name=name, callback=getattr(importlib.import_module(f"qzoom.cli.{module}"), function))
    return typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="markdown")


app = typer.Typer(
    name="qzoom",
    cls=_Group,
    help="Ask vision-language models about images with fine print: a coarse pass first, then, if needed, "
    "a zoom into a region.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _help in _GROUPS.items():
    app.add_typer(typer.Typer(cls=_Group, callback=lambda: None, no_args_is_help=True, help=_help), name=_name)


def _version(wanted: object) -> None:
    if wanted:
        print(f"qzoom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line. `arguments`: words after `qzoom`; None takes the process's own."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="qzoom", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            return _fail("interrupted.", code)
        return code if isinstance(code, int) else 0
    except (BudgetError, RecipeError) as error:
        return _fail(str(error), 2)
    except LengthError as error:
        advice = "shorten the question, or lower --max-new-tokens, --coarse-tokens or --region-tokens"
        return _fail(f"{error.facts(*error.numbers)}; {advice}.", 2)
    except QZoomError as error:
        return _fail(str(error), 1)
    except TyperException as error:
        return _wrong_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # Standard output leads nowhere now, so that the interpreter's last flush does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = f"{error.strerror or error}"
        where = f" {error.filename!r}" if error.filename else ""
        return _fail(f"The system refused{where}: {what}.", 1)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("The memory ran out; allow fewer --coarse-tokens and --region-tokens, or use smaller pictures.", 1)


def _out_of_memory(error: Exception) -> bool:
    """Whether the process or its GPU had no memory left; torch's CPU allocator says so in a plain RuntimeError."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


def main() -> None:
    """Entry point of the `qzoom` command.

    The libraries make millions of objects that stay. Rarer collections, and none of what is left at the end, save a
    quarter of the time that a short command takes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.set_threshold(50_000, 20, 100)
    code = run()
    gc.freeze()
    sys.exit(code)


def _fail(sentence: str, code: int) -> int:
    print(f"qzoom: {one_line(sentence)}", file=sys.stderr)
    return code


_PLAIN = {
    "Value error, ": "",
    "Input should be a valid number, unable to parse string as a number": "it must be a number",
    "Input should be a valid integer, unable to parse string as an integer": "it must be a whole number",
    "Input should be less than or equal to": "it must be a number of at most",
    "Input should be greater than or equal to": "it must be a number of at least",
}
"""Words of the library that reads option values, and plainer ones."""


def _wrong_usage(error: TyperException) -> int:
    """One line: what is wrong with the call, and where its help is."""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "qzoom"
    text = error.format_message()
    if not text:
        return 2
    for theirs, ours in _PLAIN.items():
        text = text.replace(theirs, ours)
    text += "" if text.rstrip().endswith((".", "?", "!")) else "."
    print(f"{verb}: {one_line(text)} See: {verb} --help", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
