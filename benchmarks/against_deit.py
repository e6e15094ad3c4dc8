"""Whole models: timm's ConViT, replaced, and timm's DeiT of the same size; the README's table of them.

    python benchmarks/against_deit.py --out RESULTS.json     measures (minutes: compiling is most of it), writes both
    python benchmarks/against_deit.py                        writes the README's table from the file that it names

The goal of the replaced models: Ti faster than DeiT-Ti, S and B faster than DeiT's time scaled by the parameters.
Beside them, for inference, the same models under torch.compile with inductor's freezing, which packs the weights of
every linear layer once: the fastest way that was found to run a whole model on a CPU.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from sections import ROOT, Section
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from convit_kernels.bench.contenders import ARCHITECTURES, CLASSES, MODES, convit
from convit_kernels.bench.machine import machine
from convit_kernels.bench.measure import interleaved, milliseconds, spread
from convit_kernels.bench.report import describe
from convit_kernels.replace import replace_gpsa

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


def build(size: str, name: str) -> nn.Module:
    """A contender of a size, in evaluation mode: no dropout, as in the published recipes' attention."""
    torch.manual_seed(0)
    deit, _ = SIZES[size]
    model: nn.Module = timm.create_model(deit) if name.startswith(DEIT) else convit(size)
    if name.startswith(REPLACED):
        replace_gpsa(model)
    return model.eval()


def inference(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    return torch.inference_mode()(lambda: model(images))


def frozen(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """The model compiled with inductor's freezing, for inference with these weights; compiles at once."""
    from torch._inductor import config

    compiled = torch.compile(model, dynamic=False)
    call = torch.no_grad()(lambda: compiled(images))
    with config.patch(freezing=True):  # compiles at the first call
        call()
    return call


def step(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """Forward and backward of all parameters."""
    parameters = list(model.parameters())
    d_out = torch.randn(len(images), CLASSES)

    def run() -> None:
        torch.autograd.grad(model(images), parameters, d_out)

    return run


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
    """The content of a file of results."""
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        work = progress.add_task("whole models", total=2 * len(SIZES) * (rounds + 1))
        for size, (_, batch) in SIZES.items():
            images = torch.randn(batch, 3, 224, 224)
            for backward in (False, True):
                models = {name: build(size, name) for name in (EAGER, REPLACED, DEIT)}
                if backward:
                    calls = {name: step(model, images) for name, model in models.items()}
                else:
                    calls = {name: inference(model, images) for name, model in models.items()}
                    for name in (REPLACED, DEIT):
                        calls[name + FROZEN] = frozen(build(size, name), images)
                for call in calls.values():
                    call()
                progress.advance(work)
                times = interleaved(calls, "cpu", rounds, lambda: progress.advance(work))
                shares = {name: share_of_attention(calls[name]) for name in (REPLACED, DEIT)}
                for name, seconds in times.items():
                    parameters = sum(p.numel() for p in models[name.removesuffix(FROZEN)].parameters())
                    rows.append(
                        {
                            "size": size,
                            "contender": name,
                            "backward": backward,
                            "batch": batch,
                            "seconds": seconds,
                            "attention": shares.get(name),
                            "parameters": parameters,
                        }
                    )
    return {"machine": machine(), "rows": rows}


def section(results: dict[str, Any], source: str) -> str:
    """The README's table, markers included."""
    lines = [
        SECTION.begin.format(source=source),
        f"Measured on {describe(results['machine'])}, float32, 224 x 224 pixels; [all of it]({source}). Medians of",
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
            ours, deit = (spread(rows[name]["seconds"]).p50 for name in (REPLACED, DEIT))
            scale = rows[REPLACED]["parameters"] / rows[DEIT]["parameters"]
            verdicts.append(f"{ARCHITECTURES[size].title[7:]} {mode} {ours / deit / scale:.2f}")
    lines += [
        "",
        "The replaced model's time over DeiT's, scaled by the parameters (below 1 is faster): "
        + ", ".join(verdicts)
        + ".",
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
