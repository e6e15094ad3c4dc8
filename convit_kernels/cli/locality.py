"""`locality`: weights and images in, one figure of how local the attention is out."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from .locality_study import study
from .options import Device, JsonFile, file_to_write
from .output import console, said_written, whole, write_json

FORMATS = (".png", ".svg", ".pdf")


def command(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Write the figure here: .png, .svg or .pdf.", callback=file_to_write)],
    model: Annotated[str, typer.Option(help="One of convit_kernels.models, or a timm model.")] = "convit_small",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The weights (.safetensors or .pth); without: as initialised.", exists=True, dir_okay=False),
    ] = None,
    model_args: Annotated[str, typer.Option(help="Its other arguments as JSON: '{\"depth\": 6}'.")] = "{}",
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width of the images, in pixels.")] = None,
    query: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Row and column of the patch whose maps are drawn; without: the one in the centre."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """How local a model's attention is: a figure of non-locality, gates, and where one patch of the images looks."""
    from . import locality_figure
    from .loading import build_model, load_images

    if out.suffix not in FORMATS:
        raise ValueError(f"--out must end in one of {', '.join(FORMATS)}, but is {out}")
    network = build_model(model, _keywords(model_args), checkpoint)
    inputs, pictures = load_images(images, network, size)
    weights = "as initialised, untrained" if checkpoint is None else checkpoint.name
    count = f"{len(images)} image{'s' * (len(images) > 1)} of {inputs.shape[2]} x {inputs.shape[3]} pixels"
    title = f"{model}, {weights}; {count}"
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(model, total=len(images))
        network, inputs = network.to(device), inputs.to(device)
        try:
            result = study(network, inputs, pictures, query, title, batch, lambda done: progress.advance(task, done))
        except AssertionError as error:  # timm's models check their images so
            raise ValueError(f"{model} does not take these images: {error}") from error
    with whole(out) as draft:
        locality_figure.save(result, draft)
    said_written(out)
    write_json(json_file, result.to_json())


def _keywords(arguments: str) -> dict[str, Any]:
    """The keyword arguments that --model-args holds."""
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-args must be JSON, but is {arguments!r}: {error}") from error
    if not isinstance(keywords, dict):
        raise ValueError(f"--model-args must be a JSON object of names and values, but is {arguments!r}")
    return keywords
