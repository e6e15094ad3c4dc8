"""Whole models: timm's ConViT, replaced, and timm's DeiT of the same size; the README's table of them.

    python benchmarks/against_deit.py --out RESULTS.json     measures (minutes: compiling is most of it), writes both
    python benchmarks/against_deit.py                        writes the README's table from the file that it names

The goal of the replaced models: Ti faster than DeiT-Ti, S and B faster than DeiT's time scaled by the parameters.
Beside them, for inference, the same models under torch.compile with inductor's freezing, which packs the weights of
every linear layer once: the fastest way that was found to run a whole model on a CPU. Nothing is timed before all that
is replaced or compiled is right.
"""

import argparse
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from sections import ROOT, Section
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from convit_kernels.bench import contenders
from convit_kernels.bench.accuracy import closest, judge, require_right
from convit_kernels.bench.compare import times_faster
from convit_kernels.bench.contenders import ARCHITECTURES, CLASSES, MODES, PATCH, Contender, Task
from convit_kernels.bench.machine import describe, machine
from convit_kernels.bench.measure import interleaved, milliseconds, spread
from convit_kernels.equivalence import expected

SECTION = Section("models")

SIZES = {
    "convit_tiny": ("deit_tiny_patch16_224", 8),
    "convit_small": ("deit_small_patch16_224", 8),
    "convit_base": ("deit_base_patch16_224", 4),
}
EAGER, REPLACED, DEIT = "ConViT, timm", "ConViT, replaced", "DeiT, timm"
FROZEN = ", compiled and frozen"
ATTENTION = re.compile(
    r"convit_kernels::gated_attention|aten::scaled_dot_product_attention|_scaled_dot_product\w*backward"
)


def deit(task: Task, exact: bool = False) -> Contender:
    """timm's DeiT of the task's size, seeded, in evaluation mode; `exact`: the same values, computed in float64."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(SIZES[task.model][0]).eval()
    images, d_out = torch.randn(task.batch, 3, *[task.side * PATCH] * 2), torch.randn(task.batch, CLASSES)
    if exact:
        model, images, d_out = model.double(), images.double(), d_out.double()
    return Contender(lambda: model(images), dict(model.named_parameters()), d_out, model)


def frozen(contender: Contender) -> Contender:
    """The contender compiled with inductor's freezing, for inference with these weights; compiles at once."""
    from torch._inductor import config

    compiled = contender._replace(forward=torch.compile(contender.forward, dynamic=False))
    with config.patch(freezing=True):  # compiles at the first call
        compiled.call(backward=False)()
    return compiled


def build(task: Task) -> dict[str, Contender]:
    """The contenders of a size: for inference also compiled and frozen."""
    found = {
        EAGER: contenders.build(task, contenders.EAGER),
        REPLACED: contenders.build(task, "auto"),
        DEIT: deit(task),
    }
    if not task.backward:
        found |= {name + FROZEN: frozen(found[name]) for name in (REPLACED, DEIT)}
    return found


def check(task: Task, found: dict[str, Contender]) -> None:
    """Raises WrongResultsError unless every ConViT, and a compiled DeiT by the same rule beside its own, is right."""
    keys = {EAGER: contenders.EAGER, REPLACED: "auto", REPLACED + FROZEN: "automatic" + FROZEN}
    require_right(judge(task, {key: found[name] for name, key in keys.items() if name in found}))
    if (compiled := found.get(DEIT + FROZEN)) is not None:
        rule = expected(lambda dtype: _out(deit(task, exact=dtype == torch.float64)), task.dtype, draws=1)
        require_right({contenders.COMPILED: closest(rule, _out(compiled))})


def _out(contender: Contender) -> dict[str, Tensor]:
    return {"DeiT's out": contender.call(backward=False)()}


def share_of_attention(call: Callable[[], Any]) -> float:
    """The part of a call's time that its attention kernels take, projections aside."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    inside = whole = 0.0
    for event in recorded.events():
        if event.cpu_parent is None:
            whole += event.cpu_time_total
        parent, nested = event.cpu_parent, False
        while parent is not None and not nested:
            nested, parent = bool(ATTENTION.search(parent.name)), parent.cpu_parent
        if ATTENTION.search(event.name) and not nested:
            inside += event.cpu_time_total
    return inside / whole


def measure(rounds: int) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
        WrongResultsError: of a contender, before any of its group is timed. The text says which and how far.
    """
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        work = progress.add_task("whole models", total=2 * len(SIZES) * (rounds + 1))
        for size, (_, batch) in SIZES.items():
            for backward in (False, True):
                torch.compiler.reset()  # else the sizes before use up the compiler's limit for the same code
                task = Task("model", size, batch, backward=backward)
                found = build(task)
                check(task, found)
                calls = {name: one.call(backward) for name, one in found.items()}
                for call in calls.values():
                    call()
                progress.advance(work)
                times = interleaved(calls, task.device, rounds, lambda: progress.advance(work))
                shares = {name: share_of_attention(calls[name]) for name in (REPLACED, DEIT)}
                for name, seconds in times.items():
                    rows.append(
                        {
                            "size": size,
                            "contender": name,
                            "backward": backward,
                            "batch": batch,
                            "seconds": seconds,
                            "attention": shares.get(name),
                            "parameters": sum(p.numel() for p in found[name].leaves.values()),
                        }
                    )
    return {"machine": machine(), "date": date.today().isoformat(), "rows": rows}


def section(results: dict[str, Any], source: str) -> str:
    """The README's table, markers included."""
    machine_and_date = ", ".join(filter(None, (describe(results["machine"]), results.get("date"))))
    lines = [
        SECTION.begin.format(source=source),
        f"Measured on {machine_and_date}, float32, 224 x 224 pixels; [all of it]({source}). Medians of",
        "interleaved runs. In brackets the part of the time that is left in attention.",
        "",
        "| | batch | " + " | ".join((EAGER, REPLACED, DEIT, REPLACED + FROZEN, DEIT + FROZEN)) + " |",
        "| --- | ---: |" + " ---: |" * 5,
    ]
    verdicts = []
    for backward in (False, True):
        for size in SIZES:
            rows = {
                row["contender"]: row for row in results["rows"] if row["size"] == size and row["backward"] == backward
            }
            cells = []
            for name in (EAGER, REPLACED, DEIT, REPLACED + FROZEN, DEIT + FROZEN):
                row = rows.get(name)
                share = f" ({row['attention']:.0%})" if row and row["attention"] is not None else ""
                cells.append(f"{milliseconds(spread(row['seconds']).p50)} ms{share}" if row else "")
            mode = MODES[backward]
            lines.append(
                f"| {ARCHITECTURES[size].title}, {mode} | {rows[EAGER]['batch']} | " + " | ".join(cells) + " |"
            )
            faster = times_faster(rows[DEIT]["seconds"], rows[REPLACED]["seconds"]).times
            scale = rows[REPLACED]["parameters"] / rows[DEIT]["parameters"]
            verdicts.append(f"{ARCHITECTURES[size].title[7:]} {mode} {1 / faster / scale:.2f}")
    lines += [
        "",
        "The replaced model's time over DeiT's, scaled by the parameters (below 1 is faster), the larger of the ratio",
        "of the medians and of the median over pairs of neighbouring runs: " + ", ".join(verdicts) + ".",
        SECTION.end,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="measure, and write the results here")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    named = SECTION.source()
    path = options.out.resolve() if options.out else named
    if options.out:
        results = measure(options.rounds)
        path.write_text(json.dumps(results, indent=1) + "\n")
    source = path.relative_to(ROOT).as_posix()
    SECTION.write(section(json.loads(path.read_text()), source))


if __name__ == "__main__":
    main()
