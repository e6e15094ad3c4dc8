"""How many floating-point operations the attention takes, for `torch.utils.flop_counter.FlopCounterMode`.

The formulas count what timm's layer multiplies of queries, keys and values: two products of N x N x D forward and four
backward. Not counted: position, which the kernels add to the map entry by entry, and the products that a backward
takes again instead of keeping a map.
"""

import sys
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ._ops import ops


def _product(q: Tensor) -> int:
    """Multiplications and additions of q k^T, q (B, H, N, D)."""
    batch, heads, tokens, head_dim = q.shape
    return 2 * batch * heads * tokens * tokens * head_dim


def _forward(q: Tensor, *rest: Any, **out: Any) -> int:
    return 2 * _product(q)


def _backward(d_out: Tensor, *rest: Any, **out: Any) -> int:
    return 4 * _product(d_out)


def tell_counters() -> None:
    """Gives the formulas to the counters at work.

    A counter copies PyTorch's register when it is made, and importing that takes longer than this whole package; so
    the ops call this whenever something may be counting.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = (getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack())
    for counter in (module, *counters):
        if (registry := getattr(counter, "flop_registry", None)) is not None:
            registry.setdefault(ops.gated_attention, _forward)
            registry.setdefault(ops.gated_attention_backward, _backward)
