"""`Inputs`: what every backend computes from, checked once."""

import math
import numbers
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
    scale: of the content logits, finite.
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
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be a dense tensor, but is {layout}: pass a dense copy, padded or to_dense()")
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


def _number(name: str, value: float) -> float:
    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat))
    if isinstance(value, bool) or not (symbolic or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, but is {value!r}")
    return value if symbolic else float(value)


def _with_scale(q: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """q, and the scale as a number: one that is a tensor is multiplied into q, which passes its gradient on."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if not isinstance(scale, Tensor):
        scale = _number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, but is {scale}")
        return q, scale
    if scale.dtype not in FLOATING:
        raise TypeError(f"a tensor scale must be float16, bfloat16, float32 or float64, but is {scale.dtype}")
    if scale.dim() > 0 and scale.device != q.device:
        raise ValueError(f"scale is on {scale.device}, but q is on {q.device}: all must be on one device")
    largest = (*q.shape[:3], 1)
    sizes = zip(reversed(scale.shape), reversed(largest), strict=False)
    if scale.dim() > 4 or not all(size in (1, limit) for size, limit in sizes):
        raise ValueError(
            f"a tensor scale must have a shape that broadcasts to {largest}, for example () or ({q.shape[1]}, 1, 1), "
            f"but has {tuple(scale.shape)}"
        )
    return q * scale.to(q.dtype), 1.0


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: GridSize,
    scale: float | Tensor | None,
    dropout_p: float,
) -> Inputs:
    """What a user passed to `gpsa_attention`, which says what is allowed and which errors are raised."""
    _check_tensors(q, k, v, pos_weight, gate)
    dropout_p = _number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but is {dropout_p}")
    grid = resolve_grid(grid_size, q.shape[2])
    q, number = _with_scale(q, scale)
    return Inputs(q, k, v, pos_weight, gate, grid, number, dropout_p)
