"""The command `locality`: weights and images in, one figure of how local the attention is out."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from timm.data import create_transform, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from . import models
from .bench.measure import check_device
from .bench.style import PRINT, save, style
from .locality import LayerLocality, attention_maps, nonlocality

FORMATS = (".png", ".svg", ".pdf")
PICTURES = 4  # images in the figure, the first ones; the numbers are of all
MAPS = 6  # layers whose maps are shown
MOST_NUMBERS = 200  # cells of a table of gates in which numbers can still be read


class Study(NamedTuple):
    """What was found in one model."""

    title: str
    layers: list[LayerLocality]
    pictures: list[Tensor]  # (H, W, 3) in [0, 1]
    maps: dict[str, Tensor]  # by layer, (pictures, rows, columns): means over heads
    query: tuple[int, int]
    images: int

    def to_json(self) -> dict[str, Any]:
        def values(tensor: Tensor | None) -> list[float] | None:
            return None if tensor is None else tensor.tolist()

        parts = ("nonlocality", "content", "position", "gate")
        layers = [
            {"name": layer.name} | {part: values(getattr(layer, part)) for part in parts} for layer in self.layers
        ]
        return {"title": self.title, "images": self.images, "query": list(self.query), "layers": layers}


def build(name: str, arguments: Mapping[str, Any], checkpoint: Path | None) -> nn.Module:
    """A model of this package or of timm with a checkpoint's weights, or with seeded initial ones.

    The number of classes follows from the checkpoint's head.

    Raises:
        ValueError: an unknown model, arguments that it does not take, or a file that does not hold its weights.
    """
    if name not in models.SIZES and not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}: allowed are {', '.join(models.SIZES)} and timm's models")
    create = getattr(models, name) if name in models.SIZES else lambda **given: timm.create_model(name, **given)
    state: Mapping[str, Tensor] = {}
    if checkpoint is not None:
        try:
            state = load_state_dict(str(checkpoint), device="cpu", weights_only=True)
        except Exception as error:  # a damaged or foreign file fails in many ways
            raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {error}") from error
        if "head.weight" in state:
            arguments = {"num_classes": state["head.weight"].shape[0]} | dict(arguments)
    torch.manual_seed(0)
    try:
        model: nn.Module = create(**arguments)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if checkpoint is not None:
        if mismatch := _mismatch(state, model.state_dict()):
            raise ValueError(
                f"{checkpoint} does not hold the weights of {name}: {mismatch}. "
                "Where the model has other sizes, --model-args gives them"
            )
        model.load_state_dict(state)
    return model.eval()


def _mismatch(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """In what a state_dict differs from the one that is needed, with one example of each kind; "" if in nothing."""
    differences = {
        "parameters are missing": [key for key in expected if key not in given],
        "are unknown": [key for key in given if key not in expected],
        "have another shape": [
            f"{key} {tuple(given[key].shape)}, not {tuple(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
    }
    return ", ".join(f"{len(keys)} {kind} ({keys[0]})" for kind, keys in differences.items() if keys)


def load_images(paths: Sequence[Path], model: nn.Module, size: tuple[int, int] | None) -> tuple[Tensor, list[Tensor]]:
    """The images as the model takes them, (B, C, H, W), and as pictures, (H, W, 3) in [0, 1].

    The largest central part of the asked-for shape, resized; normalised as timm's configuration of the model says.

    Raises:
        ValueError: a file that is no image.
    """
    config = resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    channels = getattr(model, "in_chans", config["input_size"][0])
    height, width = size or getattr(embed, "img_size", None) or config["input_size"][1:]
    mean, std = config["mean"], config["std"]
    if len(mean) != channels:
        mean, std = (channels * (sum(values) / len(values),) for values in (mean, std))
    crop = create_transform(
        (channels, height, width), interpolation=config["interpolation"], mean=mean, std=std, crop_pct=1.0
    )
    inputs = []
    for path in paths:
        try:
            with Image.open(path) as image:
                inputs.append(crop(image.convert("L" if channels == 1 else "RGB")))
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    shape = (channels, 1, 1)
    pictures = [image * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape) for image in inputs]
    return torch.stack(inputs), [picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0) for picture in pictures]


def check_arguments(out: Path, json_file: Path | None, device: str) -> None:
    """Raises ValueError for a file that could not be written, or an unusable device."""
    if out.suffix not in FORMATS:
        raise ValueError(f"--out must end in one of {', '.join(FORMATS)}, but is {out}")
    for path in (out, json_file):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: {path.parent} is no directory")
    check_device(device)


def run(
    name: str,
    arguments: str,
    checkpoint: Path | None,
    images: Sequence[Path],
    size: tuple[int, int] | None,
    query: tuple[int, int] | None,
    batch: int,
    device: str,
    console: Console,
) -> Study:
    """The whole study, under a progress bar. Raises ValueError for whatever of its arguments does not fit."""
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-args must be JSON, but is {arguments!r}: {error}") from error
    if not isinstance(keywords, dict):
        raise ValueError(f"--model-args must be a JSON object of names and values, but is {arguments!r}")
    model = build(name, keywords, checkpoint)
    inputs, pictures = load_images(images, model, size)
    weights = "as initialised, untrained" if checkpoint is None else checkpoint.name
    count = f"{len(images)} image{'s' * (len(images) > 1)} of {inputs.shape[2]} x {inputs.shape[3]} pixels"
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(images))
        title = f"{name}, {weights}; {count}"
        model, inputs = model.to(device), inputs.to(device)
        try:
            return study(model, inputs, pictures, query, title, batch, lambda done: progress.advance(task, done))
        except AssertionError as error:  # timm's models check their images so
            raise ValueError(f"{name} does not take these images: {error}") from error


def study(
    model: nn.Module,
    inputs: Tensor,
    pictures: list[Tensor],
    query: tuple[int, int] | None,
    title: str,
    batch: int,
    step: Callable[[int], None],
) -> Study:
    """Measures the model on images, `batch` at a time; calls `step` with how many were done.

    Without a query the maps are those of the patch in the centre.
    """
    shown = min(len(pictures), PICTURES)
    if query is None:
        rows, columns = next(iter(attention_maps(model, inputs[:1], (0, 0)).values())).shape[2:]
        query = rows // 2, columns // 2
    maps = attention_maps(model, inputs[:shown], query)

    def batches() -> Iterator[Tensor]:
        for part in inputs.split(batch):
            yield part
            step(len(part))

    layers = nonlocality(model, batches())
    means = {name: attention.mean(dim=1).cpu() for name, attention in maps.items()}
    return Study(title, layers, pictures[:shown], means, query, len(inputs))


def figure(found: Study) -> Figure:
    """Non-locality by layer, gates by layer and head, and where one query of each picture looks."""
    shown = _evenly(list(found.maps), MAPS)
    count = len(found.pictures)
    height, width = found.pictures[0].shape[:2]
    maps_height = 0.4 + count * min(1.7 * height / width, 4.0)  # inches
    with mpl.rc_context(style(PRINT) | {"font.size": 10, "axes.titlesize": 10.5}):
        made = Figure(figsize=(12, 4.4 + maps_height), layout="constrained")
        made.suptitle(found.title, fontsize=12)
        halves: Any = made.subfigures(2, 1, height_ratios=(4.0, maps_height))
        upper, lower = halves
        distances, gates = upper.subplots(1, 2)
        _draw_distances(distances, found)
        _draw_gates(gates, found, upper)
        row, column = found.query
        place = f"row {row}, column {column} (from 0)"
        lower.suptitle(f"Where the patch in {place} looks: mean over heads, each map by its own maximum")
        cells = lower.subplots(count, 1 + len(shown), squeeze=False)
        for line, picture in enumerate(found.pictures):
            for cell, name in zip(cells[line], [None, *shown], strict=True):
                _draw_picture(cell, picture, None if name is None else found.maps[name][line], found)
                if line == 0:
                    cell.set_title("query" if name is None else f"layer {list(found.maps).index(name) + 1}")
    return made


def _evenly(names: list[str], count: int) -> list[str]:
    """The first, the last and evenly spaced ones between."""
    if len(names) <= count:
        return names
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


def _uniform(grid: tuple[int, int]) -> float:
    """Non-locality of attention that is the same everywhere."""
    rows, columns = (np.subtract.outer(np.arange(side), np.arange(side)) for side in grid)
    return float(np.hypot(rows[:, None, :, None], columns[None, :, None, :]).mean())


def _draw_distances(axes: Axes, found: Study) -> None:
    layers = range(1, len(found.layers) + 1)
    grid = next(iter(found.maps.values())).shape[1:]
    uniform = _uniform((grid[0], grid[1]))
    axes.axhline(uniform, color="#999999", linestyle=":", label="uniform attention")
    for number, layer in zip(layers, found.layers, strict=True):
        heads = layer.nonlocality.tolist()
        axes.plot([number] * len(heads), heads, "o", color="#56B4E9", markersize=3.5, alpha=0.7, markeredgewidth=0)
    axes.plot([], [], "o", color="#56B4E9", markersize=3.5, label="each head")
    for part, label, look in (
        ("content", "content alone", {"color": "#E69F00", "linestyle": "--"}),
        ("position", "position alone", {"color": "#009E73", "linestyle": "--"}),
        ("nonlocality", "mean over heads", {"color": "#0072B2", "linewidth": 2.2, "marker": "o", "markersize": 5}),
    ):
        means = {
            number: getattr(layer, part).mean().item()
            for number, layer in zip(layers, found.layers, strict=True)
            if getattr(layer, part) is not None
        }
        if means:
            axes.plot(list(means), list(means.values()), label=label, **look)
    axes.set(
        title="How far attention looks (non-locality, equation 8)",
        xlabel="layer",
        ylabel="mean distance, patches",
        ylim=(0, None),
        xlim=(0.5, len(found.layers) + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_gates(axes: Axes, found: Study, parent: SubFigure) -> None:
    axes.grid(False)
    heads = max(len(layer.nonlocality) for layer in found.layers)
    table = np.full((heads, len(found.layers)), np.nan)
    for column, layer in enumerate(found.layers):
        if layer.gate is not None:
            table[: len(layer.gate), column] = layer.gate.cpu().numpy()
    extent = (0.5, len(found.layers) + 0.5, heads + 0.5, 0.5)
    drawn = axes.imshow(table, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest")
    axes.set(title="Gates: the share of position in each head", xlabel="layer", ylabel="head")
    axes.set_facecolor("#eeeeee")
    if table.size <= MOST_NUMBERS:
        for (head, column), value in np.ndenumerate(table):
            text = "" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
            colour = "white" if abs(value - 0.5) > 0.35 else "black"
            axes.text(column + 1, head + 1, text, ha="center", va="center", fontsize=7, color=colour)
    if np.isnan(table).all():
        axes.text(0.5, 0.5, "no GPSA layer", transform=axes.transAxes, ha="center", va="center")
    elif np.isnan(table).any():
        axes.set_xlabel("layer (grey: plain attention, which has no gate)")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(16, integer=True))
    parent.colorbar(drawn, ax=axes, ticks=[0, 0.5, 1]).ax.set_yticklabels(["content", "half", "position"])


def _draw_picture(axes: Axes, picture: Tensor, attention: Tensor | None, found: Study) -> None:
    axes.axis("off")
    height, width = picture.shape[:2]
    extent = (0, width, height, 0)
    if attention is None:
        axes.imshow(picture.numpy(), extent=extent)
    else:
        grey = picture.mean(dim=-1).numpy()
        axes.imshow(0.25 + 0.5 * grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        strength = (attention / attention.max()).float().cpu().numpy()
        axes.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=0.85 * strength**0.5, extent=extent)
    rows, columns = next(iter(found.maps.values())).shape[1:]
    size = width / columns, height / rows
    corner = found.query[1] * size[0], found.query[0] * size[1]
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#00E5FF", linewidth=1.4))


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """Has `content` write a file, which takes the place of the one at `path` only when it is whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        content(unfinished)
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)  # mkstemp's are for their owner only
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_figure(found: Study, path: Path) -> None:
    write(path, lambda unfinished: save(figure(found), unfinished))


def write_json(found: Study, path: Path) -> None:
    write(path, lambda unfinished: unfinished.write_text(json.dumps(found.to_json(), indent=2) + "\n"))
