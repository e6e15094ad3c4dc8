"""The figures: speed-up by model, growth with size, and a profile's. Contenders keep their colours in all of them."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from .compare import MARK, speed_ups
from .contenders import ARCHITECTURES, COMPILED, EAGER, FLOOR, MODES, PARTS, label, place
from .profile import Profile
from .results import NotMeasured, Row

# Okabe and Ito's palette: told apart by the colour-blind, on white and on black
COLOURS = {
    EAGER: "#999999",
    COMPILED: "#E69F00",
    FLOOR: "#CC79A7",
    "auto": "#009E73",
    "cpu": "#009E73",
    "triton": "#D55E00",
    "composite": "#0072B2",
    "reference": "#56B4E9",
}
OTHER = "#F0E442"
MARKERS = {EAGER: "o", COMPILED: "s", FLOOR: "^", "auto": "D", "cpu": "D", "triton": "P", "composite": "v"}

LIGHT = {"text": "#1a1a1a", "grid": "#d0d0d0", "background": "none"}
DARK = {"text": "#e6e6e6", "grid": "#4a4a4a", "background": "none"}
PRINT = LIGHT | {"background": "white"}


def style(palette: Mapping[str, str]) -> dict[Any, Any]:
    """matplotlib's settings for a palette; text stays text in an SVG, and equal figures are equal files."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "convit_kernels",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": palette["grid"],
        "grid.linewidth": 0.6,
        "axes.facecolor": "none",
        "figure.facecolor": palette["background"],
        "savefig.facecolor": palette["background"],
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"),
            palette["text"],
        ),
    }


def colour(contender: str) -> str:
    return COLOURS.get(contender, OTHER)


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    made = Figure(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def save(made: Figure, path: Path) -> None:
    """Writes SVG or PNG, by the name, without a date: equal data give equal files."""
    with mpl.rc_context(style(PRINT)):
        made.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def svg(made: Figure) -> str:
    """The figure as SVG text."""
    text = io.StringIO()
    made.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def contenders(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=place)


def speed_up(rows: Sequence[Row], caption: str) -> Figure | None:
    """Times faster than eager timm, by model: a panel each for attention, layer and model, forward and training."""
    ratios = speed_ups(rows)
    wanted = [row for row in rows if row.key in ratios and row.tokens == 196 and row.contender != EAGER]
    panels = [
        (part, backward)
        for part in PARTS
        for backward in (False, True)
        if any(row.part == part and row.backward == backward for row in wanted)
    ]
    if not panels:
        return None
    with mpl.rc_context(style(PRINT)):
        columns = 2 if len(panels) > 1 else 1
        lines = math.ceil(len(panels) / columns)
        made, axes = figure(5.2 * columns, 2.7 * lines + 0.6, lines, columns)
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        names = contenders(row.contender for row in wanted)
        models = [model for model in ARCHITECTURES if any(row.model == model for row in wanted)]
        for ax, (part, backward) in zip(axes, panels, strict=False):
            width = 0.8 / len(names)
            for position, name in enumerate(names):
                # a sweep measures one model at several batches: the first is the default set's
                found = {
                    row.model: row
                    for row in reversed(wanted)
                    if (row.part, row.backward, row.contender) == (part, backward, name)
                }
                xs = [models.index(model) + (position - (len(names) - 1) / 2) * width for model in found]
                shown = [ratios[row.key] for row in found.values()]
                if found:  # an empty bar's entry in the legend would have no colour
                    bars = ax.bar(xs, [one.times for one in shown], width, color=colour(name), label=label(name))
                    ax.bar_label(bars, [MARK if one.doubtful else "" for one in shown], fontsize=8)
            ax.axhline(1, color=colour(EAGER), linewidth=1.5)
            ax.set_xticks(range(len(models)), [ARCHITECTURES[model].title.removeprefix("ConViT-") for model in models])
            ax.set_title(f"{PARTS[part]}, {MODES[backward]}")
            ax.set_ylabel("times faster than eager")
            ax.grid(axis="x", visible=False)
        handles = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        made.legend(
            [*handles.values(), axes[0].lines[0]], [*handles, label(EAGER)], loc="outside upper center", ncols=3
        )
        if any(ratios[row.key].doubtful for row in wanted):
            caption += f"\n{MARK}: the ways to tell disagree by more than the run's noise"
        made.supxlabel(caption, fontsize=8)
    return made


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

    Where a contender ran out of memory its line ends in a cross. None unless some contender has three sizes.
    """
    other = "batch" if axis == "tokens" else "tokens"
    series: dict[tuple[str, bool, str, int], list[Row]] = {}
    for row in rows:
        series.setdefault((row.part, row.backward, row.model, getattr(row, other)), []).append(row)
    series = {key: found for key, found in series.items() if len({getattr(row, axis) for row in found}) >= 3}
    if not series:
        return None
    # groups in which somebody had no memory, by name, as only rows carry sizes
    ended = {(entry.group, entry.contender) for entry in not_measured if entry.reason.startswith("out of memory")}
    sizes = {row.group: getattr(row, axis) for row in rows}
    with mpl.rc_context(style(PRINT)):
        made, axes = figure(10.4, 3.1 * len(series) + 0.6, len(series), 2)
        for line, ((part, backward, model, fixed), found) in enumerate(series.items()):
            title = f"{PARTS[part]}, {ARCHITECTURES[model].title}, {MODES[backward]}"
            title += f", {other} {fixed}"
            groups = {row.group for row in found}
            lost_any = any(group in groups for group, _ in ended)
            for ax, what in zip(axes[2 * line : 2 * line + 2], ("time", "memory"), strict=True):
                for name in contenders(row.contender for row in found):
                    mine = sorted(
                        (row for row in found if row.contender == name and (what == "time" or row.peak_memory > 0)),
                        key=lambda row: getattr(row, axis),
                    )
                    if len({getattr(row, axis) for row in mine}) < 2:  # a point is no growth
                        continue
                    xs = [float(getattr(row, axis)) for row in mine]
                    ys = [1e3 * row.time.p50 if what == "time" else row.peak_memory / 1e6 for row in mine]
                    slope = f" ({fit(xs, ys).slope:.2f})"
                    ax.plot(
                        xs,
                        ys,
                        color=colour(name),
                        marker=MARKERS.get(name, "X"),
                        markersize=5,
                        label=label(name) + slope,
                    )
                    lost = sorted(sizes[group] for group, who in ended if who == name and group in groups)
                    if lost:
                        ax.plot(lost[0], ys[-1] * lost[0] / xs[-1], "x", color=colour(name), markersize=11, mew=3)
                ax.set(xscale="log", yscale="log", ylabel="ms" if what == "time" else "peak MB")
                ax.set_xlabel("tokens N" if axis == "tokens" else "images in the batch")
                ticks = sorted({getattr(row, axis) for row in found})
                ax.set_xticks(ticks, [str(tick) for tick in ticks])
                ax.minorticks_off()
                ax.set_title(f"{title}: {what}", fontsize=9)
                ax.legend(
                    title="(fitted exponent), X: out of memory" if lost_any else "(fitted exponent)",
                    fontsize=8,
                    title_fontsize=8,
                )
    return made


PHASE_COLOURS = {
    "projections": "#0072B2",
    "content": "#E69F00",
    "position": "#CC79A7",
    "mix": "#D55E00",
    "attention": "#009E73",
    "output": "#56B4E9",
    "rest": "#999999",
    "compiled": "#F0E442",
}
WIDTH = 4.5  # inches: a figure is still legible when a narrow screen shrinks it


def time_by_phase(found: Profile) -> Figure:
    """A bar for each contender, stacked by phase, in milliseconds."""
    made, (ax,) = figure(WIDTH, 1.9 + 0.45 * len(found.contenders))
    names = [label(one.name) for one in found.contenders]
    starts = [0.0] * len(names)
    for phase, shade in PHASE_COLOURS.items():
        widths = [1e3 * one.phases[phase].seconds if phase in one.phases else 0.0 for one in found.contenders]
        if any(widths):
            ax.barh(names, widths, left=starts, color=shade, label=phase, height=0.6)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("ms, in the profiled call")
    made.legend(loc="outside upper center", ncols=4, fontsize=10, handlelength=1, columnspacing=1)
    return made


def memory_over_time(found: Profile) -> Figure:
    """Bytes that torch's allocator holds, from the beginning of the call to its end."""
    made, axes = figure(WIDTH, 0.7 + 1.1 * len(found.contenders), len(found.contenders))
    for ax, one in zip(axes, found.contenders, strict=True):
        moments, held = zip(*one.memory, strict=True) if one.memory else ((0.0,), (0,))
        times = [1e3 * (moment - moments[0]) for moment in moments]
        in_use = [value / 1e6 for value in held]
        ax.fill_between(times, in_use, step="post", color=colour(one.name), alpha=0.35)
        ax.step(times, in_use, where="post", color=colour(one.name), linewidth=1.2)
        ax.set_title(label(one.name), fontsize=10, loc="left")
        # one scale for all: what is small shows as small
        ax.set_ylim(0, 1.05 * max(value for each in found.contenders for _, value in each.memory) / 1e6)
        ax.set_xlim(0, 1e3 * max(each.memory[-1][0] - each.memory[0][0] for each in found.contenders))
        ax.set_ylabel("MB")
    axes[-1].set_xlabel("ms, in the profiled call")
    return made


def roofline(found: Profile) -> Figure:
    """Rate against intensity: the useful arithmetic over the bytes that a contender's operators read and write."""
    made, (ax,) = figure(WIDTH, 3.2)
    flops, points = found.task.flops(), [one for one in found.contenders if one.traffic]
    intensities = [flops / one.traffic for one in points if one.traffic]
    knee = found.arithmetic.rate / found.bandwidth.rate
    low, high = min([*intensities, knee]) / 3, max([*intensities, knee]) * 4
    roof = [(x, min(x * found.bandwidth.rate, found.arithmetic.rate) / 1e9) for x in (low, knee, high)]
    ax.plot(*zip(*roof, strict=True), color=mpl.rcParams["text.color"], linewidth=1.3)
    ax.annotate(
        f"{found.arithmetic.rate / 1e9:.0f} GFLOP/s", roof[2], xytext=(-4, 4), textcoords="offset points", ha="right"
    )
    ax.annotate(
        f"{found.bandwidth.rate / 1e9:.1f} GB/s",
        roof[0],
        xytext=(8, 0),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    for one, intensity in zip(points, intensities, strict=True):
        rate = flops / sorted(one.seconds)[len(one.seconds) // 2] / 1e9
        ax.plot(
            intensity,
            rate,
            color=colour(one.name),
            marker=MARKERS.get(one.name, "X"),
            ls="",
            ms=9,
            label=label(one.name),
        )
    ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte its operators move", ylabel="GFLOP/s")
    ax.set_ylim(top=ax.get_ylim()[1] * 2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
    ax.minorticks_off()
    made.legend(loc="outside upper center", ncols=2, fontsize=10)
    return made
