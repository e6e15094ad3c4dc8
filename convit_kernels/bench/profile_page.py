"""A profile as one HTML page that needs nothing else: no network, no script, light and dark, narrow and wide."""

import base64
from collections.abc import Callable

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from .compare import MEANING
from .figures import colour, marker
from .implementations import label
from .measure import milliseconds, spread
from .phases import PHASES
from .profile import Profile
from .profile_tables import headings, operator_name, phase_lines, top_operators
from .style import DARK, LIGHT, style, subplots, svg

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


def time_by_phase(profiled: Profile) -> Figure:
    """A bar for each implementation, stacked by phase, in milliseconds."""
    figure, (ax,) = subplots(WIDTH, 1.9 + 0.45 * len(profiled.implementations))
    names = [one.title for one in profiled.implementations]
    starts = [0.0] * len(names)
    for phase, shade in PHASE_COLOURS.items():
        widths = [1e3 * one.phases[phase].seconds if phase in one.phases else 0.0 for one in profiled.implementations]
        if any(widths):
            ax.barh(names, widths, left=starts, color=shade, label=phase, height=0.6)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("ms, in the profiled call")
    figure.legend(loc="outside upper center", ncols=4, fontsize=10, handlelength=1, columnspacing=1)
    return figure


def memory_over_time(profiled: Profile) -> Figure:
    """Bytes that torch's allocator holds, from the beginning of the call to its end."""
    figure, axes = subplots(WIDTH, 0.7 + 1.1 * len(profiled.implementations), len(profiled.implementations))
    for ax, one in zip(axes, profiled.implementations, strict=True):
        moments, held = zip(*one.memory, strict=True) if one.memory else ((0.0,), (0,))
        times = [1e3 * (moment - moments[0]) for moment in moments]
        in_use = [value / 1e6 for value in held]
        ax.fill_between(times, in_use, step="post", color=colour(one.name), alpha=0.35)
        ax.step(times, in_use, where="post", color=colour(one.name), linewidth=1.2)
        ax.set_title(one.title, fontsize=10, loc="left")
        # one scale for all: what is small shows as small
        ax.set_ylim(0, 1.05 * max(value for each in profiled.implementations for _, value in each.memory) / 1e6)
        ax.set_xlim(0, 1e3 * max(each.memory[-1][0] - each.memory[0][0] for each in profiled.implementations))
        ax.set_ylabel("MB")
    axes[-1].set_xlabel("ms, in the profiled call")
    return figure


def roofline(profiled: Profile) -> Figure:
    """Rate against intensity: the useful arithmetic over the bytes that the operators read and write."""
    figure, (ax,) = subplots(WIDTH, 3.2)
    flops, points = profiled.task.flops(), [one for one in profiled.implementations if one.traffic]
    intensities = [flops / one.traffic for one in points if one.traffic]
    knee = profiled.arithmetic.rate / profiled.bandwidth.rate
    low, high = min([*intensities, knee]) / 3, max([*intensities, knee]) * 4
    roof = [(x, min(x * profiled.bandwidth.rate, profiled.arithmetic.rate) / 1e9) for x in (low, knee, high)]
    ax.plot(*zip(*roof, strict=True), color=mpl.rcParams["text.color"], linewidth=1.3)
    ax.annotate(
        f"{profiled.arithmetic.rate / 1e9:.0f} GFLOP/s", roof[2], xytext=(-4, 4), textcoords="offset points", ha="right"
    )
    ax.annotate(
        f"{profiled.bandwidth.rate / 1e9:.1f} GB/s",
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
            marker=marker(one.name),
            ls="",
            ms=9,
            label=one.title,
        )
    ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte its operators move", ylabel="GFLOP/s")
    ax.set_ylim(top=ax.get_ylim()[1] * 2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
    ax.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2, fontsize=10)
    return figure


_FIGURES: tuple[tuple[str, str, Callable[[Profile], Figure]], ...] = (
    ("Time by phase", "What each phase takes of one call, implementation by implementation.", time_by_phase),
    (
        "Memory over time",
        "What torch's allocator holds during one call, beyond the weights and the input.",
        memory_over_time,
    ),
    (
        "Roofline",
        "The useful arithmetic a second, against how much of it there is for each byte that the operators read and "
        "write, caches left out of account. The line is what this machine reached in a large matrix product "
        "and in a large copy. Compiled code hides its operators, so it has no point.",
        roofline,
    ),
)


def _data_uri(draw: Callable[[Profile], Figure], profiled: Profile, palette: dict[str, str]) -> str:
    with mpl.rc_context(style(palette)):
        text = svg(draw(profiled))
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def render(profiled: Profile) -> str:
    """The page. Its figures are SVG images inside it, one for each colour scheme."""
    totals = [
        {
            "name": one.title,
            "colour": colour(one.name),
            "ratio": one.eager_ratio,
            "time": [milliseconds(value) for value in spread(one.seconds)],
            "peak": one.peak_memory / 1e6,
            "gflops": profiled.task.flops() / spread(one.seconds).p50 / 1e9,
            "accuracy": one.accuracy,
        }
        for one in profiled.implementations
    ]
    phases = [
        {
            "name": phase,
            "colour": PHASE_COLOURS[phase],
            "meaning": PHASES[phase],
            "lines": [(label(name), numbers) for name, numbers in lines],
        }
        for phase, lines in phase_lines(profiled)
    ]
    operators = [
        {
            "phase": phase,
            "cells": [
                [(operator_name(name), milliseconds(share.seconds), share.calls) for name, share in by_name[one.name]]
                for one in profiled.implementations
            ],
        }
        for phase, by_name in top_operators(profiled).items()
    ]
    figures = [
        {
            "title": title,
            "text": text,
            "light": _data_uri(draw, profiled, LIGHT),
            "dark": _data_uri(draw, profiled, DARK),
        }
        for title, text, draw in _FIGURES
    ]
    environment = Environment(
        loader=PackageLoader("convit_kernels.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("profile.html.jinja").render(
        task=str(profiled.task),
        machine=profiled.where,
        peaks=[profiled.arithmetic, profiled.bandwidth],
        totals=totals,
        phases=phases,
        headings=headings(profiled),
        names=[one.title for one in profiled.implementations],
        operators=operators,
        figures=figures,
        meaning=MEANING,
        warnings=profiled.warnings,
    )
