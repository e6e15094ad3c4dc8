"""Flash attention without position: the yardstick that the instruction counts of the fused kernels are divided by.

Same tile, same helpers, same treatment of the edges as `forward` and `backward`, and nothing of the position, the gates
or dropout. It is no backend and runs in no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
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
from .configs import Config


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
    """softmax(scale q k^T) v; grid and arguments as in `forward.forward_kernel`."""
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
    """``softmax(scale q k^T) v`` for a positive scale; shapes, dtypes and results as in `forward.forward`."""
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
