"""Plain PyTorch parts on every device: fused attention for the content, two small matrix products for the position.

The output is linear in the two maps, so O = (1 - g) * SDPA(q, k, v) + g * (row_table x col_table) V exactly, and the
positional half costs N * (height + width) * head_dim per head and image instead of N * N * head_dim. No N x N tensor.

The output is NaN or infinite where the reference's is. One exception: an infinity of v gives NaN, not infinity, where
one of the two maps has become zero in v's dtype.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..inputs import Inputs
from ..relpos import axis_tables, relative_position_tables


def _positional_values(v: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The positional attention applied to v, along one side of the grid after the other, the last one first.

    Args:
        v: (B, H, N, D), tokens in row-major order of the grid.
        tables: for each side of the grid (H, side, side) in v's dtype.

    Returns:
        (B, H, N, D).
    """
    mixed = v.reshape(*v.shape[:2], *(table.shape[-1] for table in tables), v.shape[3])  # (B, H, height, width, D)
    for table in reversed(tables):
        # The axis that a table mixes comes first of three, and the others are one: a single product an image and head.
        mixed = mixed.movedim(-2, 2)  # (B, H, width, height, D), then (B, H, height, width, D) again
        mixed = (table @ mixed.flatten(3)).reshape(mixed.shape)
    return mixed.reshape(v.shape)


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


def _content(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B, H, N, D) -> (B, H, N, D) in v's dtype: the content attention applied to v."""
    if ops.why_not(q, k, v):  # PyTorch's fused attention has no forward-mode and no second derivative either
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, values = (tensor.to(dtype) for tensor in (q, k, v))
        return (((q @ k.mT) * scale).softmax(dim=-1) @ values).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


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
    position = _positional_values(v, tables)  # (B, H, N, D), times g
    content = content * ((1 - g).to(v.dtype) * _rows(q, k, scale))  # (H, 1, 1) * (B, H, N, 1)
    # The content has the memory layout that the output projection reads, and the sum keeps it. In place, except where
    # the position may be more than the content is: have a dimension of vmap's, or be of a subclass.
    in_place = type(position) is type(content) and not ops.transformed()
    out = content.add_(position) if in_place else content + position
    return out.to(v.dtype)  # autocast may have made of two half precisions what holds both
