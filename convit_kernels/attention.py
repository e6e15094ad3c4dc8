"""`gpsa_attention`: checks what it is given, chooses a backend, calls it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import composite, cpu, reference, triton
from .grid import GridSize, resolve_grid

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Backend(NamedTuple):
    """One way to compute the attention: its name, whether it can run here, and if not the reason."""

    name: str
    available: bool
    reason: str


def _always(q: Tensor | None = None) -> str:
    return ""


class _Entry(NamedTuple):
    attention: Callable[..., Tensor]
    why_not: Callable[[Tensor | None], str]  # "" when it can run: on that query tensor, or at all for None


# fastest first: backend=None takes the first that can run
_BACKENDS: dict[str, _Entry] = {
    "triton": _Entry(triton.attention, triton.why_not),
    "cpu": _Entry(cpu.attention, cpu.why_not),
    "composite": _Entry(composite.attention, _always),
    "reference": _Entry(reference.attention, _always),
}


def backends() -> list[Backend]:
    """Every backend, fastest first: its name, whether it can run on this machine, and the reason where it cannot."""
    reasons = {name: entry.why_not(None) for name, entry in _BACKENDS.items()}
    return [Backend(name, not reason, reason) for name, reason in reasons.items()]


def check_backend(name: str | None) -> None:
    """Raises ValueError for a name that is no backend, RuntimeError for one that cannot run on this machine."""
    if name is None:
        return
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}: allowed are None (the fastest that can run) and {list(_BACKENDS)}")
    if reason := _BACKENDS[name].why_not(None):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")


def _choose(name: str | None, q: Tensor) -> str:
    check_backend(name)
    if name is None:
        return next(key for key, entry in _BACKENDS.items() if not entry.why_not(q))
    if reason := _BACKENDS[name].why_not(q):
        raise RuntimeError(f"backend {name!r} cannot run on this input: {reason}")
    return name


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


def gpsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    *,
    grid_size: GridSize = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Gated positional self-attention (arXiv 2103.10697, equation 7) of tokens on a two-dimensional grid.

    out = A v,  A = (1 - g) * softmax(scale * q k^T) + g * softmax_j(w . (dx, dy, dx^2 + dy^2)),  g = sigmoid(gate)

    Args:
        q, k, v: (B, H, N, D) in float16, bfloat16, float32 or float64, any strides; N tokens in row-major order.
        pos_weight: (H, 3), the reference layer's `pos_proj.weight`.
        gate: (H,), the raw gating parameter, before the sigmoid.
        grid_size: (height, width) with height * width == N, one int for a square grid, or None: square.
        scale: of the content logits; default D ** -0.5.
        dropout_p: probability that an entry of the mixed map A is dropped, in [0, 1). The other entries grow by
            1 / (1 - dropout_p). The backends "cpu" and "composite" take "reference"'s dense path for it.
        backend: a name from `backends()`; None chooses the fastest that can run.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        TypeError: something is no floating-point tensor, or q, k and v differ in dtype.
        ValueError: shapes, devices, the grid, dropout_p or the backend's name do not fit; the text says what does.
        RuntimeError: the backend asked for cannot run here; the text says why.
    """
    _check_tensors(q, k, v, pos_weight, gate)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but is {dropout_p}")
    grid = resolve_grid(grid_size, q.shape[2])
    name = _choose(backend, q)
    if dropout_p > 0 and name in ("cpu", "composite"):
        name = "reference"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _BACKENDS[name].attention(q, k, v, pos_weight, gate, grid, scale, dropout_p)
