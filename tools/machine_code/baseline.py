"""Flash attention without position: the baseline that the instruction counts of the fused kernels are divided by.

Same tiles, same helpers, same treatment of the edges and of the rows' numbers as in `convit_kernels.triton.forward` and
`backward`, and nothing of the position, the gates or dropout. The backward pass has three kernels, as in flash
attention: each row's delta from dO and O, then dQ, then dK and dV. It is no backend and runs in no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convit_kernels.triton.common import (
    LN2,
    LOG2E,
    LOWEST,
    accumulate,
    block_ptrs,
    inner,
    load_at,
    load_rows,
    matmul_precision,
    matrix_ptr,
    moved,
    program_block,
    row_products,
    rows_of,
    scaled,
    split_head_dim,
    store_rows,
    tail,
    zeros,
)
from convit_kernels.triton.configs import Config

LOG2E_: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit
def content_forward_tile(
    q, m, total, c, k_ptrs, v_ptrs, logit_scale, left,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of keys. RAGGED: it reaches past the last token, and no tile was before it."""
    columns = tl.arange(0, BLOCK_N)
    k = load_at(k_ptrs, columns, left, HEAD_DIM, RAGGED)
    v = load_at(v_ptrs, columns, left, HEAD_DIM, RAGGED)
    s = inner(q, k, PRECISION)
    if RAGGED:
        s = tl.where(columns[None, :] < left, s * logit_scale, float("-inf"))
        m = tl.maximum(tl.max(s, 1), LOWEST)
        e = tl.exp2(s - m[:, None])
        total = tl.sum(e, 1)
    else:
        new_m = tl.maximum(m, tl.max(s, 1) * logit_scale)
        e = tl.exp2(s * logit_scale - new_m[:, None])
        correction = tl.exp2(m - new_m)
        total = total * correction + tl.sum(e, 1)
        m = new_m
        c = scaled(c, correction[:, None])
    return m, total, accumulate(e.to(v[0].dtype), v, c, PRECISION)


@triton.jit
def content_forward_kernel(
    q, k, v, out, lse_ptr, logit_scale, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TAIL: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T) v; grid and arguments as in `convit_kernels.triton.forward`."""
    batch, head, first_row = program_block(num_tokens, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    k_ptr = matrix_ptr(k, batch, head)
    v_ptr = matrix_ptr(v, batch, head)
    q_tile = load_rows(matrix_ptr(q, batch, head), rows, q.row, num_tokens, HEAD_DIM, SPLIT, True)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    c = zeros(BLOCK_M, SPLIT)
    whole = num_tokens // BLOCK_N * BLOCK_N
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        m, total, c = content_forward_tile(
            q_tile, m, total, c, block_ptrs(k_ptr, columns, k.row, SPLIT), block_ptrs(v_ptr, columns, v.row, SPLIT),
            logit_scale, num_tokens - whole, HEAD_DIM, TAIL, PRECISION, True,
        )  # fmt: skip
    k_ptrs = block_ptrs(k_ptr, tl.arange(0, BLOCK_N), k.row, SPLIT)
    v_ptrs = block_ptrs(v_ptr, tl.arange(0, BLOCK_N), v.row, SPLIT)
    k_step = tl.cast(k.row, tl.int64) * BLOCK_N
    v_step = tl.cast(v.row, tl.int64) * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        m, total, c = content_forward_tile(
            q_tile, m, total, c, k_ptrs, v_ptrs, logit_scale, num_tokens, HEAD_DIM, BLOCK_N, PRECISION, False
        )
        k_ptrs = moved(k_ptrs, k_step)
        v_ptrs = moved(v_ptrs, v_step)
    c = scaled(c, (1.0 / total)[:, None])
    store_rows(matrix_ptr(out, batch, head), rows, out.row, num_tokens, c, HEAD_DIM, SPLIT)
    if STORE_LSE:
        lse_ptrs = lse_ptr + (batch * num_heads + head).to(tl.int64) * num_tokens + rows
        tl.store(lse_ptrs, (m + tl.log2(total)) * LN2, mask=rows < num_tokens)


def content_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, config: Config, *, need_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale q k^T) v`` for a positive scale.

    Args:
        q, k, v: (B, H, N, D), float32, float16 or bfloat16, any strides but the last, which is 1.
        config: launch configuration.
        need_lse: whether the second result is wanted.

    Returns:
        out (B, H, N, D), a view of a contiguous (B, N, H, D) tensor, and lse (B, H, N) in float32, the natural
        logarithm of the sums of exponentials, or None.
    """
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if need_lse else None
    content_forward_kernel[triton.cdiv(tokens, config.block_m) * batch, heads](
        rows_of(q), rows_of(k, constant=True), rows_of(v, constant=True), rows_of(out), lse,
        scale * LOG2E, heads, tokens,
        HEAD_DIM=head_dim, SPLIT=split_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION=matmul_precision(q.dtype), TAIL=tail(tokens, config.block_n), STORE_LSE=need_lse,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@triton.jit
def content_backward_rows_kernel(
    do, out, lse_ptr, row_lse_ptr, row_delta_ptr, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = dO . O, and lse to base 2, +inf past the last token. Grid: (row blocks x images, heads)."""
    batch, head, first_row = program_block(num_tokens, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    do_tile = load_rows(matrix_ptr(do, batch, head), rows, do.row, num_tokens, HEAD_DIM, SPLIT, True)
    out_tile = load_rows(matrix_ptr(out, batch, head), rows, out.row, num_tokens, HEAD_DIM, SPLIT, True)
    matrix = (batch * num_heads + head).to(tl.int64)
    lse = tl.load(lse_ptr + matrix * num_tokens + rows, mask=rows < num_tokens, other=float("inf")) * LOG2E_
    tl.store(row_lse_ptr + matrix * num_rows + rows, lse)
    tl.store(row_delta_ptr + matrix * num_rows + rows, row_products(do_tile, out_tile))


@triton.jit
def content_query_tile(
    dq, q, do, lse, delta, k_ptr, k_stride, v_ptr, v_stride, logit_scale, left,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys for a block of queries. k_ptr and v_ptr point at the tile. LAST: it reaches past the last
    token."""
    columns = tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, columns, k_stride, left, HEAD_DIM, SPLIT, LAST)
    v = load_rows(v_ptr, columns, v_stride, left, HEAD_DIM, SPLIT, LAST)
    c = tl.exp2(inner(q, k, PRECISION) * logit_scale - lse[:, None])
    if LAST:
        c = tl.where(columns[None, :] < left, c, 0.0)
    ds = c * (inner(do, v, PRECISION) - delta[:, None])
    return accumulate(ds.to(k[0].dtype), k, dq, PRECISION)


@triton.jit
def content_backward_q_kernel(
    do, q, k, v, row_lse_ptr, row_delta_ptr, dq, scale, logit_scale, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """dQ. Grid: (row blocks x images, heads)."""
    batch, head, first_row = program_block(num_tokens, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    k_ptr = matrix_ptr(k, batch, head)
    v_ptr = matrix_ptr(v, batch, head)
    q_tile = load_rows(matrix_ptr(q, batch, head), rows, q.row, num_tokens, HEAD_DIM, SPLIT, True)
    do_tile = load_rows(matrix_ptr(do, batch, head), rows, do.row, num_tokens, HEAD_DIM, SPLIT, True)
    row = (batch * num_heads + head).to(tl.int64) * num_rows + rows
    lse = tl.load(row_lse_ptr + row)
    delta = tl.load(row_delta_ptr + row)
    dq_tile = zeros(BLOCK_M, SPLIT)
    k_step = tl.cast(k.row, tl.int64) * BLOCK_N
    v_step = tl.cast(v.row, tl.int64) * BLOCK_N
    whole = num_tokens // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq_tile = content_query_tile(
            dq_tile, q_tile, do_tile, lse, delta, k_ptr, k.row, v_ptr, v.row, logit_scale, num_tokens - start,
            HEAD_DIM, SPLIT, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        k_ptr += k_step
        v_ptr += v_step
    if RAGGED:
        dq_tile = content_query_tile(
            dq_tile, q_tile, do_tile, lse, delta, k_ptr, k.row, v_ptr, v.row, logit_scale, num_tokens - whole,
            HEAD_DIM, SPLIT, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    dq_tile = scaled(dq_tile, scale)
    store_rows(matrix_ptr(dq, batch, head), rows, dq.row, num_tokens, dq_tile, HEAD_DIM, SPLIT)


@triton.jit
def content_backward_kv_kernel(
    do, q, k, v, row_lse_ptr, row_delta_ptr, dk, dv, scale, logit_scale, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid: (key blocks x images, heads)."""
    batch, head, first_column = program_block(num_tokens, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_N)
    q_ptr = matrix_ptr(q, batch, head)
    do_ptr = matrix_ptr(do, batch, head)
    first_row = (batch * num_heads + head).to(tl.int64) * num_rows
    row_lse_ptr += first_row
    row_delta_ptr += first_row
    k_tile = load_rows(matrix_ptr(k, batch, head), columns, k.row, num_tokens, HEAD_DIM, SPLIT, True)
    v_tile = load_rows(matrix_ptr(v, batch, head), columns, v.row, num_tokens, HEAD_DIM, SPLIT, True)
    dk_tile = zeros(BLOCK_N, SPLIT)
    dv_tile = zeros(BLOCK_N, SPLIT)
    q_step = tl.cast(q.row, tl.int64) * BLOCK_M
    do_step = tl.cast(do.row, tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    for start in range(0, num_tokens, BLOCK_M):
        left = num_tokens - start
        q_tile = load_rows(q_ptr, rows, q.row, left, HEAD_DIM, SPLIT, True)
        do_tile = load_rows(do_ptr, rows, do.row, left, HEAD_DIM, SPLIT, True)
        c = tl.exp2(inner(k_tile, q_tile, PRECISION) * logit_scale - tl.load(row_lse_ptr + rows)[None, :])
        dv_tile = accumulate(c.to(do_tile[0].dtype), do_tile, dv_tile, PRECISION)
        ds = c * (inner(v_tile, do_tile, PRECISION) - tl.load(row_delta_ptr + rows)[None, :])
        dk_tile = accumulate(ds.to(q_tile[0].dtype), q_tile, dk_tile, PRECISION)
        q_ptr += q_step
        do_ptr += do_step
        row_lse_ptr += BLOCK_M
        row_delta_ptr += BLOCK_M
    dk_tile = scaled(dk_tile, scale)
    store_rows(matrix_ptr(dk, batch, head), columns, dk.row, num_tokens, dk_tile, HEAD_DIM, SPLIT)
    store_rows(matrix_ptr(dv, batch, head), columns, dv.row, num_tokens, dv_tile, HEAD_DIM, SPLIT)


def content_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    configs: tuple[Config, Config],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``out = softmax(scale q k^T) v``.

    Args:
        d_out, q, k, v, out: (B, H, N, D), float32, float16 or bfloat16, any strides but the last, which is 1.
        lse: (B, H, N) float32, contiguous, natural logarithm of the sums of exponentials.
        configs: launch configurations of the kernels of dQ and of dK and dV.

    Returns:
        dq, dk, dv (B, H, N, D), each a view of a contiguous (B, N, H, D) tensor.
    """
    batch, heads, tokens, head_dim = q.shape
    config_q, config_kv = configs
    shape = {"HEAD_DIM": head_dim, "SPLIT": split_head_dim(head_dim)}
    products = {**shape, "PRECISION": matmul_precision(q.dtype)}
    rows_do, rows_q, rows_k, rows_v = (rows_of(tensor) for tensor in (d_out, q, k, v))

    def gradient() -> Tensor:
        return torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)

    dq, dk, dv = gradient(), gradient(), gradient()
    row_blocks = triton.cdiv(tokens, config_q.block_m)
    num_rows = row_blocks * config_q.block_m
    row_lse, row_delta = torch.empty((2, batch, heads, num_rows), dtype=torch.float32, device=q.device)
    content_backward_rows_kernel[row_blocks * batch, heads](
        rows_do, rows_of(out), lse, row_lse, row_delta, heads, tokens, num_rows,
        **shape, BLOCK_M=config_q.block_m, num_warps=config_q.num_warps,
    )  # fmt: skip
    content_backward_q_kernel[row_blocks * batch, heads](
        rows_do, rows_q, rows_k, rows_v, row_lse, row_delta, rows_of(dq),
        scale, scale * LOG2E, heads, tokens, num_rows,
        **products, BLOCK_M=config_q.block_m, BLOCK_N=config_q.block_n, RAGGED=tokens % config_q.block_n != 0,
        num_warps=config_q.num_warps, num_stages=config_q.num_stages,
    )  # fmt: skip
    block_kv = min(config_kv.block_m, config_q.block_m)
    content_backward_kv_kernel[triton.cdiv(tokens, config_kv.block_n) * batch, heads](
        rows_do, rows_q, rows_k, rows_v, row_lse, row_delta, rows_of(dk), rows_of(dv),
        scale, scale * LOG2E, heads, tokens, num_rows,
        **products, BLOCK_M=block_kv, BLOCK_N=config_kv.block_n,
        num_warps=config_kv.num_warps, num_stages=config_kv.num_stages,
    )  # fmt: skip
    return dq, dk, dv
