"""The host's time of one call of the attention: what Python and PyTorch take until a GPU has its work.

    python benchmarks/host_time.py                      prints a table; a minute, on any machine, GPU or not
    python benchmarks/host_time.py --out RESULTS.json   and writes what was measured

At a small batch a GPU waits for its host, so this bounds the speed there. Ours (the backend `triton`) and timm's
attention, operation by operation ("eager"), are measured alike: the processor time of this thread, on CPU tensors so
small that their arithmetic takes next to nothing. Ours goes all the way to the launch of its kernels, which are
compiled for an H100; a stub takes the place of the GPU's driver. What CUDA itself takes to launch a kernel is missing
on both sides: eager has 17 kernels forward and 26 backward, ours 2 and 4.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from convit_kernels import gpsa_attention, ops
from convit_kernels.bench.implementations import EAGER, Task, build, label
from convit_kernels.schemas import NAMESPACE

OURS = "triton"
TASK = Task("attention", "2x16", batch=2, side=2, backward=True)  # of no size that spares eager a copy
CALLS = 50  # of one sample


@contextmanager
def launch_to_stub() -> Iterator[None]:
    """Within this context `triton` takes CPU tensors, goes as far as the launch, and computes nothing."""
    import stub_driver  # not everyone who reads results has Triton

    from convit_kernels.triton import attention, configs

    library: torch.library.Library = torch.library.Library(NAMESPACE, "IMPL")
    for name in ("gated_attention", "gated_attention_backward"):
        library.impl(name, getattr(attention, name), "CPU", allow_override=True)
    before, ops.INTERPRETED = ops.INTERPRETED, True  # there, too, it takes CPU tensors
    try:
        with stub_driver.active(), configs.target("sm_90"):
            yield
    finally:
        ops.INTERPRETED = before
        library._destroy()


def calls(name: str) -> dict[str, Callable[[], object]]:
    """What is timed of an implementation, by its title."""
    one = build(TASK, EAGER)
    leaves = list(one.leaves.values())
    if name == OURS:
        one = one._replace(forward=lambda: gpsa_attention(*leaves, grid_size=TASK.side, backend=OURS))
    out = one.forward()
    return {
        "forward, no gradients": torch.no_grad()(one.forward),
        "forward, for a backward": one.forward,
        "backward": lambda: torch.autograd.grad(out, leaves, one.d_out, retain_graph=True),
    }


def processor_time(call: Callable[[], object]) -> float:
    """Seconds of this thread for one call, of many in a row."""
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each implementation and each thing that it does; they take turns in each round."""
    by_name = {name: calls(name) for name in (EAGER, OURS)}
    samples: dict[tuple[str, str], list[float]] = {}
    for done in range(-2, rounds):  # the first two are to warm up
        for title in by_name[EAGER]:
            for name, of in by_name.items():
                seconds = processor_time(of[title])
                if done >= 0:
                    samples.setdefault((title, name), []).append(seconds)
    return [{"what": title, "implementation": name, "seconds": seconds} for (title, name), seconds in samples.items()]


HEADINGS = ("us: median (least)", label(EAGER), label(OURS), "ours / eager")


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The cells of a table under HEADINGS."""
    of: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        numbers = statistics.median(row["seconds"]), min(row["seconds"])
        of.setdefault(row["what"], {})[row["implementation"]] = numbers
    for what, by_name in of.items():
        times = [by_name[EAGER], by_name[OURS]]
        cells = [f"{1e6 * median:.1f} ({1e6 * least:.1f})" for median, least in times]
        eager, ours = times
        yield [what, *cells, f"{ours[0] / eager[0]:.2f} ({ours[1] / eager[1]:.2f})"]


def load(path: Path) -> dict[str, Any]:
    """The content of a file of results."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    # not everyone who measures has the command line's packages
    from rich.table import Table
    from turns import content, file_to_write, positive

    from convit_kernels.cli.output import console, write_json

    options_of = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options_of.add_argument("--out", type=file_to_write, help="write what was measured here, in JSON")
    options_of.add_argument("--rounds", type=positive(int), default=40, help="samples of each (default: 40)")
    options = options_of.parse_args()
    if find_spec("triton") is None:
        options_of.error("there is nothing to measure: triton is not installed")
    torch.set_num_threads(1)
    with launch_to_stub():
        rows = measure(options.rounds)
    found = Table()
    for heading in HEADINGS:
        found.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for cells in lines(rows):
        found.add_row(*cells)
    console.print(found)
    if options.out:
        write_json(options.out, content(rows))


if __name__ == "__main__":
    main()
