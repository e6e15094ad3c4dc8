"""The host's time of one call of the attention: what Python and PyTorch take until a GPU has its work.

    python benchmarks/host_time.py                      prints a table; a minute, on any machine, GPU or not
    python benchmarks/host_time.py --out RESULTS.json   and writes what was measured

At a small batch a GPU waits for its host, so this bounds the speed there. Ours (the backend `triton`) and timm's
attention, operation by operation ("eager"), are measured alike: the processor time of this thread, on CPU tensors so
small that their arithmetic takes next to nothing. Ours goes all the way to the launch of its kernels, which are
compiled for an H100; a stub takes the place of the GPU's driver. What CUDA takes to launch a kernel, 2 to 5 us, is
missing on both sides: eager's 17 operations forward would pay it more often than our one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import stub_driver
import torch
from rich.console import Console
from rich.table import Table
from turns import content, file_to_write, positive

from convit_kernels import gpsa_attention, ops
from convit_kernels.bench.implementations import EAGER, Task, build, label
from convit_kernels.cli.output import write_json
from convit_kernels.schemas import NAMESPACE
from convit_kernels.triton import attention, configs

OURS = "triton"
TASK = Task("attention", "1x16", batch=1, side=2, backward=True)
CALLS = 50  # of one sample


def launch_to_stub() -> torch.library.Library:
    """From now on `triton` takes CPU tensors in this process, goes as far as the launch, and computes nothing.

    Returns what has to be kept for that.
    """
    stub_driver.activate()
    ops.INTERPRETED = True  # there, too, it takes CPU tensors
    library: torch.library.Library = torch.library.Library(NAMESPACE, "IMPL")
    for name in ("gated_attention", "gated_attention_backward"):
        library.impl(name, getattr(attention, name), "CPU", allow_override=True)
    return library


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


def table(rows: list[dict[str, Any]]) -> Table:
    """Median and least of each, in microseconds, and ours over eager's."""
    of: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of.setdefault(row["what"], {})[row["implementation"]] = row["seconds"]
    found = Table(title="Host time of one call, us: median (least)")
    for heading in ("", label(EAGER), label(OURS), "ratio of medians (of least)"):
        found.add_column(heading, justify="right" if heading else "left")
    for what, seconds in of.items():
        numbers = {name: (statistics.median(each), min(each)) for name, each in seconds.items()}
        cells = [f"{1e6 * median:.1f} ({1e6 * least:.1f})" for median, least in numbers.values()]
        ratios = [ours / eager for ours, eager in zip(numbers[OURS], numbers[EAGER], strict=True)]
        found.add_row(what, *cells, "{:.2f} ({:.2f})".format(*ratios))
    return found


def main() -> None:
    options_of = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options_of.add_argument("--out", type=file_to_write, help="write what was measured here, in JSON")
    options_of.add_argument("--rounds", type=positive(int), default=40, help="samples of each (default: 40)")
    options = options_of.parse_args()
    torch.set_num_threads(1)
    kept = launch_to_stub()
    with configs.target("sm_90"):
        rows = measure(options.rounds)
    del kept
    Console().print(table(rows))
    if options.out:
        write_json(options.out, content(rows))


if __name__ == "__main__":
    main()
