"""A profile as one HTML page that needs nothing else: no network, no script, light and dark."""

import base64
from collections.abc import Callable

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from . import plots
from .compare import MEANING
from .contenders import label
from .machine import describe
from .measure import milliseconds, spread
from .phases import PHASES
from .profile import Profile, headings, operator_name, phase_lines, top_operators

_FIGURES: tuple[tuple[str, str, Callable[[Profile], Figure]], ...] = (
    ("Time by phase", "What each phase takes of one call, contender by contender.", plots.time_by_phase),
    (
        "Memory over time",
        "What torch's allocator holds during one call, beyond the weights and the input.",
        plots.memory_over_time,
    ),
    (
        "Roofline",
        "The useful arithmetic a second, against how much of it there is for each byte that the contender's operators "
        "read and write, caches left out of account. The line is what this machine reached in a large matrix product "
        "and in a large copy. Compiled code hides its operators, so it has no point.",
        plots.roofline,
    ),
)


def _data_uri(draw: Callable[[Profile], Figure], found: Profile, palette: dict[str, str]) -> str:
    with mpl.rc_context(plots.style(palette)):
        text = plots.svg(draw(found))
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def render(found: Profile) -> str:
    """The page. Its figures are SVG images inside it, one for each colour scheme."""
    totals = [
        {
            "name": label(one.name),
            "colour": plots.colour(one.name),
            "ratio": one.eager_ratio,
            "time": [milliseconds(value) for value in spread(one.seconds)],
            "peak": one.peak_memory / 1e6,
            "gflops": found.task.flops() / spread(one.seconds).p50 / 1e9,
            "accuracy": one.accuracy,
        }
        for one in found.contenders
    ]
    phases = [
        {
            "name": phase,
            "colour": plots.PHASE_COLOURS[phase],
            "meaning": PHASES[phase],
            "lines": [(label(name), numbers) for name, numbers in lines],
        }
        for phase, lines in phase_lines(found)
    ]
    operators = [
        {
            "phase": phase,
            "cells": [
                [(operator_name(name), milliseconds(share.seconds), share.calls) for name, share in by_name[one.name]]
                for one in found.contenders
            ],
        }
        for phase, by_name in top_operators(found).items()
    ]
    figures = [
        {
            "title": title,
            "text": text,
            "light": _data_uri(draw, found, plots.LIGHT),
            "dark": _data_uri(draw, found, plots.DARK),
        }
        for title, text, draw in _FIGURES
    ]
    environment = Environment(
        loader=PackageLoader("convit_kernels.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("profile.html.jinja").render(
        task=str(found.task),
        machine=describe(found.machine),
        peaks=[found.arithmetic, found.bandwidth],
        totals=totals,
        phases=phases,
        headings=headings(found),
        names=[label(one.name) for one in found.contenders],
        operators=operators,
        figures=figures,
        meaning=MEANING,
        left_out={label(name): reason for name, reason in found.left_out.items()},
    )
