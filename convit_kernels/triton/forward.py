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
    Dropout,
    Position,
    accumulate,
    accumulate_both,
    block_ptrs,
    dense_ptrs,
    dropout_threshold,
    factored_position,
    factors_ptrs,
    gate_shares,
    heads_last,
    inner,
    keep_mask,
    load_at,
    load_rows,
    matmul_precision,
    matrix_offset,
    matrix_ptr,
    mixed,
    moved,
    negated,
    next_tokens,
    padded,
    program_block,
    rows_of,
    saturation,
    scaled,
    split_head_dim,
    store_rows,
    tail,
    zeros,
)
from .configs import Config, lookup
from .launch import blocks, launch


@triton.jit
def forward_tile(
    q, m, total, c, p, k_ptrs, v_ptrs, position, factors, queries, keys, draw, logit_scale, rows, start, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CONTENT: tl.constexpr,
    POSITION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, at the given pointers. RAGGED: it reaches past the last token, and no tile was before it.

    ``keys`` are pointers into the dense table, or the keys' places on the grid.
    """
    columns = tl.arange(0, BLOCK_N)
    left = num_tokens - start
    v = load_at(v_ptrs, columns, left, HEAD_DIM, RAGGED)
    if DROPOUT:
        keep = keep_mask(draw, rows, start, BLOCK_N)
    if CONTENT:
        s = inner(q, load_at(k_ptrs, columns, left, HEAD_DIM, RAGGED), PRECISION)
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
            c = scaled(c, correction[:, None])
        if DROPOUT:
            e = tl.where(keep, e, 0.0)
        e = e.to(v[0].dtype)
    if POSITION:
        if not DENSE:
            tile = factored_position(factors, position, queries, keys, columns, left, RAGGED).to(v[0].dtype)
        elif RAGGED:
            tile = tl.load(keys, mask=columns[None, :] < position.columns - start, other=0.0)
        else:
            tile = tl.load(keys)
        if DROPOUT:
            tile = tl.where(keep, tile, 0.0)
    # Both products with one block of V stand together: on Hopper they share its descriptor.
    if CONTENT and POSITION:
        c, p = accumulate_both(e, tile, v, c, p, PRECISION)
    elif CONTENT:
        c = accumulate(e, v, c, PRECISION)
    else:
        p = accumulate(tile, v, p, PRECISION)
    return m, total, c, p


@triton.jit
def forward_keys(
    q, k_ptr, k_stride, v_ptr, v_stride, position, head, draw, logit_scale, rows, num_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Walk over the keys. What whole tiles leave over is a tile of its own: only it needs masks, and it may be smaller.

    Returns the running maximum (base 2), the sum, and the accumulators of content (to be divided by the sum) and
    position.
    """
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    c = zeros(BLOCK_M, SPLIT)
    p = zeros(BLOCK_M, SPLIT)
    # Rows past the end repeat the last one: they are never stored, and their loads need no mask.
    inside = tl.minimum(rows, num_tokens - 1)
    queries = (inside // position.width, inside % position.width)
    if DENSE:
        table = position.table + head.to(tl.int64) * num_tokens * position.columns
        factors = None
    else:
        factors = factors_ptrs(position, head)
    whole = num_tokens // BLOCK_N * BLOCK_N
    # The ragged tile comes first: behind the loop it would keep Hopper from running the loop's matrix products
    # asynchronously.
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        if DENSE:
            keys = dense_ptrs(table, inside, columns, position.columns)
        else:
            keys = (columns // position.width, columns % position.width)
        m, total, c, p = forward_tile(
            q, m, total, c, p,
            block_ptrs(k_ptr, columns, k_stride, SPLIT), block_ptrs(v_ptr, columns, v_stride, SPLIT),
            position, factors, queries, keys, draw, logit_scale, rows, whole, num_tokens,
            HEAD_DIM, TAIL, PRECISION, CONTENT, POSITION, DENSE, DROPOUT, True,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    k_ptrs = block_ptrs(k_ptr, columns, k_stride, SPLIT)
    v_ptrs = block_ptrs(v_ptr, columns, v_stride, SPLIT)
    k_step = tl.cast(k_stride, tl.int64) * BLOCK_N
    v_step = tl.cast(v_stride, tl.int64) * BLOCK_N
    if DENSE:
        keys = dense_ptrs(table, inside, columns, position.columns)
    else:
        keys = (columns // position.width, columns % position.width)
    for start in range(0, whole, BLOCK_N):
        m, total, c, p = forward_tile(
            q, m, total, c, p, k_ptrs, v_ptrs,
            position, factors, queries, keys, draw, logit_scale, rows, start, num_tokens,
            HEAD_DIM, BLOCK_N, PRECISION, CONTENT, POSITION, DENSE, DROPOUT, False,
        )  # fmt: skip
        k_ptrs = moved(k_ptrs, k_step)
        v_ptrs = moved(v_ptrs, v_step)
        if DENSE:
            keys += BLOCK_N
        else:
            keys = next_tokens(keys, BLOCK_N, position.width)
    return m, total, c, p


@triton.jit
def forward_kernel(
    q, k, v, out, content_ptr, lse_ptr, gate_ptr, position, dropout, logit_scale, num_heads, num_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SATURATION: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, NEED_GRAD: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks x images, heads), the row blocks of an image next to each other, because they read the same K
    and V.

    ``logit_scale`` is |scale| * log2(e). TAIL: size of the ragged tile, 0 if num_tokens is a multiple of BLOCK_N.
    """
    batch, head, first_row = program_block(num_tokens, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    k_ptr = matrix_ptr(k, batch, head)
    v_ptr = matrix_ptr(v, batch, head)
    draw = (dropout.philox, batch * num_heads + head, dropout_threshold(dropout.p))
    q_tile = load_rows(matrix_ptr(q, batch, head), rows, q.row, num_tokens, HEAD_DIM, SPLIT, True)
    if NEGATIVE_SCALE:
        q_tile = negated(q_tile)

    content_share, position_share = gate_shares(gate_ptr, head)
    if position_share < SATURATION:
        m, total, c, p = forward_keys(
            q_tile, k_ptr, k.row, v_ptr, v.row, position, head, draw, logit_scale, rows, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, True, False, DENSE, DROPOUT, TAIL,
        )  # fmt: skip
    elif content_share < SATURATION:
        m, total, c, p = forward_keys(
            q_tile, k_ptr, k.row, v_ptr, v.row, position, head, draw, logit_scale, rows, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, False, True, DENSE, DROPOUT, TAIL,
        )  # fmt: skip
        m = m + float("inf")  # lse = inf: a backward pass finds every content probability to be 0
        total = total + 1.0
    else:
        m, total, c, p = forward_keys(
            q_tile, k_ptr, k.row, v_ptr, v.row, position, head, draw, logit_scale, rows, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, True, True, DENSE, DROPOUT, TAIL,
        )  # fmt: skip

    if DROPOUT:
        inverse_keep = 1.0 / (1.0 - dropout.p)
    else:
        inverse_keep = 1.0
    normalize = (inverse_keep / total)[:, None]
    out_tile = mixed(c, content_share * normalize, p, position_share * inverse_keep)
    offset = matrix_offset(out, batch, head)
    store_rows(out.ptr + offset, rows, out.row, num_tokens, out_tile, HEAD_DIM, SPLIT)
    if NEED_GRAD:
        c = scaled(c, normalize)
        store_rows(content_ptr + offset, rows, out.row, num_tokens, c, HEAD_DIM, SPLIT)
        lse_ptrs = lse_ptr + (batch * num_heads + head).to(tl.int64) * num_tokens + rows
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
    if config is None:
        config = lookup(
            "forward",
            dtype=q.dtype,
            head_dim=head_dim,
            regime="dense" if dense else "factored",
            num_tokens=tokens,
            batch_heads=batch * heads,
            device=q.device,
        )

    out = heads_last(q)
    content = heads_last(q) if need_grad else None
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device) if need_grad else None
    launch(
        forward_kernel, (blocks(tokens, config.block_m) * batch, heads),
        rows_of(q), rows_of(k, constant=True), rows_of(v, constant=True), rows_of(out), content, lse, gate,
        Position(table, padded(tokens), row_table, col_table, height, width), Dropout(philox, dropout_p),
        abs(scale) * LOG2E, heads, tokens,
        HEAD_DIM=head_dim, SPLIT=split_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION=matmul_precision(q.dtype), SATURATION=saturation(q.dtype), DENSE=dense, DROPOUT=dropout_p > 0.0,
        TAIL=tail(tokens, config.block_n), NEGATIVE_SCALE=scale < 0.0, NEED_GRAD=need_grad,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse, content
