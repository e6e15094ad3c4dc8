"""The steps that are no command of their own: `python -m tools.gpu_day.steps NAME --json FILE`.

The command line needs packages that an image may lack; these call what it calls. Each finding is a line of the file as
soon as it is there, so that a step that is cut keeps what it has found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What the paper's models ask of the kernels: their two widths of a head, in the order of their worth.
TUNED = ((48, "bfloat16"), (64, "bfloat16"), (48, "float32"), (48, "float16"), (64, "float32"))
# Part of the work, model, batch, backward: what a profile tells most about.
PROFILED = (
    ("layer", "convit_small", 128, False),
    ("layer", "convit_small", 128, True),
    ("model", "convit_small", 128, True),
    ("model", "convit_base", 64, False),
    ("layer", "convit_small", 8, False),
)


def machine(_: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What all this runs on; "capability" is what the CUDA library has to be built for."""
    from convit_kernels.bench.machine import machine

    tool = "compute-sanitizer"
    yield machine() | {
        "capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "sanitizer": shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin"),
    }


def selfcheck(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The Triton kernels held to float64; --cases: those with one of these in their name."""
    from convit_kernels.bench.selfcheck import cases, run

    chosen = cases(options.device, options.device == "cpu")
    if options.cases:
        chosen = [case for case in chosen if str(case) in options.cases.split(",")]
    failed = 0
    for outcome in run("triton", options.device, chosen):
        failed += outcome.failed or bool(outcome.cannot_run)
        yield outcome.to_json()
    if failed or not chosen:
        sys.exit(f"{failed} of {len(chosen)} cases failed or could not run")


def tune(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Launch configurations, measured; --share 2/4: the second of four parts of them, only compiled.

    Compiling takes most of the time, needs no quiet machine and is remembered: so it is done beside the tests.
    """
    from convit_kernels.triton.tune import Shape, on_gpu
    from convit_kernels.triton.tune import tune as measure

    part, parts = map(int, (options.share or "1/1").split("/"))
    runs = 0

    def timed(run: Any) -> float:
        nonlocal runs
        runs += 1
        if not options.share:
            return on_gpu(run) if options.device == "cuda" else 1.0
        if runs % parts == part - 1:
            run()
        return 1.0

    for head_dim, dtype in TUNED if options.device == "cuda" else ((16, "float32"),):
        shape = Shape(128, 9, (14, 14), head_dim, getattr(torch, dtype))
        if options.device == "cpu":
            shape = shape._replace(batch=1, heads=1, grid_size=(2, 3))
        for finding in measure(shape, torch.device(options.device), timed):
            if not options.share:
                yield {"head_dim": head_dim, "dtype": dtype, **finding._asdict()}


def profile(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Where the time of eager timm goes, and ours."""
    from convit_kernels.bench.profile import run, task

    dtype = "bfloat16" if options.device == "cuda" else "float32"
    for part, model, batch, backward in PROFILED if options.device == "cuda" else (("layer", "convit_tiny", 1, True),):
        work = task(model, batch, backward, part == "layer", options.device, dtype)
        yield run(work, ["eager", "auto"], rounds=5).to_json()


def host_time(_: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a call of the attention takes of the processor, beside eager timm's."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("host_time")
    torch.set_num_threads(1)
    with benchmark.launch_to_stub():
        yield {"rows": benchmark.measure(rounds=40)}


STEPS = {step.__name__: step for step in (machine, selfcheck, tune, profile, host_time)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day.steps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default="")
    parser.add_argument("--share", default="")
    options = parser.parse_args()
    begin = time.monotonic()
    for found in STEPS[options.step](options):
        line = json.dumps(found)
        print(f"{time.monotonic() - begin:6.1f} s  {line[:400]}", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
