"""`Inputs`: what every backend computes from, checked once."""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import GridSize, fitted_grid, parse_grid

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inputs(NamedTuple):
    """The arguments of `gpsa_attention` in the form in which a backend takes them. All tensors are on one device.

    q, k, v: (B, H, N, D), one dtype of FLOATING, any strides; H and D are at least 1, B may be 0.
    pos_weight: (H, axes + 1), the weights of the offset along each axis, the last axis first, and of the squared
        distance: (dx, dy, dx^2 + dy^2) on a plane; in any dtype of FLOATING.
    gate: (H,), before the sigmoid, in any dtype of FLOATING.
    grid: the sides, whose product is N; the tokens are in row-major order.
    scale: of the content logits, finite.
    dropout_p: in [0, 1), for the mixed map.
    spacing: the distance between neighbours along each side of the grid; None where the grid is a plane and it is 1.
        One dimension is a plane of height 1, and one spacing for both axes of a plane is part of pos_weight: so None is
        all but three dimensions, and planes whose axes differ.
    key_mask: (B, N) or (1, N), bool or in a dtype of FLOATING: the mixed map times it, its rows then divided by their
        sums. Backends but "reference" get inputs without one, see key_mask.py.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor
    grid: tuple[int, ...]
    scale: float
    dropout_p: float
    spacing: tuple[float, ...] | None = None
    key_mask: Tensor | None = None


def kernel_head_dim(inputs: Inputs) -> int:
    """Channels a head of what a kernel is given: one more with a key mask, whose sums it carries."""
    # no property of Inputs and no sum with a bool: torch.compile (2.10) knows neither of them here
    head_dim = inputs.q.shape[3]
    return head_dim if inputs.key_mask is None else head_dim + 1


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, axes: int) -> None:
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
    for name, shape in (("pos_weight", (heads, axes + 1)), ("gate", (heads,))):
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape} for {heads} heads, but has {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, but q is on {q.device}: all must be on one device")


def _number(name: str, value: float) -> float:
    if type(value) is float:  # the usual, at once: asking a number for its kind takes longer than all other checks
        return value
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


def _on_a_plane(
    pos_weight: Tensor, grid: tuple[int, ...], spacing: float | Sequence[float]
) -> tuple[Tensor, tuple[int, ...], tuple[float, ...] | None]:
    """The same positions with unit spacing on a plane, where there are such, else as they are."""
    axes = len(grid)
    if axes == 2 and type(spacing) is float and spacing == 1:
        return pos_weight, grid, None
    given = (spacing,) * axes if not isinstance(spacing, Sequence) or isinstance(spacing, str) else tuple(spacing)
    if len(given) != axes:
        raise ValueError(f"spacing must be one number, or one for each of the grid's {axes} sides, but is {spacing}")
    steps = tuple(_number("spacing", step) for step in given)
    if not all(-math.inf < step < math.inf for step in steps):
        raise ValueError(f"spacing must be finite, but is {spacing}")
    if axes == 3 or steps[0] != steps[-1]:
        return pos_weight, grid, steps
    if axes == 2 and steps[0] == 1:
        return pos_weight, grid, None
    *linear, squared = pos_weight.to(torch.promote_types(pos_weight.dtype, torch.float32)).unbind(dim=1)
    step = steps[0]
    along_x, along_y = linear if axes == 2 else (linear[0], torch.zeros_like(linear[0]))
    return torch.stack((along_x * step, along_y * step, squared * step**2), dim=1), (1, *grid)[-2:], None


def checked_mask(key_mask: Tensor, q: Tensor) -> Tensor:
    """(B, N) or (1, N)."""
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor, but is a {type(key_mask).__name__}")
    if key_mask.dtype not in (torch.bool, *FLOATING):
        raise TypeError(f"key_mask must be bool, float16, bfloat16, float32 or float64, but is {key_mask.dtype}")
    batch, _, tokens, _ = q.shape
    mask = key_mask[None] if key_mask.dim() == 1 else key_mask
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != tokens:
        raise ValueError(
            f"key_mask must have shape (batch, tokens), {(batch, tokens)}, or ({tokens},) for all images, "
            f"but has {tuple(key_mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"key_mask is on {mask.device}, but q is on {q.device}: all must be on one device")
    return mask


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: GridSize,
    scale: float | Tensor | None,
    dropout_p: float,
    spacing: float | Sequence[float] = 1.0,
    key_mask: Tensor | None = None,
) -> Inputs:
    """What a user passed to `gpsa_attention`, which says what is allowed and which errors are raised."""
    sides = None if grid_size is None else parse_grid(grid_size)
    _check_tensors(q, k, v, pos_weight, gate, axes=2 if sides is None else len(sides))
    dropout_p = _number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but is {dropout_p}")
    pos_weight, grid, steps = _on_a_plane(pos_weight, fitted_grid(sides, q.shape[2]), spacing)
    q, number = _with_scale(q, scale)
    mask = None if key_mask is None else checked_mask(key_mask, q)
    return Inputs(q, k, v, pos_weight, gate, grid, number, dropout_p, steps, mask)
