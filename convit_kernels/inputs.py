"""`Inputs`: what every backend computes from, checked once."""

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import GridSize, resolve_grid

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inputs(NamedTuple):
    """The arguments of `gpsa_attention` in the form in which a backend takes them. All tensors are on one device.

    q, k, v: (B, H, N, D), one dtype of FLOATING, any strides; H and D are at least 1, B may be 0.
    pos_weight: (H, 3), the weights of (dx, dy, dx^2 + dy^2), in any dtype of FLOATING.
    gate: (H,), before the sigmoid, in any dtype of FLOATING.
    grid: (height, width) with height * width == N; the tokens are in row-major order.
    scale: of the content logits.
    dropout_p: in [0, 1), for the mixed map.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor
    grid: tuple[int, int]
    scale: float
    dropout_p: float


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v, "pos_weight": pos_weight, "gate": gate}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, but is a {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but is {tensor.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape (batch, heads, tokens, head_dim), but has {tuple(q.shape)}")
    for name in ("k", "v"):
        if tensors[name].shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, but has {tuple(tensors[name].shape)}")
        if tensors[name].dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, but has {tensors[name].dtype}")
    _, heads, _, head_dim = q.shape
    if heads == 0 or head_dim == 0:
        raise ValueError(f"q must have at least one head and one channel a head, but has shape {tuple(q.shape)}")
    for name, shape in (("pos_weight", (heads, 3)), ("gate", (heads,))):
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape} for {heads} heads, but has {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, but q is on {q.device}: all must be on one device")


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: GridSize,
    scale: float | None,
    dropout_p: float,
) -> Inputs:
    """What a user passed to `gpsa_attention`, which says what is allowed and which errors are raised."""
    _check_tensors(q, k, v, pos_weight, gate)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but is {dropout_p}")
    grid = resolve_grid(grid_size, q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Inputs(q, k, v, pos_weight, gate, grid, scale, dropout_p)
