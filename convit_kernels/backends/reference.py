"""The oracle: gated positional self-attention as the paper writes it (arXiv 2103.10697, equation 7), dense and eager.

Nothing here is shared with the fast paths: the positional softmax runs over all N keys of the two-dimensional grid, not
over its factors. Half-precision inputs are computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Inputs


def relative_coordinates(grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dy, (N, N) each in like's dtype and device: column and row of the key minus those of the query."""
    height, width = grid
    token = torch.arange(height * width, device=like.device)
    x, y = token % width, token // width
    return (x[None, :] - x[:, None]).to(like.dtype), (y[None, :] - y[:, None]).to(like.dtype)


def relative_features(grid: tuple[int, int], like: Tensor) -> Tensor:
    """dx, dy and dx^2 + dy^2, (N, N, 3) in like's dtype and device: what the positional logits are linear in."""
    dx, dy = relative_coordinates(grid, like)
    return torch.stack((dx, dy, dx.square() + dy.square()), dim=-1)


def attention_map(
    q: Tensor, k: Tensor, pos_weight: Tensor, gate: Tensor, grid: tuple[int, int], scale: float
) -> Tensor:
    """The mixed map A, (B, H, N, N) in at least float32: (1 - sigmoid(gate)) * content + sigmoid(gate) * position.

    Each row sums to 1.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, pos_weight.dtype), torch.float32)
    q, k, pos_weight, gate = (tensor.to(dtype) for tensor in (q, k, pos_weight, gate))
    content = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    position = torch.einsum("nmf,hf->hnm", relative_features(grid, pos_weight), pos_weight).softmax(dim=-1)
    g = torch.sigmoid(gate)[:, None, None]
    return (1 - g) * content + g * position


def why_not(inputs: Inputs | None) -> str:
    return ""


def attention(inputs: Inputs) -> Tensor:
    """`attention_map` times v, the map (B, H, N, N) under dropout.

    Args:
        inputs: of any device and dtype; shapes in `Inputs`.

    Returns:
        (B, H, N, D) in v's dtype.
    """
    q, k, v, pos_weight, gate, grid, scale, dropout_p = inputs
    weights = attention_map(q, k, pos_weight, gate, grid, scale)
    return (F.dropout(weights, dropout_p) @ v.to(weights.dtype)).to(v.dtype)
