"""The attention in plain PyTorch, which has every derivative: what the fused kernels' second derivatives come from.

The content's softmax is in full, (B, H, N, N); the position goes by its tables.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .eager_tables import relative_position_tables


def content_values(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (B, H, N, D) -> (B, H, N, D) in v's dtype: the content attention applied to v."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, values = (tensor.to(dtype) for tensor in (q, k, v))
    return (((q @ k.mT) * scale).softmax(dim=-1) @ values).to(v.dtype)


def positional_values(v: Tensor, tables: Sequence[Tensor]) -> Tensor:
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


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, height: int, width: int, scale: float
) -> Tensor:
    """(B, H, N, D) in q's dtype, from what the op of this name takes, without dropout."""
    row_table, col_table = relative_position_tables(pos_weight, height, width)
    g = torch.sigmoid(gate)[:, None, None]
    values = v.to(row_table.dtype)
    content = content_values(q, k, values, scale)
    return ((1 - g) * content + positional_values(values, (g * row_table, col_table))).to(q.dtype)


def differentiable_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], grads: Tensor | Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*inputs) for those of its results, within a backward pass.

    Where that pass is to be differentiated in turn, these can be. None for an input that nothing depends on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # each a node of its own: one tensor may stand for two inputs, or one input be computed from another
        nodes = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*nodes), nodes, grads, create_graph=create_graph, allow_unused=True)
