"""The ops `gated_attention` and `gated_attention_backward` on a GPU: chooses the regime, makes the tables, launches."""

import contextlib
import functools

import torch
from torch import Tensor

from .._ops import ops
from .backward import backward
from .common import padded
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
    """The dense table, or both factors; the others are None."""
    if is_dense(q):
        return ops.dense_position_table(pos_weight, height, width, q.dtype), None, None
    return None, *ops.relative_position_tables(pos_weight, height, width)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _on(q: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def gated_attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = q.new_empty(0)
    if q.numel() == 0:
        out = torch.empty_like(q)
        return out, q.new_empty(q.shape[:3] if need_grad else 0, dtype=torch.float32), out.clone()
    q, k, v = (_unit_stride(tensor) for tensor in (q, k, v))
    with _on(q):
        table, row_table, col_table = position_tables(q, pos_weight, height, width)
        out, lse, content = forward(
            q,
            k,
            v,
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
    if lse is None or content is None:
        return out, nothing.float(), nothing
    return out, lse, content


def gated_attention_backward(
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
) -> tuple[Tensor, ...]:
    if q.numel() == 0:
        empty = [torch.empty_like(q) for _ in range(3)]
        return *empty, torch.zeros_like(pos_weight), torch.zeros_like(gate)
    if lse.numel() == 0:
        raise RuntimeError("the forward pass was told that no gradient is needed: call it with need_grad=True")
    d_out, q, k, v = (_unit_stride(tensor) for tensor in (d_out, q, k, v))
    with _on(q):
        table, row_table, col_table = position_tables(q, pos_weight, height, width)
        dq, dk, dv, d_gate, d_pos_weight = backward(
            d_out,
            q,
            k,
            v,
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
