"""Ten minutes on a GPU: builds, checks and measures, with no more than what an image for PyTorch has.

    tools/gpu_day.sh                on a machine with a GPU
    tools/gpu_day.sh --rehearse     the same steps on a CPU, with less work
    tools/gpu_day.sh --only tests   the steps with one of these in their names

Each step is a process with a limit of its own, and all of them end within --minutes. A step that fails, or is cut at
its limit, stops no other. The most valuable come first; what is timed runs alone. In the folder --out, as it comes:

    summary.txt     what each step came to, and the figures that are looked for first
    results.json    what each step came to and has found, for a program
    log.txt         what the steps have printed
    benchmarks-*    the benchmarks' own files, for benchmarks/publish.py
    running/        what steps under way have printed and found

The exit code is 0 where every step has passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .plan import highlights, machine, plan
from .runner import Group, Run

MINUTES = 9.0  # the limits of the plan's steps are made for these


def chosen(groups: Iterable[Group], names: str, stretch: float) -> Iterator[Group]:
    """The steps whose name has one of `names` in it, which commas separate, with `stretch` times their limits."""
    for group in groups:
        steps = [step for step in group.steps if any(name in step.name for name in names.split(","))]
        yield group._replace(steps=[step._replace(limit=stretch * step.limit) for step in steps])


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "build/gpu"),
        help="the folder for what is found; default: $OUT, or build/gpu",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all steps together, whose limits it stretches; default: 9"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with less work")
    parser.add_argument("--only", default="", help="parts of names of steps, comma-separated")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as for an interrupt: what is there is written
    run = Run(options.out.resolve(), 60 * options.minutes, highlights)
    run.run(chosen([machine(device, run.out)], "", options.minutes / MINUTES))
    here = (run.found["machine"] or [{}])[0]
    if device == "cuda" and not here.get("gpu"):
        print("torch sees no GPU here, or cannot be imported: log.txt says more; --rehearse tries the steps on a CPU")
        return 1
    run.run(chosen(plan(device, run.out, here), options.only, options.minutes / MINUTES))
    shutil.rmtree(run.out / "running")
    print("", run.summary(), f"in {run.out}", sep="\n")
    return run.code


if __name__ == "__main__":
    sys.exit(main())
