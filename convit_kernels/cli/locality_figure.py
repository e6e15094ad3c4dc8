"""The figure of `locality`: non-locality by layer, gates by layer and head, and where one patch of the images looks."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..bench import style
from .locality_study import Study

MAPS = 6  # layers whose maps are shown
MOST_NUMBERS = 200  # cells of a table of gates in which numbers can still be read


def figure(study: Study) -> Figure:
    """Non-locality by layer, gates by layer and head, and where one query of each picture looks."""
    shown = _evenly(list(study.maps), MAPS)
    count = len(study.pictures)
    height, width = study.pictures[0].shape[:2]
    maps_height = 0.4 + count * min(1.7 * height / width, 4.0)  # inches
    with mpl.rc_context(style.style(style.PRINT) | {"font.size": 10, "axes.titlesize": 10.5}):
        made = Figure(figsize=(12, 4.4 + maps_height), layout="constrained")
        made.suptitle(study.title, fontsize=12)
        halves: Any = made.subfigures(2, 1, height_ratios=(4.0, maps_height))
        upper, lower = halves
        distances, gates = upper.subplots(1, 2)
        _draw_distances(distances, study)
        _draw_gates(gates, study, upper)
        row, column = study.query
        place = f"row {row}, column {column} (from 0)"
        lower.suptitle(f"Where the patch in {place} looks: mean over heads, each map by its own maximum")
        cells = lower.subplots(count, 1 + len(shown), squeeze=False)
        for line, picture in enumerate(study.pictures):
            for cell, name in zip(cells[line], [None, *shown], strict=True):
                _draw_picture(cell, picture, None if name is None else study.maps[name][line], study)
                if line == 0:
                    cell.set_title("query" if name is None else f"layer {list(study.maps).index(name) + 1}")
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


def _draw_distances(axes: Axes, study: Study) -> None:
    layers = range(1, len(study.layers) + 1)
    grid = next(iter(study.maps.values())).shape[1:]
    uniform = _uniform((grid[0], grid[1]))
    axes.axhline(uniform, color="#999999", linestyle=":", label="uniform attention")
    for number, layer in zip(layers, study.layers, strict=True):
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
            for number, layer in zip(layers, study.layers, strict=True)
            if getattr(layer, part) is not None
        }
        if means:
            axes.plot(list(means), list(means.values()), label=label, **look)
    axes.set(
        title="How far attention looks (non-locality, equation 8)",
        xlabel="layer",
        ylabel="mean distance, patches",
        ylim=(0, None),
        xlim=(0.5, len(study.layers) + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_gates(axes: Axes, study: Study, parent: SubFigure) -> None:
    axes.grid(False)
    heads = max(len(layer.nonlocality) for layer in study.layers)
    table = np.full((heads, len(study.layers)), np.nan)
    for column, layer in enumerate(study.layers):
        if layer.gate is not None:
            table[: len(layer.gate), column] = layer.gate.cpu().numpy()
    extent = (0.5, len(study.layers) + 0.5, heads + 0.5, 0.5)
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


def _draw_picture(axes: Axes, picture: Tensor, attention: Tensor | None, study: Study) -> None:
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
    rows, columns = next(iter(study.maps.values())).shape[1:]
    size = width / columns, height / rows
    corner = study.query[1] * size[0], study.query[0] * size[1]
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#00E5FF", linewidth=1.4))


def save(study: Study, path: Path) -> None:
    style.save(figure(study), path)
