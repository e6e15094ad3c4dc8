"""The oracle: gated positional self-attention as the paper writes it (arXiv 2103.10697, equation 7), dense and eager.

Nothing here is shared with the fast paths: the positional softmax runs over all N keys of the two-dimensional grid, not
over its factors. Half-precision inputs are computed in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Inputs


def relative_coordinates(grid: tuple[int, ...], like: Tensor, spacing: tuple[float, ...] | None = None) -> list[Tensor]:
    """dx, dy and so on, (N, N) each in like's dtype and device: the key's coordinate minus the query's.

    The last axis of the grid comes first. spacing: between neighbours along each side of the grid; None: 1.
    """
    token = torch.arange(math.prod(grid), device=like.device)
    offsets = []
    for side in reversed(grid):
        at, token = token % side, token // side
        offsets.append((at[None, :] - at[:, None]).to(like.dtype))
    if spacing is not None:
        offsets = [offset * step for offset, step in zip(offsets, reversed(spacing), strict=True)]
    return offsets


def relative_features(grid: tuple[int, ...], like: Tensor, spacing: tuple[float, ...] | None = None) -> Tensor:
    """(dx, dy, dx^2 + dy^2) and its like, (N, N, axes + 1): what the positional logits are linear in.

    Arguments as for `relative_coordinates`.
    """
    offsets = torch.stack(relative_coordinates(grid, like, spacing), dim=-1)
    return torch.cat((offsets, offsets.square().sum(dim=-1, keepdim=True)), dim=-1)


def masked(attention: Tensor, key_mask: Tensor) -> Tensor:
    """A map, (B, H, N, N), times a mask of its keys, (B or 1, N), each row then divided by its sum."""
    attention = attention * key_mask[:, None, None, :]
    return attention / attention.sum(dim=-1, keepdim=True)


def attention_map(
    q: Tensor,
    k: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid: tuple[int, ...],
    scale: float,
    spacing: tuple[float, ...] | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The mixed map A, (B, H, N, N) in at least float32: (1 - sigmoid(gate)) * content + sigmoid(gate) * position.

    Each row sums to 1. With a key mask, (B, N), the map is multiplied by it and each row divided by its sum.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, pos_weight.dtype), torch.float32)
    q, k, pos_weight, gate = (tensor.to(dtype) for tensor in (q, k, pos_weight, gate))
    content = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    features = relative_features(grid, pos_weight, spacing)
    position = torch.einsum("nmf,hf->hnm", features, pos_weight).softmax(dim=-1)
    g = torch.sigmoid(gate)[:, None, None]
    mixed = (1 - g) * content + g * position
    return mixed if key_mask is None else masked(mixed, key_mask.to(dtype))


def why_not(inputs: Inputs | None) -> str:
    return ""


def attention(inputs: Inputs) -> Tensor:
    """`attention_map` times v, the map (B, H, N, N) under dropout.

    Args:
        inputs: of any device and dtype; shapes in `Inputs`.

    Returns:
        (B, H, N, D) in v's dtype.
    """
    q, k, v, pos_weight, gate, grid, scale, dropout_p, spacing, key_mask = inputs
    weights = attention_map(q, k, pos_weight, gate, grid, scale, spacing, key_mask)
    return (F.dropout(weights, dropout_p) @ v.to(weights.dtype)).to(v.dtype)
