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
    inner,
    load_pair,
    load_pair_at,
    matmul_precision,
    pair_ptrs,
    split_head_dim,
    store_pair,
    tail,
    zeros_pair,
)
from convit_kernels.triton.configs import Config

LOG2E_: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit
def content_forward_tile(
    q0, q1, m, total, c0, c1, k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, logit_scale, left,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of keys. RAGGED: it reaches past the last token, and no tile was before it."""
    columns = tl.arange(0, BLOCK_N)
    k0, k1 = load_pair_at(k0_ptrs, k1_ptrs, columns, left, HEAD_DIM, HEAD0, HEAD1, RAGGED)
    v0, v1 = load_pair_at(v0_ptrs, v1_ptrs, columns, left, HEAD_DIM, HEAD0, HEAD1, RAGGED)
    s = inner(q0, q1, k0, k1, HEAD1, PRECISION)
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
        c0 = c0 * correction[:, None]
        if HEAD1 > 0:
            c1 = c1 * correction[:, None]
    c0, c1 = accumulate(e.to(v0.dtype), v0, v1, c0, c1, HEAD1, PRECISION)
    return m, total, c0, c1


@triton.jit
def content_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr,
    stride_ob, stride_oh, stride_on, logit_scale, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T) v; grid and arguments as in `convit_kernels.triton.forward`."""
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = tl.program_id(0) // row_blocks
    head = tl.program_id(1)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    out_ptr += b64 * stride_ob + h64 * stride_oh
    q0, q1 = load_pair(q_ptr, rows, stride_qn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    c0, c1 = zeros_pair(BLOCK_M, HEAD0, HEAD1)
    whole = num_tokens // BLOCK_N * BLOCK_N
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        k0_ptrs, k1_ptrs = pair_ptrs(k_ptr, columns, stride_kn, HEAD0, HEAD1)
        v0_ptrs, v1_ptrs = pair_ptrs(v_ptr, columns, stride_vn, HEAD0, HEAD1)
        m, total, c0, c1 = content_forward_tile(
            q0, q1, m, total, c0, c1, k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, logit_scale, num_tokens - whole,
            HEAD_DIM, HEAD0, HEAD1, TAIL, PRECISION, True,
        )  # fmt: skip
    k0_ptrs, k1_ptrs = pair_ptrs(k_ptr, tl.arange(0, BLOCK_N), stride_kn, HEAD0, HEAD1)
    v0_ptrs, v1_ptrs = pair_ptrs(v_ptr, tl.arange(0, BLOCK_N), stride_vn, HEAD0, HEAD1)
    k_step = tl.cast(stride_kn, tl.int64) * BLOCK_N
    v_step = tl.cast(stride_vn, tl.int64) * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        m, total, c0, c1 = content_forward_tile(
            q0, q1, m, total, c0, c1, k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, logit_scale, num_tokens,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        k0_ptrs += k_step
        k1_ptrs += k_step
        v0_ptrs += v_step
        v1_ptrs += v_step
    share = (1.0 / total)[:, None]
    o0 = c0 * share
    if HEAD1 > 0:
        o1 = c1 * share
    else:
        o1 = o0
    store_pair(out_ptr, rows, stride_on, num_tokens, o0, o1, HEAD_DIM, HEAD0, HEAD1)
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
    head0, head1 = split_head_dim(head_dim)
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if need_lse else None
    content_forward_kernel[triton.cdiv(tokens, config.block_m) * batch, heads](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        scale * LOG2E, heads, tokens,
        HEAD_DIM=head_dim, HEAD0=head0, HEAD1=head1, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION=matmul_precision(q.dtype), TAIL=tail(tokens, config.block_n), STORE_LSE=need_lse,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@triton.jit
def content_backward_rows_kernel(
    do_ptr, out_ptr, lse_ptr, row_lse_ptr, row_delta_ptr,
    stride_dob, stride_doh, stride_don, stride_ob, stride_oh, stride_on, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = dO . O, and lse to base 2, +inf past the last token. Grid: (row blocks x images, heads)."""
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = tl.program_id(0) // row_blocks
    head = tl.program_id(1)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    bh64 = b64 * num_heads + h64
    do_ptr += b64 * stride_dob + h64 * stride_doh
    out_ptr += b64 * stride_ob + h64 * stride_oh
    do0, do1 = load_pair(do_ptr, rows, stride_don, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    o0, o1 = load_pair(out_ptr, rows, stride_on, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    if HEAD1 > 0:
        delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh64 * num_tokens + rows, mask=rows < num_tokens, other=float("inf")) * LOG2E_
    tl.store(row_lse_ptr + bh64 * num_rows + rows, lse)
    tl.store(row_delta_ptr + bh64 * num_rows + rows, delta)


@triton.jit
def content_query_tile(
    dq0, dq1, q0, q1, do0, do1, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, logit_scale, start, num_tokens,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys for a block of queries. k_ptr and v_ptr point at the tile. LAST: it reaches past the last
    token."""
    columns = tl.arange(0, BLOCK_N)
    left = num_tokens - start
    k0, k1 = load_pair(k_ptr, columns, stride_kn, left, HEAD_DIM, HEAD0, HEAD1, LAST)
    v0, v1 = load_pair(v_ptr, columns, stride_vn, left, HEAD_DIM, HEAD0, HEAD1, LAST)
    c = tl.exp2(inner(q0, q1, k0, k1, HEAD1, PRECISION) * logit_scale - lse[:, None])
    if LAST:
        c = tl.where(columns[None, :] < left, c, 0.0)
    ds = c * (inner(do0, do1, v0, v1, HEAD1, PRECISION) - delta[:, None])
    return accumulate(ds.to(k0.dtype), k0, k1, dq0, dq1, HEAD1, PRECISION)


@triton.jit
def content_backward_q_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, row_lse_ptr, row_delta_ptr, dq_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dqb, stride_dqh, stride_dqn, scale, logit_scale, num_heads, num_tokens,
    num_rows,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dQ. Grid: (row blocks x images, heads)."""
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = tl.program_id(0) // row_blocks
    head = tl.program_id(1)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    bh64 = b64 * num_heads + h64
    do_ptr += b64 * stride_dob + h64 * stride_doh
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    q0, q1 = load_pair(q_ptr, rows, stride_qn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    do0, do1 = load_pair(do_ptr, rows, stride_don, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    lse = tl.load(row_lse_ptr + bh64 * num_rows + rows)
    delta = tl.load(row_delta_ptr + bh64 * num_rows + rows)
    dq0, dq1 = zeros_pair(BLOCK_M, HEAD0, HEAD1)
    key_step = tl.cast(stride_kn, tl.int64) * BLOCK_N
    value_step = tl.cast(stride_vn, tl.int64) * BLOCK_N
    whole = num_tokens // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq0, dq1 = content_query_tile(
            dq0, dq1, q0, q1, do0, do1, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, logit_scale, start, num_tokens,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, False,
        )  # fmt: skip
        k_ptr += key_step
        v_ptr += value_step
    if RAGGED:
        dq0, dq1 = content_query_tile(
            dq0, dq1, q0, q1, do0, do1, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, logit_scale, whole, num_tokens,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    dq0 *= scale
    if HEAD1 > 0:
        dq1 *= scale
    dq_ptr += b64 * stride_dqb + h64 * stride_dqh
    store_pair(dq_ptr, rows, stride_dqn, num_tokens, dq0, dq1, HEAD_DIM, HEAD0, HEAD1)


@triton.jit
def content_backward_kv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, row_lse_ptr, row_delta_ptr, dk_ptr, dv_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, logit_scale, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid: (key blocks x images, heads)."""
    key_blocks = tl.cdiv(num_tokens, BLOCK_N)
    batch = tl.program_id(0) // key_blocks
    head = tl.program_id(1)
    columns = tl.program_id(0) % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    bh64 = b64 * num_heads + h64
    do_ptr += b64 * stride_dob + h64 * stride_doh
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    row_lse_ptr += bh64 * num_rows
    row_delta_ptr += bh64 * num_rows
    k0, k1 = load_pair(k_ptr, columns, stride_kn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    v0, v1 = load_pair(v_ptr, columns, stride_vn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    dk0, dk1 = zeros_pair(BLOCK_N, HEAD0, HEAD1)
    dv0, dv1 = zeros_pair(BLOCK_N, HEAD0, HEAD1)
    query_step = tl.cast(stride_qn, tl.int64) * BLOCK_M
    d_out_step = tl.cast(stride_don, tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    for start in range(0, num_tokens, BLOCK_M):
        left = num_tokens - start
        q0, q1 = load_pair(q_ptr, rows, stride_qn, left, HEAD_DIM, HEAD0, HEAD1, True)
        do0, do1 = load_pair(do_ptr, rows, stride_don, left, HEAD_DIM, HEAD0, HEAD1, True)
        c = tl.exp2(inner(k0, k1, q0, q1, HEAD1, PRECISION) * logit_scale - tl.load(row_lse_ptr + rows)[None, :])
        dv0, dv1 = accumulate(c.to(do0.dtype), do0, do1, dv0, dv1, HEAD1, PRECISION)
        ds = c * (inner(v0, v1, do0, do1, HEAD1, PRECISION) - tl.load(row_delta_ptr + rows)[None, :])
        dk0, dk1 = accumulate(ds.to(q0.dtype), q0, q1, dk0, dk1, HEAD1, PRECISION)
        q_ptr += query_step
        do_ptr += d_out_step
        row_lse_ptr += BLOCK_M
        row_delta_ptr += BLOCK_M
    dk0 *= scale
    if HEAD1 > 0:
        dk1 *= scale
    dk_ptr += b64 * stride_dkb + h64 * stride_dkh
    dv_ptr += b64 * stride_dvb + h64 * stride_dvh
    store_pair(dk_ptr, columns, stride_dkn, num_tokens, dk0, dk1, HEAD_DIM, HEAD0, HEAD1)
    store_pair(dv_ptr, columns, stride_dvn, num_tokens, dv0, dv1, HEAD_DIM, HEAD0, HEAD1)


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
    head0, head1 = split_head_dim(head_dim)
    config_q, config_kv = configs
    shape = {"HEAD_DIM": head_dim, "HEAD0": head0, "HEAD1": head1}
    products = {**shape, "PRECISION": matmul_precision(q.dtype)}

    def gradient() -> Tensor:
        return torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)

    dq, dk, dv = gradient(), gradient(), gradient()
    row_blocks = triton.cdiv(tokens, config_q.block_m)
    num_rows = row_blocks * config_q.block_m
    row_lse, row_delta = torch.empty((2, batch, heads, num_rows), dtype=torch.float32, device=q.device)
    content_backward_rows_kernel[row_blocks * batch, heads](
        d_out, out, lse, row_lse, row_delta, *d_out.stride()[:3], *out.stride()[:3], heads, tokens, num_rows,
        **shape, BLOCK_M=config_q.block_m, num_warps=config_q.num_warps,
    )  # fmt: skip
    content_backward_q_kernel[row_blocks * batch, heads](
        d_out, q, k, v, row_lse, row_delta, dq,
        *d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3],
        scale, scale * LOG2E, heads, tokens, num_rows,
        **products, BLOCK_M=config_q.block_m, BLOCK_N=config_q.block_n, RAGGED=tokens % config_q.block_n != 0,
        num_warps=config_q.num_warps, num_stages=config_q.num_stages,
    )  # fmt: skip
    block_kv = min(config_kv.block_m, config_q.block_m)
    content_backward_kv_kernel[triton.cdiv(tokens, config_kv.block_n) * batch, heads](
        d_out, q, k, v, row_lse, row_delta, dk, dv,
        *d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        scale, scale * LOG2E, heads, tokens, num_rows,
        **products, BLOCK_M=block_kv, BLOCK_N=config_kv.block_n,
        num_warps=config_kv.num_warps, num_stages=config_kv.num_stages,
    )  # fmt: skip
    return dq, dk, dv
