"""Whole models: timm's ConViT, the same with its layers replaced, and timm's DeiT of the same size.

    python benchmarks/against_deit.py --out RESULTS.json     minutes: compiling is most of it

In float32 and bfloat16, each where the machine's products allow, and the replaced ConViT by the composite backend too.
Beside them, for inference, the same models under torch.compile with inductor's freezing, which packs the weights of
every linear layer once. Nothing is timed before all that is replaced or compiled is right.

DeiT is another model, and all models of a size take turns: so this is not a group of test_convit.py, whose
implementations do the same work and are each paired with eager timm alone. benchmarks/publish.py shows the results.
"""

import json
import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from tasks import DTYPES, why_slow
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from turns import content, keep, parser, positive, take_turns

from convit_kernels.bench import implementations
from convit_kernels.bench.accuracy import closest, judge, require_right
from convit_kernels.bench.implementations import CLASSES, PATCH, Implementation, Task
from convit_kernels.equivalence import expected

SIZES = {
    "convit_tiny": ("deit_tiny_patch16_224", 8),
    "convit_small": ("deit_small_patch16_224", 8),
    "convit_base": ("deit_base_patch16_224", 4),
}
EAGER_CONVIT, REPLACED, DEIT = "ConViT, timm", "ConViT, replaced", "DeiT, timm"
COMPOSITE = "ConViT, composite"
FROZEN = ", compiled and frozen"
COLUMNS = (EAGER_CONVIT, REPLACED, COMPOSITE, DEIT, REPLACED + FROZEN, DEIT + FROZEN)
ATTENTION = re.compile(
    r"convit_kernels::gated_attention|aten::scaled_dot_product_attention|_scaled_dot_product\w*backward"
)


def deit(task: Task, exact: bool = False) -> Implementation:
    """timm's DeiT of the task's size, seeded, in evaluation mode; `exact`: the same values, computed in float64."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(SIZES[task.model][0]).eval()
    images, d_out = torch.randn(task.batch, 3, *[task.side * PATCH] * 2), torch.randn(task.batch, CLASSES)
    model, images, d_out = (one.to(task.dtype) for one in (model, images, d_out))
    if exact:
        model, images, d_out = model.double(), images.double(), d_out.double()
    return Implementation(lambda: model(images), dict(model.named_parameters()), d_out, model)


def frozen(implementation: Implementation) -> Implementation:
    """The implementation compiled with inductor's freezing, for inference with these weights; compiles at once."""
    from torch._inductor import config

    compiled = implementation._replace(forward=torch.compile(implementation.forward, dynamic=False))
    with config.patch(freezing=True):  # compiles at the first call
        compiled.call(backward=False)()
    return compiled


def build(task: Task) -> dict[str, Implementation]:
    """The implementations of a size: for inference also compiled and frozen."""
    models = {
        EAGER_CONVIT: implementations.build(task, implementations.EAGER),
        REPLACED: implementations.build(task, "auto"),
        COMPOSITE: implementations.build(task, "composite"),
        DEIT: deit(task),
    }
    if not task.backward:
        models |= {name + FROZEN: frozen(models[name]) for name in (REPLACED, DEIT)}
    return models


def check(task: Task, models: dict[str, Implementation]) -> None:
    """Raises WrongResultsError unless every ConViT, and a compiled DeiT by the same rule beside its own, is right."""
    keys = {EAGER_CONVIT: implementations.EAGER, REPLACED: "auto", COMPOSITE: "composite"}
    keys[REPLACED + FROZEN] = "automatic" + FROZEN
    require_right(judge(task, {key: models[name] for name, key in keys.items() if name in models}))
    if (compiled := models.get(DEIT + FROZEN)) is not None:
        rule = expected(lambda dtype: _out(deit(task, exact=dtype == torch.float64)), task.dtype, draws=1)
        require_right({implementations.COMPILED: closest(rule, _out(compiled))})


def _out(implementation: Implementation) -> dict[str, Tensor]:
    return {"DeiT's out": implementation.call(backward=False)()}


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


def measure(rounds: int, dtypes: Iterable[str] = DTYPES) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
        WrongResultsError: of an implementation, before any of its group is timed. The text says which and how far.
    """
    reasons = {name: why_slow("cpu", getattr(torch, name)) for name in dtypes}
    groups = list(product([name for name, reason in reasons.items() if not reason], SIZES, (False, True)))
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        work = progress.add_task("whole models", total=len(groups))
        for dtype, size, backward in groups:
            torch.compiler.reset()  # else the sizes before use up the compiler's limit for the same code
            task = Task("model", size, SIZES[size][1], backward=backward, dtype=getattr(torch, dtype))
            models = build(task)
            check(task, models)
            times = take_turns(task, models, lambda _: rounds, lambda part: progress.advance(work, part))
            shares = {name: share_of_attention(models[name].call(backward)) for name in (REPLACED, DEIT)}
            for name, seconds in times.items():
                rows.append(
                    {
                        "size": size,
                        "dtype": dtype,
                        "implementation": name,
                        "backward": backward,
                        "batch": task.batch,
                        "seconds": seconds,
                        "attention": shares.get(name),
                        "parameters": sum(p.numel() for p in models[name].leaves.values()),
                    }
                )
    not_measured = [{"dtype": name, "reason": reason} for name, reason in reasons.items() if reason]
    return content(rows, not_measured=not_measured)


def load(path: Path) -> dict[str, Any]:
    """The content of a file of results. Earlier files call an implementation "contender", and are in float32."""
    found: dict[str, Any] = {"not_measured": []} | json.loads(path.read_text())
    for row in found["rows"]:
        row.setdefault("dtype", "float32")
        if "contender" in row:
            row["implementation"] = row.pop("contender")
    return found


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=positive(int), default=7, help="calls of each model (default: 7)")
    options = options_of.parse_args()
    keep(options.out, lambda: measure(options.rounds, options.dtypes))


if __name__ == "__main__":
    main()
