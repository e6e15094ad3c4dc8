"""`profile`: where the time and memory of timm go and where ours, side by side."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..attention import backends
from .options import Device, JsonFile, file_to_write, folder_to_write
from .output import console, said_written, stop, whole, write_json


def command(
    model: Annotated[str, typer.Option(help="convit_tiny, _small or _base, or one of these with _plus.")] = (
        "convit_small"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    backward: Annotated[bool, typer.Option("--backward", help="A training step's forward and backward.")] = False,
    layer: Annotated[bool, typer.Option("--layer", help="One GPSA layer in place of the whole model.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compare: Annotated[
        str, typer.Option(help="eager, compile (timm's), auto (our fastest) or a backend; several with commas.")
    ] = "eager,auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each implementation, in turn.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a Chrome trace of each implementation into this folder.", callback=folder_to_write),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one page with tables and plots, which needs no network.", callback=file_to_write),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Where the time and memory of timm go and where ours: operators by phase, side by side."""
    from ..bench.accuracy import WrongResultsError
    from ..bench.profile import run, task
    from ..bench.profile_tables import tables

    if html is not None:
        from ..bench.profile_page import render
    names = compare.split(",")
    allowed = ["eager", "compile", "auto", *(backend.name for backend in backends())]
    for name in names:
        if name not in allowed:
            raise ValueError(f"--compare: unknown backend {name!r}: allowed are {', '.join(allowed)}")

    def say(text: str) -> None:  # plain lines: a spinner's thread would take its share of what is measured
        console.print(text, style="dim", highlight=False)

    work = task(model, batch, backward, layer, device, dtype)
    try:
        with nullcontext() if trace is None else whole(trace) as folder:
            profile = run(work, names, repeats, folder, say)
    except WrongResultsError as error:
        raise stop(error, 1) from error
    console.print(*tables(profile), sep="\n")
    if trace is not None:
        said_written(trace)
    if html is not None:
        with whole(html) as draft:
            draft.write_text(render(profile))
        said_written(html)
    write_json(json_file, profile.to_json())
