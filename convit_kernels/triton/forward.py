"""The fused forward pass of GPSA attention: the gated mix of the content and the positional softmax in one pass over K
and V.

A program owns BLOCK_M query rows of one head of one image and walks the keys in tiles of BLOCK_N. The content softmax
is the usual online one. Position is a map with rows that sum to 1, no softmax is left to do, so its tile goes straight
to a second product with the V tile that is already there. Two accumulators are needed, since the content's normaliser
is known only at the end; the gate mixes them there, once a row instead of once an entry.
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
    dense_ptrs,
    dropout_threshold,
    factored_position,
    gate_shares,
    heads_last,
    inner,
    keep_mask,
    load_pair,
    load_pair_at,
    matmul_precision,
    next_tile,
    padded,
    pair_ptrs,
    saturation,
    split_head_dim,
    store_pair,
    tail,
    zeros_pair,
)
from .configs import Config, lookup
from .launch import blocks, launch


@triton.jit
def forward_tile(
    q0, q1, m, total, c0, c1, p0, p1, k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, table_ptrs, row_table_ptr, col_table_ptr,
    philox_ptr, batch_head, threshold, logit_scale,
    rows, row_y, row_x, col_y, col_x, start, num_tokens, table_columns, height, width,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, at the given pointers. RAGGED: it reaches past the last token, and no tile was before it."""
    columns = tl.arange(0, BLOCK_N)
    left = num_tokens - start
    v0, v1 = load_pair_at(v0_ptrs, v1_ptrs, columns, left, HEAD_DIM, HEAD0, HEAD1, RAGGED)
    if DROPOUT:
        keep = keep_mask(philox_ptr, batch_head, rows, start, threshold, BLOCK_N)
    if CONTENT:
        k0, k1 = load_pair_at(k0_ptrs, k1_ptrs, columns, left, HEAD_DIM, HEAD0, HEAD1, RAGGED)
        s = inner(q0, q1, k0, k1, HEAD1, PRECISION)
        if RAGGED:
            s = tl.where(columns[None, :] < left, s * logit_scale, float("-inf"))
            m = tl.maximum(tl.max(s, 1), LOWEST)
            e = tl.exp2(s - m[:, None])
            total = tl.sum(e, 1)
        else:
            new_m = tl.maximum(m, tl.max(s, 1) * logit_scale)
            e = tl.exp2(s * logit_scale - new_m[:, None])  # one fused multiply-add an entry
            correction = tl.exp2(m - new_m)
            total = total * correction + tl.sum(e, 1)
            m = new_m
            c0 = c0 * correction[:, None]
            if HEAD1 > 0:
                c1 = c1 * correction[:, None]
        if DROPOUT:
            e = tl.where(keep, e, 0.0)
        e = e.to(v0.dtype)
    if POSITION:
        if not DENSE:
            p = factored_position(
                row_table_ptr, col_table_ptr, row_y, row_x, col_y, col_x, columns, left, height, width, RAGGED
            ).to(v0.dtype)
        elif RAGGED:
            p = tl.load(table_ptrs, mask=columns[None, :] < table_columns - start, other=0.0)
        else:
            p = tl.load(table_ptrs)
        if DROPOUT:
            p = tl.where(keep, p, 0.0)
    # Both products with one block of V stand together: on Hopper they share its descriptor.
    if CONTENT:
        c0 = tl.dot(e, v0, c0, input_precision=PRECISION)
    if POSITION:
        p0 = tl.dot(p, v0, p0, input_precision=PRECISION)
    if HEAD1 > 0:
        if CONTENT:
            c1 = tl.dot(e, v1, c1, input_precision=PRECISION)
        if POSITION:
            p1 = tl.dot(p, v1, p1, input_precision=PRECISION)
    return m, total, c0, c1, p0, p1


@triton.jit
def forward_keys(
    q0, q1, k_ptr, v_ptr, stride_kn, stride_vn, table_ptr, stride_table, row_table_ptr, col_table_ptr,
    philox_ptr, batch_head, threshold, logit_scale, rows, num_tokens, height, width,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Walk over the keys. What whole tiles leave over is a tile of its own: only it needs masks, and it may be smaller.

    Returns the running maximum (base 2), the sum, and the accumulators of content (to be divided by the sum) and
    position.
    """
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    c0, c1 = zeros_pair(BLOCK_M, HEAD0, HEAD1)
    p0, p1 = zeros_pair(BLOCK_M, HEAD0, HEAD1)
    # Rows past the end repeat the last one: they are never stored, and their loads need no mask.
    table_rows = tl.minimum(rows, num_tokens - 1)
    row_y = table_rows // width
    row_x = table_rows % width
    whole = num_tokens // BLOCK_N * BLOCK_N
    # The ragged tile comes first: behind the loop it would keep Hopper from running the loop's matrix products
    # asynchronously.
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        k0_ptrs, k1_ptrs = pair_ptrs(k_ptr, columns, stride_kn, HEAD0, HEAD1)
        v0_ptrs, v1_ptrs = pair_ptrs(v_ptr, columns, stride_vn, HEAD0, HEAD1)
        if DENSE:
            table_ptrs = dense_ptrs(table_ptr, table_rows, columns, stride_table)
        else:
            table_ptrs = table_ptr
        m, total, c0, c1, p0, p1 = forward_tile(
            q0, q1, m, total, c0, c1, p0, p1,
            k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, table_ptrs, row_table_ptr, col_table_ptr,
            philox_ptr, batch_head, threshold, logit_scale,
            rows, row_y, row_x, columns // width, columns % width, whole, num_tokens, stride_table, height, width,
            HEAD_DIM, HEAD0, HEAD1, TAIL, PRECISION, CONTENT, POSITION, DENSE, DROPOUT, True,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    k0_ptrs, k1_ptrs = pair_ptrs(k_ptr, columns, stride_kn, HEAD0, HEAD1)
    v0_ptrs, v1_ptrs = pair_ptrs(v_ptr, columns, stride_vn, HEAD0, HEAD1)
    k_step = tl.cast(stride_kn, tl.int64) * BLOCK_N
    v_step = tl.cast(stride_vn, tl.int64) * BLOCK_N
    if DENSE:
        table_ptrs = dense_ptrs(table_ptr, table_rows, columns, stride_table)
    else:
        table_ptrs = table_ptr
    col_y = columns // width
    col_x = columns % width
    for start in range(0, whole, BLOCK_N):
        m, total, c0, c1, p0, p1 = forward_tile(
            q0, q1, m, total, c0, c1, p0, p1,
            k0_ptrs, k1_ptrs, v0_ptrs, v1_ptrs, table_ptrs, row_table_ptr, col_table_ptr,
            philox_ptr, batch_head, threshold, logit_scale,
            rows, row_y, row_x, col_y, col_x, start, num_tokens, stride_table, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, CONTENT, POSITION, DENSE, DROPOUT, False,
        )  # fmt: skip
        k0_ptrs += k_step
        k1_ptrs += k_step
        v0_ptrs += v_step
        v1_ptrs += v_step
        if DENSE:
            table_ptrs += BLOCK_N
        else:
            col_y, col_x = next_tile(col_y, col_x, BLOCK_N, width)
    return m, total, c0, c1, p0, p1


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, content_ptr, lse_ptr, gate_ptr, table_ptr, row_table_ptr, col_table_ptr, philox_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr,
    stride_ob, stride_oh, stride_on, stride_table,
    logit_scale, dropout_p, num_heads, num_tokens, height, width,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SATURATION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr,
    TAIL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, NEED_GRAD: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks x images, heads), the row blocks of an image next to each other, because they read the same K
    and V.

    ``logit_scale`` is |scale| * log2(e). TAIL: size of the ragged tile, 0 if num_tokens is a multiple of BLOCK_N. The
    row strides of K and V belong to a model, not to an input: as constants they make the rows of a tile fixed distances
    from one pointer.
    """
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = tl.program_id(0) // row_blocks
    head = tl.program_id(1)
    batch_head = batch * num_heads + head
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    out_ptr += b64 * stride_ob + h64 * stride_oh
    if DENSE:
        table_ptr += h64 * num_tokens * stride_table
    else:
        row_table_ptr += h64 * height * height
        col_table_ptr += h64 * width * width
    threshold = dropout_threshold(dropout_p)

    q0, q1 = load_pair(q_ptr, rows, stride_qn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    if NEGATIVE_SCALE:
        q0 = (-q0.to(tl.float32)).to(q0.dtype)
        q1 = (-q1.to(tl.float32)).to(q1.dtype)

    content, position = gate_shares(gate_ptr, head)
    if position < SATURATION:
        m, total, c0, c1, p0, p1 = forward_keys(
            q0, q1, k_ptr, v_ptr, stride_kn, stride_vn, table_ptr, stride_table, row_table_ptr, col_table_ptr,
            philox_ptr, batch_head, threshold, logit_scale, rows, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, True, False, DENSE, DROPOUT, TAIL,
        )  # fmt: skip
    elif content < SATURATION:
        m, total, c0, c1, p0, p1 = forward_keys(
            q0, q1, k_ptr, v_ptr, stride_kn, stride_vn, table_ptr, stride_table, row_table_ptr, col_table_ptr,
            philox_ptr, batch_head, threshold, logit_scale, rows, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, False, True, DENSE, DROPOUT, TAIL,
        )  # fmt: skip
        m = m + float("inf")  # lse = inf: a backward pass finds every content probability to be 0
        total = total + 1.0
    else:
        m, total, c0, c1, p0, p1 = forward_keys(
            q0, q1, k_ptr, v_ptr, stride_kn, stride_vn, table_ptr, stride_table, row_table_ptr, col_table_ptr,
            philox_ptr, batch_head, threshold, logit_scale, rows, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, True, True, DENSE, DROPOUT, TAIL,
        )  # fmt: skip

    if DROPOUT:
        inverse_keep = 1.0 / (1.0 - dropout_p)
    else:
        inverse_keep = 1.0
    normalize = (inverse_keep / total)[:, None]
    content_row = content * normalize
    position = position * inverse_keep
    o0 = c0 * content_row + p0 * position
    if HEAD1 > 0:
        o1 = c1 * content_row + p1 * position
    else:
        o1 = o0
    store_pair(out_ptr, rows, stride_on, num_tokens, o0, o1, HEAD_DIM, HEAD0, HEAD1)
    if NEED_GRAD:
        c0 *= normalize
        if HEAD1 > 0:
            c1 *= normalize
        content_ptr += b64 * stride_ob + h64 * stride_oh
        store_pair(content_ptr, rows, stride_on, num_tokens, c0, c1, HEAD_DIM, HEAD0, HEAD1)
        lse_ptrs = lse_ptr + batch_head.to(tl.int64) * num_tokens + rows
        tl.store(lse_ptrs, (m + tl.log2(total)) * LN2, mask=rows < num_tokens)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    table: Tensor | None = None,
    row_table: Tensor | None = None,
    col_table: Tensor | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    need_grad: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gated mix of content and position, ``((1 - g) softmax(scale q k^T) + g P) v`` with g = sigmoid(gate).

    Args:
        q, k, v: (B, H, N, D), float32, float16 or bfloat16, any strides but the last, which is 1; B >= 1, D <= 256, N
            <= 65536.
        gate: (H,) raw gating parameter, contiguous, float32.
        grid_size: (Hg, Wg) with Hg * Wg = N.
        scale: of the content logits.
        table: (H, N, padded(N)) P in the dtype of q, contiguous, zero in the padding. Either it or both factors are
            given.
        row_table, col_table: (H, Hg, Hg) and (H, Wg, Wg) factors of P, contiguous, float32.
        dropout_p: in [0, 1); dropout acts on the mixed map.
        philox: (2,) int64 on the device, seed and offset of the dropout; the same pair gives the same mask.
        need_grad: whether the results that only `backward` reads are wanted.
        config: launch configuration; None takes that of the table for this device.

    Returns:
        out (B, H, N, D), a view of a contiguous (B, N, H, D) tensor, and two that are None without need_grad: the
        logarithm of the content's sum of exponentials, (B, H, N) in float32, and the content's own result
        ``softmax(scale q k^T) v`` under the dropout mask, laid out as out. For a head whose gate is so large that
        content is skipped they are +inf and 0.

    Raises:
        ValueError: where the arguments do not fit each other.
    """
    batch, heads, tokens, head_dim = q.shape
    height, width = grid_size
    dense = table is not None
    if height * width != tokens:
        raise ValueError(f"a {height} x {width} grid has {height * width} tokens, q has {tokens}")
    if dense == (row_table is not None and col_table is not None):
        raise ValueError("pass either table or both row_table and col_table")
    if dense and tokens * padded(tokens) >= 2**31:
        raise ValueError(f"a dense table of {tokens} tokens is too large: pass row_table and col_table")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    if dropout_p > 0.0 and philox is None:
        raise ValueError("dropout needs philox, a tensor with seed and offset")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("the last stride of q, k and v must be 1")
    head0, head1 = split_head_dim(head_dim)
    if config is None:
        config = lookup(
            "forward",
            dtype=q.dtype,
            head_dim=head_dim,
            regime="dense" if dense else "factored",
            num_tokens=tokens,
            device=q.device,
        )

    out = heads_last(q)
    content = heads_last(q) if need_grad else None
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if need_grad else None
    launch(
        forward_kernel, (blocks(tokens, config.block_m) * batch, heads),
        q, k, v, out, content, lse, gate, table, row_table, col_table, philox,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], padded(tokens),
        abs(scale) * LOG2E, dropout_p, heads, tokens, height, width,
        HEAD_DIM=head_dim, HEAD0=head0, HEAD1=head1, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION=matmul_precision(q.dtype), SATURATION=saturation(q.dtype), DENSE=dense, DROPOUT=dropout_p > 0.0,
        TAIL=tail(tokens, config.block_n), NEGATIVE_SCALE=scale < 0.0, NEED_GRAD=need_grad,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse, content
