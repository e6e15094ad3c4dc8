"""Measures launch configurations on the GPU at hand and keeps the fastest in the user's cache, where `configs.lookup`
finds them.

The table of `configs` was chosen by compiling alone. What it cannot know, how well loads overlap with arithmetic and
what a real memory system does, is measured here: for each kernel every candidate tile with one, two and three stages.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import configs
from .attention import position_tables
from .backward import backward
from .candidates import candidates
from .configs import Config
from .forward import forward

STAGES = (1, 2, 3)

Run = Callable[[], object]


class Shape(NamedTuple):
    """What is tuned for. The choice is kept for the dtype, the head_dim, the regime, about as many tokens, and as few
    programs or more, see `configs.few_programs`."""

    batch: int
    heads: int
    grid_size: tuple[int, int]
    head_dim: int
    dtype: torch.dtype


class Finding(NamedTuple):
    """The fastest configuration of one kernel beside the one it replaces; seconds of the pass that it is part of,
    inf where the GPU refuses it."""

    pass_name: str
    config: Config
    seconds: float
    before: Config
    seconds_before: float
    tried: int


def on_gpu(run: Run) -> float:
    """Seconds of a run, the median of many, each with a cold L2 cache."""
    milliseconds: float = triton.testing.do_bench(run, quantiles=[0.5])
    return milliseconds / 1e3


def tune(shape: Shape, device: torch.device, timed: Callable[[Run], float] = on_gpu) -> Iterator[Finding]:
    """Measures the kernels one after the other, each with the best of those before it, then keeps what was found.

    Args:
        timed: the seconds of a run.

    A configuration that the GPU refuses, for its shared memory or registers, is passed over. What was found is stored
    when the last kernel has been measured: an interrupted run changes nothing.

    Raises:
        RuntimeError: the GPU refuses every configuration of a kernel.
    """
    batch, heads, (height, width), head_dim, dtype = shape
    tokens, scale = height * width, head_dim**-0.5
    q, k = torch.randn(batch, tokens, 2, heads, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    v, d_out = torch.randn(2, batch, tokens, heads, head_dim, dtype=dtype, device=device).transpose(2, 3)
    gate = torch.zeros(heads, device=device)  # half open: both branches have work
    pos_weight = torch.tensor([0.0, 0.0, -1.0], device=device).repeat(heads, 1)
    table, row_table, col_table = position_tables(q, pos_weight, height, width)
    tables: dict[str, Any] = {"table": table, "row_table": row_table, "col_table": col_table}
    regime: configs.Regime = "factored" if table is None else "dense"

    def attend(config: Config) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return forward(q, k, v, gate, (height, width), scale, need_grad=True, config=config, **tables)

    few = configs.few_programs(tokens, batch * heads, device)
    chosen = {
        name: configs.table_config(
            name, dtype=dtype, head_dim=head_dim, regime=regime, family_name=configs.family(device), few=few
        )
        for name in configs.PASSES
    }
    _, lse, content = attend(chosen["forward"])
    assert lse is not None and content is not None

    def run(pass_name: str, config: Config) -> object:
        if pass_name == "forward":
            return attend(config)
        kernels = {**chosen, pass_name: config}
        return backward(
            d_out, q, k, v, content, lse, pos_weight, gate, (height, width), scale,
            configs=(kernels["backward_q"], kernels["backward_kv"], kernels["backward_position"]), **tables,
        )  # fmt: skip

    for pass_name in configs.PASSES:
        before = chosen[pass_name]
        seconds: dict[Config, float] = {}
        for config in dict.fromkeys([before, *candidates(pass_name, dtype.itemsize, head_dim, STAGES)]):
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                seconds[config] = timed(functools.partial(run, pass_name, config))
        if not seconds:
            raise RuntimeError(f"this GPU refuses every configuration of {pass_name}, the table's {before} too")
        best = chosen[pass_name] = min(seconds, key=seconds.__getitem__)
        yield Finding(pass_name, best, seconds[best], before, seconds.get(before, math.inf), len(seconds))
    entries = {
        configs.entry_key(name, dtype=dtype, head_dim=head_dim, regime=regime, num_tokens=tokens, few=few): config
        for name, config in chosen.items()
    }
    configs.store_tuned(torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter", entries)
