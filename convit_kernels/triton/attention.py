"""The ops `gated_attention` and `gated_attention_backward` on a GPU: chooses the regime, makes the tables, launches."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from .backward import backward
from .common import padded
from .configs import MAX_HEADS
from .forward import forward

# The part of the L2 cache that the dense table may take: beyond it the factors are read instead.
DENSE_SHARE = 0.5
# of the interpreter, which has no cache: small enough for tests to reach both regimes
INTERPRETED_L2 = 1 << 20


@functools.lru_cache
def _l2_bytes(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).L2_cache_size)


def is_dense(q: Tensor) -> bool:
    """Whether the dense table of all heads, in q's dtype, fits the L2 cache of q's device."""
    _, heads, tokens, _ = q.shape
    size = heads * tokens * padded(tokens) * q.element_size()
    return size <= DENSE_SHARE * (_l2_bytes(q.device.index) if q.is_cuda else INTERPRETED_L2)


def position_tables(
    q: Tensor, pos_weight: Tensor, height: int, width: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the kernels read of the position: the dense table (H, N, padded(N)) in q's dtype, or both factors,
    (H, height, height) and (H, width, width) in float32. What is not used is None.
    """
    if is_dense(q):
        return ops.dense_position_table.default(pos_weight, height, width, q.dtype), None, None
    return None, *ops.relative_position_tables.default(pos_weight, height, width)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_HERE = contextlib.nullcontext()


def _on(q: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(q.device) if q.is_cuda and q.device.index != torch.cuda.current_device() else _HERE


def forward_with_tables(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The forward pass, without derivatives.

    Args:
        q, k, v: (B, H, N, D) in float16, bfloat16 or float32, any strides; N = height * width.
        pos_weight: (H, 3) float32, the weights of (dx, dy, dx^2 + dy^2).
        gate: (H,) float32, before the sigmoid.
        philox: (2,) int64 on the device, seed and offset of the dropout; None where dropout_p is 0.
        need_grad: whether the second and third result are wanted.

    Returns:
        out (B, H, N, D) in q's dtype, a view of a contiguous (B, N, H, D) tensor, and what the backward needs: lse
        (B, H, N) in float32 and the content's own part C V, like out. Both are None without need_grad. Then the three
        of `position_tables`, which the backward need not make again.

    Raises:
        RuntimeError: there are more heads than a GPU takes, as torch.func.vmap can make of samples.
    """
    if q.shape[1] > MAX_HEADS:
        raise RuntimeError(
            f"the Triton kernels take at most {MAX_HEADS} heads, not {q.shape[1]}: under torch.func.vmap, where each "
            "sample has heads of its own, give vmap a chunk_size"
        )
    if q.numel() == 0:
        out = torch.empty_like(q)
        return out, q.new_empty(q.shape[:3] if need_grad else 0, dtype=torch.float32), out.clone(), None, None, None
    with _on(q):
        table, row_table, col_table = tables = position_tables(q, pos_weight, height, width)
        out, lse, content = forward(
            _unit_stride(q),
            _unit_stride(k),
            _unit_stride(v),
            gate.contiguous(),
            (height, width),
            scale,
            table=table,
            row_table=row_table,
            col_table=col_table,
            dropout_p=dropout_p,
            philox=philox,
            need_grad=need_grad,
        )
    return out, lse, content, *tables


def gated_attention(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, registered for the CUDA key: what `forward_with_tables` returns without the tables."""
    out, lse, content, *_ = forward_with_tables(q, *rest)
    if lse is None or content is None:
        return out, q.new_empty(0, dtype=torch.float32), q.new_empty(0)
    return out, lse, content


def backward_with_tables(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    content: Tensor,
    lse: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    *tables: Tensor | None,
) -> tuple[Tensor, ...]:
    """The backward pass.

    Args:
        d_out: (B, H, N, D), the gradient of out, any strides.
        content, lse: the third and the second result of `gated_attention` with need_grad=True.
        q, k, v, pos_weight, gate, height, width, scale, dropout_p, philox: as `gated_attention` had them.
        tables: the three of `position_tables`; they are made where they are not given.

    Returns:
        dq, dk, dv (B, H, N, D) in q's dtype, d_pos_weight (H, 3) and d_gate (H,) in float32.

    Raises:
        RuntimeError: `gated_attention` was called with need_grad=False.
    """
    if q.numel() == 0:
        empty = [torch.empty_like(q) for _ in range(3)]
        return *empty, torch.zeros_like(pos_weight), torch.zeros_like(gate)
    if lse.numel() == 0:
        raise RuntimeError("gated_attention was called with need_grad=False, so lse is empty: pass need_grad=True")
    with _on(q):
        table, row_table, col_table = tables or position_tables(q, pos_weight, height, width)
        dq, dk, dv, d_gate, d_pos_weight = backward(
            _unit_stride(d_out),
            _unit_stride(q),
            _unit_stride(k),
            _unit_stride(v),
            content,
            lse,
            pos_weight.contiguous(),
            gate.contiguous(),
            (height, width),
            scale,
            table=table,
            row_table=row_table,
            col_table=col_table,
            dropout_p=dropout_p,
            philox=philox,
        )
    return dq, dk, dv, d_pos_weight, d_gate


gated_attention_backward = backward_with_tables  # the op, registered for the CUDA key: its schema has no tables
