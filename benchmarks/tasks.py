"""What the benchmarks measure: by default, and on request."""

from collections.abc import Iterable

import torch

from convit_kernels.bench.implementations import ARCHITECTURES, COMPILED, Task
from convit_kernels.bench.measure import matrix_product

DTYPES = ("float32", "bfloat16")

# On two cores a call then takes a tenth of a second to three seconds.
CPU_BATCH = {
    ("attention", False): (8, 8, 8, 4, 4, 4),
    ("attention", True): (8, 8, 8, 4, 4, 4),
    ("layer", False): (8, 8, 8, 4, 4, 4),
    ("layer", True): (8, 8, 8, 4, 4, 4),
    ("model", False): (4, 2, 2, 1, 1, 1),
    ("model", True): (2, 1, 1, 1, 1, 1),
}
CUDA_BATCH = 128
CHECKED_TOKENS = 1024  # of a grid beyond which one image of a batch is checked: float64 needs the memory
SWEEP_MODEL = "convit_small"
SWEEP_SIDES = (14, 20, 28, 40, 52, 64)
SWEEP_SIDES_BATCH = 8
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SLOW_PRODUCT = 10  # times a matrix product in float32, from which on layers and models take minutes and tell nothing


def default_tasks(device: str, dtypes: Iterable[torch.dtype]) -> list[Task]:
    """Attention, layer and model of every size at 224 pixels, forward and training step; the dtypes in turn."""
    cuda = device.startswith("cuda")
    return [
        Task(part, model, CUDA_BATCH if cuda else batch, backward=backward, dtype=dtype, device=device)
        for (part, backward), batches in CPU_BATCH.items()
        for dtype in dtypes
        for model, batch in zip(ARCHITECTURES, batches, strict=True)
    ]


def sweep_tasks(device: str, dtypes: Iterable[torch.dtype]) -> list[Task]:
    """How the attention and the layer grow with the grid and with the batch."""
    sizes = [(SWEEP_SIDES_BATCH, side) for side in SWEEP_SIDES] + [(batch, 14) for batch in SWEEP_BATCHES]
    return [
        Task(part, SWEEP_MODEL, batch, side, backward, dtype, device)
        for part in ("attention", "layer")
        for backward in (False, True)
        for dtype in dtypes
        for batch, side in sizes
    ]


def why_slow(device: str, dtype: torch.dtype) -> str:
    """Why layers and models in a dtype are not worth their time on this machine; "" where they are."""
    rates = [matrix_product(device, each, side=256).rate for each in (torch.float32, dtype)]
    if rates[0] <= SLOW_PRODUCT * rates[1]:
        return ""
    return f"a matrix product in {str(dtype)[6:]} takes more than {SLOW_PRODUCT} times as long as in float32 here"


def why_left_out(task: Task, name: str) -> str:
    """Why an implementation is no part of the default set, which has ten minutes; "" when it is."""
    if task.part != "attention" and task.model.endswith("_plus"):
        return "of Ti+, S+ and B+ only the attention is timed by default; --sweep times layers and models too"
    if name == "reference":
        return "the reference backend is the formula for checking; --sweep times it"
    if name == COMPILED and (task.model, task.dtype) != (SWEEP_MODEL, torch.float32):
        return "compiling takes long, so only S in float32 is compiled by default; --sweep compiles everything"
    if name == COMPILED and task.part == "model" and task.backward:
        return "compiling a whole training step takes minutes; --sweep does it"
    if task.part != "attention" and (slow := why_slow(task.device, task.dtype)):
        return f"{slow}; --sweep times layers and models all the same"
    return ""
