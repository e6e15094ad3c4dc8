"""The units of the CPU kernels, one for each instruction set: the attention alone, by shape and dtype.

    python benchmarks/units.py --out RESULTS.json     a few minutes

PyTorch's attention of the content alone is the yardstick, and the composite backend runs beside. All take turns, and
none is timed before all are right. A unit that has no kernel of its own for a dtype leaves it to another, and is not
timed under its own name. benchmarks/publish.py shows the results.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tasks import CHECKED_TOKENS, DTYPES
from turns import content, keep, parser, positive, take_turns

from convit_kernels import extension
from convit_kernels.attention import why_not
from convit_kernels.bench.accuracy import judge, require_right
from convit_kernels.bench.implementations import SDPA, Implementation, Task, build
from convit_kernels.bench.measure import arithmetic_peak, rounds_within, spread

SHAPES = (  # images, heads, side of the grid, head_dim
    (8, 4, 14, 48),
    (8, 9, 14, 48),
    (4, 16, 14, 48),
    (32, 4, 14, 48),
    (8, 6, 14, 64),
    (1, 9, 32, 48),
    (1, 4, 64, 48),
)
TRAINED_SIDE = 32  # of the largest grid that is timed backward too
VARIABLE = "CONVIT_KERNELS_ISA"  # which unit serves: read at each call
EMULATED = "_emulated"  # how the names of units end that are there for tests


@contextmanager
def variable_kept() -> Iterator[None]:
    """Without the environment variable at first; in the end it is as it was."""
    before = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def units(dtype: str) -> list[str]:
    """The units with a kernel of their own for a dtype that this processor runs, the fastest first."""
    found = []
    with variable_kept():
        for name in extension.instruction_sets():
            os.environ[VARIABLE] = name
            if not name.endswith(EMULATED) and extension.units_by_dtype()[dtype] == name:
                found.append(name)
    return found


def by_unit(name: str, implementation: Implementation) -> Implementation:
    """The same work by a unit: from its forward on the variable names it, and so in the backward that follows."""

    def forward() -> torch.Tensor:
        os.environ[VARIABLE] = name
        return implementation.forward()

    return implementation._replace(forward=forward)


def implementations(task: Task, names: Iterable[str]) -> dict[str, Implementation]:
    """The yardstick, units by name, and the composite."""
    kernels = {name: by_unit(name, build(task, "cpu")) for name in names}
    return {SDPA: build(task, SDPA), **kernels, "composite": build(task, "composite")}


def as_checked(task: Task) -> Task:
    """What is checked in a task's place: of large grids one head of one image, as float64 needs the memory."""
    if task.tokens <= CHECKED_TOKENS:
        return task
    return task._replace(batch=1, model=f"1x{task.model.partition('x')[2]}")


def rate(row: Mapping[str, Any]) -> float:
    """FLOP/s of a row's median call: two matrix products forward and five backward, which finds the scores anew."""
    products = 7 if row["backward"] else 2
    flops = 2.0 * products * row["images"] * row["heads"] * row["side"] ** 4 * row["head_dim"]
    return flops / spread(row["seconds"]).p50


def measure(
    budget: float, dtypes: Iterable[str] = DTYPES, shapes: Iterable[tuple[int, int, int, int]] = SHAPES
) -> dict[str, Any]:
    """The content of a file of results; each group of `budget` seconds or a little more.

    Raises:
        WrongResultsError: of an implementation, before any of its group is timed. The text says which and how far.
    """
    dtypes = list(dtypes)
    names = {dtype: units(dtype) for dtype in dtypes}
    groups = [
        (dtype, backward, shape)
        for dtype, backward, shape in product(dtypes, (False, True), shapes)
        if not backward or shape[2] <= TRAINED_SIDE
    ]
    rows = []
    with variable_kept(), Progress(console=Console(stderr=True), transient=True) as progress:
        serving = extension.units_by_dtype()
        peaks = {dtype: arithmetic_peak("cpu", getattr(torch, dtype))._asdict() for dtype in dtypes}
        work = progress.add_task("units", total=len(groups))
        for dtype, backward, (images, heads, side, head_dim) in groups:
            task = Task("attention", f"{heads}x{head_dim}", images, side, backward, getattr(torch, dtype))
            checked = as_checked(task)
            require_right(judge(checked, implementations(checked, names[dtype])))
            times = take_turns(
                task,
                implementations(task, names[dtype]),
                lambda once: rounds_within(budget, once),
                lambda part: progress.advance(work, part),
            )
            for name, seconds in times.items():
                rows.append(
                    {
                        "images": images,
                        "heads": heads,
                        "side": side,
                        "head_dim": head_dim,
                        "dtype": dtype,
                        "backward": backward,
                        "implementation": name,
                        "seconds": seconds,
                    }
                )
    return content(rows, serving={dtype: serving[dtype] for dtype in dtypes}, peaks=peaks)


def load(path: Path) -> dict[str, Any]:
    """The content of a file of results."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument(
        "--seconds", type=positive(float), default=4.0, help="about how long each shape is timed (default: 4)"
    )
    options = options_of.parse_args()
    if reason := why_not("cpu"):
        options_of.error(f"there are no units to time: {reason}")
    keep(options.out, lambda: measure(options.seconds, options.dtypes))


if __name__ == "__main__":
    main()
