"""`report`: what the benchmarks measured, and what changed since older results."""

from pathlib import Path
from typing import Annotated

import typer

from .options import folder_to_write
from .output import console, said_written, whole


def command(
    results: Annotated[
        Path, typer.Argument(help="What pytest benchmarks --benchmark-json wrote.", exists=True, dir_okay=False)
    ],
    against: Annotated[
        Path | None, typer.Option(help="Older results: what became slower or faster.", exists=True, dir_okay=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the figures into this folder, as SVG and PNG.", callback=folder_to_write),
    ] = None,
) -> None:
    """The results of the benchmarks as tables and figures; exits with 1 where something became slower."""
    from ..bench.compare import changes
    from ..bench.report import comparison, tables
    from ..bench.results import load

    new = load(results)
    old = load(against) if against else None
    files: list[Path] = []
    if out is not None:
        from ..bench.figures import write_figures

        with whole(out) as folder:
            files = [out / file.name for file in write_figures(new, folder)]
    console.print(*tables(new), sep="\n")
    for file in files:
        said_written(file)
    if old is not None:
        differences = changes(new.rows, old.rows)
        console.print(*comparison(new, old, differences), sep="\n")
        if any(change.verdict == "slower" for change in differences):
            raise typer.Exit(1)
