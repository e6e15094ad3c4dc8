"""What the benchmarks measure: by default, and on request."""

import torch

from convit_kernels.bench.implementations import ARCHITECTURES, COMPILED, Task

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
SWEEP_MODEL = "convit_small"
SWEEP_SIDES = (14, 20, 28, 40, 52, 64)
SWEEP_SIDES_BATCH = 8
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def default_tasks(device: str, dtype: torch.dtype) -> list[Task]:
    """Attention, layer and model of every size at 224 pixels, forward and training step."""
    cuda = device.startswith("cuda")
    return [
        Task(part, model, CUDA_BATCH if cuda else batch, backward=backward, dtype=dtype, device=device)
        for (part, backward), batches in CPU_BATCH.items()
        for model, batch in zip(ARCHITECTURES, batches, strict=True)
    ]


def sweep_tasks(device: str, dtype: torch.dtype) -> list[Task]:
    """How the attention and the layer grow with the grid and with the batch."""
    sizes = [(SWEEP_SIDES_BATCH, side) for side in SWEEP_SIDES] + [(batch, 14) for batch in SWEEP_BATCHES]
    return [
        Task(part, SWEEP_MODEL, batch, side, backward, dtype, device)
        for part in ("attention", "layer")
        for backward in (False, True)
        for batch, side in sizes
    ]


def why_left_out(task: Task, name: str) -> str:
    """Why an implementation is no part of the default set, which has ten minutes; "" when it is."""
    if name == COMPILED and task.model not in ("convit_tiny", "convit_small"):
        return "compiling takes long, so only Ti and S are compiled by default; --sweep compiles every size"
    if name == COMPILED and task.part == "model" and task.backward:
        return "compiling a whole training step takes minutes; --sweep does it"
    if name == "reference" and task.part == "model":
        return "the reference backend is the formula for checking; --sweep times it in whole models"
    return ""
