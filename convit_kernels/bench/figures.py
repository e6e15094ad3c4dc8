"""The figures of a file of results: speed-up by model, growth with size. An implementation keeps its colour in all."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare import MARK, speed_ups
from .implementations import ARCHITECTURES, COMPILED, EAGER, PARTS, SDPA, label, place
from .machine import describe
from .results import NotMeasured, Results, Row
from .style import PRINT, save, style, subplots

# Okabe and Ito's palette: told apart by the colour-blind, on white and on black
COLOURS = {
    EAGER: "#999999",
    COMPILED: "#E69F00",
    SDPA: "#CC79A7",
    "auto": "#009E73",
    "cpu": "#009E73",
    "triton": "#D55E00",
    "composite": "#0072B2",
    "reference": "#56B4E9",
}
OTHER = "#F0E442"
MARKERS = {EAGER: "o", COMPILED: "s", SDPA: "^", "auto": "D", "cpu": "D", "triton": "P", "composite": "v"}


def colour(implementation: str) -> str:
    return COLOURS.get(implementation, OTHER)


def marker(implementation: str) -> str:
    return MARKERS.get(implementation, "X")


def speed_up(rows: Sequence[Row], caption: str) -> Figure | None:
    """Times faster than eager timm, by model: a panel for each part, dtype and mode, forward beside training."""
    ratios = speed_ups(rows)
    wanted = [row for row in rows if row.key in ratios and row.tokens == 196 and row.implementation != EAGER]
    dtypes = list(dict.fromkeys(row.dtype for row in wanted))
    by_place = sorted(wanted, key=lambda row: ([*PARTS].index(row.part), dtypes.index(row.dtype), row.backward))
    panels = list(dict.fromkeys(row.kind for row in by_place))
    if not panels:
        return None
    with mpl.rc_context(style(PRINT)):
        columns = 2 if len(panels) > 1 else 1
        lines = math.ceil(len(panels) / columns)
        figure, axes = subplots(5.2 * columns, 2.7 * lines + 0.6, lines, columns)
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        names = sorted({row.implementation for row in wanted}, key=place)
        models = [model for model in ARCHITECTURES if any(row.model == model for row in wanted)]
        for ax, kind in zip(axes, panels, strict=False):
            width = 0.8 / len(names)
            for position, name in enumerate(names):
                # a sweep measures one model at several batches: the first is the default set's
                bar_of = {row.model: row for row in reversed(wanted) if (row.kind, row.implementation) == (kind, name)}
                xs = [models.index(model) + (position - (len(names) - 1) / 2) * width for model in bar_of]
                shown = [ratios[row.key] for row in bar_of.values()]
                if shown:  # an empty bar's entry in the legend would have no colour
                    bars = ax.bar(xs, [ratio.times for ratio in shown], width, color=colour(name), label=label(name))
                    ax.bar_label(bars, [MARK if ratio.doubtful else "" for ratio in shown], fontsize=8)
            ax.axhline(1, color=colour(EAGER), linewidth=1.5)
            ax.set_xticks(range(len(models)), [ARCHITECTURES[model].title.removeprefix("ConViT-") for model in models])
            ax.set_title(kind)
            ax.set_ylabel("times faster than eager")
            ax.grid(axis="x", visible=False)
        handles = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(
            [*handles.values(), axes[0].lines[0]], [*handles, label(EAGER)], loc="outside upper center", ncols=3
        )
        if any(ratios[row.key].doubtful for row in wanted):
            caption += f"\n{MARK}: the ways to tell disagree by more than the run's noise"
        figure.supxlabel(caption, fontsize=8)
    return figure


class Fit(NamedTuple):
    """y = factor * x ** slope, by least squares of the logarithms."""

    slope: float
    factor: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """The power law through at least two positive points with different x."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return Fit(slope, math.exp(mean_y - slope * mean_x))


def growth(rows: Sequence[Row], not_measured: Sequence[NotMeasured], axis: str) -> Figure | None:
    """Time and memory against the tokens (batch fixed) or the batch (grid fixed), log-log, with fitted slopes.

    Where an implementation ran out of memory its line ends in a cross. None unless some task has three sizes.
    """
    other = "batch" if axis == "tokens" else "tokens"
    series: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        series.setdefault((row.kind, row.model, getattr(row, other)), []).append(row)
    series = {key: members for key, members in series.items() if len({getattr(row, axis) for row in members}) >= 3}
    if not series:
        return None
    # by group, as only rows carry sizes
    ended = {(entry.group, entry.implementation) for entry in not_measured if entry.reason.startswith("out of memory")}
    sizes = {row.group: getattr(row, axis) for row in rows}
    with mpl.rc_context(style(PRINT)):
        figure, axes = subplots(10.4, 3.1 * len(series) + 0.6, len(series), 2)
        for line, ((kind, model, fixed), members) in enumerate(series.items()):
            title = f"{kind}, {ARCHITECTURES[model].title}, {other} {fixed}"
            groups = {row.group for row in members}
            lost = [(name, sizes[group]) for group, name in sorted(ended) if group in groups]
            for ax, what in zip(axes[2 * line : 2 * line + 2], ("time", "memory"), strict=True):
                _growth_lines(ax, members, axis, what, lost)
                ax.set_title(f"{title}: {what}", fontsize=9)
    return figure


def _growth_lines(ax: Axes, rows: Sequence[Row], axis: str, what: str, lost: Sequence[tuple[str, int]]) -> None:
    """One panel; `lost` are the implementations and sizes that ran out of memory."""
    for name in sorted({row.implementation for row in rows}, key=place):
        points = {
            float(getattr(row, axis)): 1e3 * row.time.p50 if what == "time" else row.peak_memory / 1e6
            for row in sorted(rows, key=lambda row: int(getattr(row, axis)))
            if row.implementation == name and (what == "time" or row.peak_memory > 0)
        }
        if len(points) < 2:  # a point is no growth
            continue
        xs, ys = list(points), list(points.values())
        text = f"{label(name)} ({fit(xs, ys).slope:.2f})"
        ax.plot(xs, ys, color=colour(name), marker=marker(name), markersize=5, label=text)
        if beyond := sorted(size for who, size in lost if who == name):
            ax.plot(beyond[0], ys[-1] * beyond[0] / xs[-1], "x", color=colour(name), markersize=11, mew=3)
    ax.set(xscale="log", yscale="log", ylabel="ms" if what == "time" else "peak MB")
    ax.set_xlabel("tokens N" if axis == "tokens" else "images in the batch")
    ticks = sorted({getattr(row, axis) for row in rows})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    heading = "(fitted exponent), X: out of memory" if lost else "(fitted exponent)"
    ax.legend(title=heading, fontsize=8, title_fontsize=8)


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "speed-up": lambda results: speed_up(results.rows, describe(results.machine)),
    "growth-tokens": lambda results: growth(results.rows, results.not_measured, "tokens"),
    "growth-batch": lambda results: growth(results.rows, results.not_measured, "batch"),
}


def write_figures(
    results: Results, directory: Path, formats: Sequence[str] = ("svg", "png"), names: Sequence[str] = tuple(FIGURES)
) -> list[Path]:
    """Writes each of these figures that the results have data for; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        figure = FIGURES[name](results)
        if figure is None:
            continue
        for suffix in formats:
            path = directory / f"{name}.{suffix}"
            save(figure, path)
            written.append(path)
    return written
