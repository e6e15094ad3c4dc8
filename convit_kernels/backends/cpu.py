"""The fused C++ kernels on the CPU: scores, softmax, position and values of a few queries at a time, in the caches."""

import torch
from torch import Tensor

from .. import extension, ops


def why_not(q: Tensor | None = None) -> str:
    """Why the kernels cannot run here, or on this query tensor; "" when they can."""
    if extension.status["_C"] is not None:
        return extension.status["_C"]
    if ops.INTERPRETED:
        return "Triton's interpreter has taken its place (TRITON_INTERPRET=1)"
    if q is not None and q.device.type != "cpu":
        return f"the tensors are on {q.device}, not on the CPU"
    return ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    if dropout_p > 0:
        raise NotImplementedError("the kernels have no dropout: use the reference backend")
    dtype = torch.promote_types(q.dtype, torch.float32)
    needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, pos_weight, gate))
    out, *_ = ops.gated_attention(q, k, v, pos_weight.to(dtype), gate.to(dtype), *grid, scale, 0.0, None, needs_lse)
    return out  # type: ignore[no-any-return]
