"""Plain PyTorch parts on every device: fused attention for the content, two small matrix products for the position.

The output is linear in the two maps, so O = (1 - g) * SDPA(q, k, v) + g * (row_table x col_table) V exactly, and the
positional half costs N * (height + width) * head_dim per head and image instead of N * N * head_dim. No N x N tensor.

The output is NaN or infinite where the reference's is. One exception: an infinity of v gives NaN, not infinity, where
one of the two maps has become zero in v's dtype.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..eager_attention import content_values, differentiable_gradients, positional_values
from ..inputs import Inputs
from ..relpos import axis_tables, relative_position_tables


def _rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, H, N, 1): NaN for the queries whose content softmax is NaN because q or k is not finite, else 1.

    PyTorch's fused attention loses many of these NaNs, and treats a query whose scores are all -inf as one that sees no
    key. A softmax is NaN where a score is NaN or +inf, or all are -inf. A score is NaN or +inf when the product of a
    channel is, which the largest and the smallest key of each channel tell.

    Args:
        q, k: (B, H, N, D).
    """
    q, k = q.detach(), k.detach()
    largest, smallest = k.amax(dim=-2, keepdim=True), k.amin(dim=-2, keepdim=True)  # (B, H, 1, D)
    # (B, H, 1, D): 0 for a channel whose keys are finite, else their infinity, NaN for both of them
    channel = (largest - largest.nan_to_num()) + (smallest - smallest.nan_to_num())
    # (B, H, N, 1): 0, -inf, or +inf or NaN where a score is; NaN where q is not finite
    scores = (q * channel).sum(dim=-1, keepdim=True) * scale
    # (B, H, 1, 1): 0 where some key is finite, else -inf
    finite_keys = (k * 0).sum(dim=-1, keepdim=True).nan_to_num(nan=-math.inf).amax(dim=-2, keepdim=True)
    return 1 + 0 * (scores.clamp(min=0) + finite_keys)


class _DerivableAgain(torch.autograd.Function):
    """The result of PyTorch's fused attention, as it is. It has no second derivative, unlike this.

    A backward pass that is to be differentiated in turn goes through the plain softmax, not through the fused one.
    """

    @staticmethod
    def forward(ctx: Any, content: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return content.view_as(content)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        plain = differentiable_gradients(lambda q, k, v: content_values(q, k, v, ctx.scale), ctx.saved_tensors, grad)
        return None, *plain, None


def _content(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B, H, N, D) -> (B, H, N, D) in v's dtype: the content attention applied to v."""
    if ops.why_not(q, k, v):  # PyTorch's fused attention has no forward-mode derivative either
        return content_values(q, k, v, scale)
    content = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if content.requires_grad and not torch.compiler.is_compiling() and not ops.exporting() and not ops.transformed():
        content = _DerivableAgain.apply(content, q, k, v, scale)
    return content


def why_not(inputs: Inputs | None) -> str:
    if inputs is not None and inputs.dropout_p > 0:
        return "dropout acts on the mixed map, which is never built"
    return ""


def attention(inputs: Inputs) -> Tensor:
    """The gated mix of SDPA's result and the tables' result.

    Args:
        inputs: of any device and dtype; shapes in `Inputs`. dropout_p must be 0 (see `why_not`).

    Returns:
        (B, H, N, D) in v's dtype, a view of a contiguous (B, N, H, D) tensor where PyTorch's attention gives one.
    """
    q, k, v, pos_weight, gate, grid, scale, _, spacing, _ = inputs
    pos_weight = pos_weight.to(torch.promote_types(torch.promote_types(pos_weight.dtype, v.dtype), torch.float32))
    first, *others = axis_tables(pos_weight, grid, spacing) if spacing else relative_position_tables(pos_weight, grid)
    g = torch.sigmoid(gate.to(first.dtype))[:, None, None]  # (H, 1, 1)
    content = _content(q, k, v, scale)  # (B, H, N, D)
    tables = [table.to(v.dtype) for table in (g * first, *others)]
    position = positional_values(v, tables)  # (B, H, N, D), times g
    content = content * ((1 - g).to(v.dtype) * _rows(q, k, scale))  # (H, 1, 1) * (B, H, N, 1)
    # The content has the memory layout that the output projection reads, and the sum keeps it. In place, except where
    # the position may be more than the content is: have a dimension of vmap's, or be of a subclass.
    in_place = type(position) is type(content) and not ops.transformed()
    out = content.add_(position) if in_place else content + position
    return out.to(v.dtype)  # autocast may have made of two half precisions what holds both
