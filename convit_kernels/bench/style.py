"""How figures look: colours of text and paper, matplotlib's settings, and files that are equal for equal data."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def subplots(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Figure, path: Path) -> None:
    """Writes SVG or PNG, by the name, without a date."""
    with mpl.rc_context(style(PRINT)):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def svg(figure: Figure) -> str:
    """The figure as SVG text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
