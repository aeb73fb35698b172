"""The `qzoom` command: its verbs, and how errors become exit codes.

0 done, 1 it failed, 2 it was called wrongly, 130 interrupted. A failure is one sentence on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from qzoom import __version__
from qzoom.cli import label, train
from qzoom.cli.ask import ask
from qzoom.cli.calibrate import calibrate
from qzoom.cli.console import one_line
from qzoom.cli.convert import convert
from qzoom.cli.distill import decontaminate, distill
from qzoom.cli.doctor import doctor
from qzoom.cli.eval import evaluate
from qzoom.cli.eval_coverage import coverage
from qzoom.cli.eval_zoomgap import zoomgap
from qzoom.cli.mine import mine
from qzoom.cli.perceive import perceive
from qzoom.cli.report import report
from qzoom.cli.serve import serve
from qzoom.cli.train_distill import distill as train_distill
from qzoom.cli.train_heads import heads
from qzoom.cli.train_stages import add_stages
from qzoom.cli.two_words import TwoWords
from qzoom.errors import QZoomError

__all__ = ["app", "main", "run"]

INTERRUPTED = 130

app = typer.Typer(
    name="qzoom",
    cls=TwoWords,
    help="Look coarsely, decide, zoom, answer: questions about pictures with fine print.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(ask)
app.command()(perceive)
app.command()(serve)
app.command()(convert)
app.command()(doctor)
app.command("eval")(evaluate)
app.command("eval zoomgap")(zoomgap)
app.command("eval coverage")(coverage)
app.command()(calibrate)
app.command()(report)
train.app.command()(heads)
add_stages(train.app)
train.app.command("distill")(train_distill)
app.add_typer(train.app, name="train")
app.add_typer(label.app, name="label")
app.command()(mine)
app.command()(distill)
app.command("distill decontaminate")(decontaminate)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qzoom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: words after `qzoom`; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="qzoom", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            return _fail("interrupted.", code)
        return code if isinstance(code, int) else 0
    except QZoomError as error:
        return _fail(str(error), 1)
    except TyperException as error:
        return _wrong_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()
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
    """Entry point of the `qzoom` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(run())


def _fail(sentence: str, code: int) -> int:
    print(f"qzoom: {one_line(sentence)}", file=sys.stderr)
    return code


def _wrong_usage(error: TyperException) -> int:
    """One line: what is wrong with the call, and where its help is."""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "qzoom"
    text = error.format_message()
    if not text:
        return 2
    print(f"{verb}: {one_line(text)} See: {verb} --help", file=sys.stderr)
    return error.exit_code


def _forget_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush does not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
