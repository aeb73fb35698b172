"""`qzoom distill` and `qzoom distill decontaminate`: Region-to-Image data, and a search for benchmark images."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import OutputOptions
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from qzoom.distill.recipe import DatasetRecipe
    from qzoom.distill.run import RunReport

Data = Annotated[Path | None, optional("Folder that replaces {data} in the recipe's `pictures`.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Discard stored results; with --step, of that step and the later ones.")
]
_NOT_COMPARED = "not compared with any benchmark"


@flatten
def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see docs/distill.md.", show_default=False)],
    *,
    out: OutputOptions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run; default: runs/distill/ followed by the recipe's name."),
    ] = None,
    data: Data = None,
    step: Annotated[
        str | None, optional("With --fresh: discard the results of this step and the later ones.", "--step")
    ] = None,
    engine: Annotated[Literal["inprocess", "ray"] | None, optional("Overrides the recipe.")] = None,
    limit: Annotated[int | None, optional("Use only the first N images.", min=1)] = None,
    fresh: Fresh = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Make Region-to-Image training data: teachers answer from crops, the questions are about whole images.

    Running the command again uses stored results and computes what is missing.

    Example: qzoom distill recipes/distill/tiny-rules.yaml -o runs/distill/tiny-rules
    """
    from qzoom.distill.recipe import load_recipe
    from qzoom.distill.run import run_recipe

    console = out.console
    if step is not None and not fresh:
        raise typer.BadParameter("--step names where --fresh starts; give both, or neither.")
    settings = load_recipe(recipe, data)
    if engine is not None:
        settings = dataclasses.replace(settings, engine=engine)
    folder = output or Path("runs/distill") / recipe.stem
    if folder.is_file():
        raise typer.BadParameter(f"{folder} is a file; name a folder.", param_hint="--output")
    if dry_run:
        _plan(settings, folder, limit, console, json=out.json)
        return
    _need("datasets", *(["imagehash"] if settings.decontaminate.against else []))
    with console.progress("pictures", "export") as (pictures, exported):
        fresh_from = (step or "pictures") if fresh else None
        report = run_recipe(
            settings, folder, limit=limit, fresh_from=fresh_from, on_picture=pictures, on_export=exported
        )
    if out.json:
        console.record(report.to_dict())
    else:
        _say(report, console)
    for reason, count in report.stats.waiting.most_common(3):
        console.note(f"{count} items wait for a rerun: {reason}")
    if not any(report.rows.values()):
        console.note("No row was exported: no item was kept by all steps; `qzoom train student` has nothing to read.")
        raise typer.Exit(1)


@flatten
def decontaminate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set, or any folder of images.")],
    *,
    out: OutputOptions,
    against: Annotated[
        list[str], typer.Option("--against", help="Benchmark: folder or file, as qzoom eval reads it. May be repeated.")
    ],
    bits: Annotated[
        int, typer.Option(min=0, max=64, help="Maximum number of differing bits of a hash (of 64) for a match.")
    ] = 8,
    flips: Annotated[bool, typer.Option(help="Also compare mirrored images.")] = True,
) -> None:
    """Search for images of benchmarks in the training data, by perceptual hashes.

    Example: qzoom distill decontaminate runs/distill/tiny-rules/dataset --against data/vstar
    """
    from qzoom.distill.decontaminate import DecontaminateSettings
    from qzoom.distill.decontaminate import decontaminate as run

    console = out.console
    _need("imagehash", "pyarrow")
    report = run(folder, DecontaminateSettings(tuple(against), bits, bits, flips))
    if out.json:
        console.record(dataclasses.asdict(report))
        return
    for match in report.matches:
        mirrored = ", mirrored" if match.mirrored else ""
        console.result(f"{match.picture}  {match.benchmark}  pHash {match.phash}, dHash {match.dhash}{mirrored}")
    console.result(
        f"{len(report.matches)} of {report.pictures} pictures look like one of {report.benchmark_pictures} benchmark "
        "pictures."
    )
    if report.unreadable:
        console.note(f"{report.unreadable} pictures could not be read.")


def _need(*packages: str) -> None:
    """Stop before any work when a package is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(f"Distilling needs {', '.join(missing)}; install with: pip install 'qzoom[distill]'.")


def _plan(recipe: DatasetRecipe, folder: Path, limit: int | None, console: Console, *, json: bool) -> None:
    """Print what would be done."""
    from qzoom.distill.pictures import list_sources

    pictures = len(list_sources(recipe.pictures)[:limit])
    roles = [[role, member.label, member.by] for role, member in recipe.roles.members()]
    if json:
        values = {"pictures": pictures, "steps": [*recipe.steps, "export"], "roles": roles}
        console.record({**values, "engine": recipe.engine, "folder": str(folder)})
        return
    console.result(
        f"{pictures} pictures through {', '.join((*recipe.steps, 'export'))}, {recipe.engine}, into {folder}"
    )
    for role, label, by in roles:
        console.result(f"{role}: {label} (by {by})")


def _say(report: RunReport, console: Console) -> None:
    """Print the results, step by step."""
    stats = report.stats
    refused = sum(stats.refused_pictures.values())
    console.result(f"pictures: {stats.pictures} used, {refused} refused, {stats.duplicates} twice")
    for step in stats.entered:
        reasons = stats.refused.get(step)
        most = f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""
        console.result(f"{step}: {stats.entered[step]} in, {stats.kept[step]} kept{most}")
    for cost in report.cost:
        console.result(
            f"{cost['role']} {cost['name']} at {cost['url']}: {cost['requests']} requests, {cost['failures']} failed, "
            f"{cost['prompt_tokens']} + {cost['completion_tokens']} tokens, {cost['money']:.4g} spent"
        )
    rows = ", ".join(f"{count} {split}" for split, count in report.rows.items())
    compared = f"{len(report.matches)} pictures look like a benchmark's" if report.compared else _NOT_COMPARED
    console.result(f"{rows} rows in {report.folder}; {compared}")
