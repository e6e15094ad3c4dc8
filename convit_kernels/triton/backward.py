"""The fused backward pass of GPSA attention: probabilities are recomputed from the saved lse, no (N, N) tensor of an
image is stored.

With ``A = (1 - g) C + g P``, ``dA = dO V^T`` (under the dropout mask where there is one) and, of each row i,
``dc_i = sum_j C_ij dA_ij`` and ``dp_i = sum_j P_ij dA_ij``:

    dV = A^T dO        dS = (1 - g) C o (dA - dc)        dQ = scale dS K        dK = scale dS^T Q
    d gate = g (1 - g) sum (dp - dc)        d w_k = g sum_ij P_ij (rel_ij,k - E_i,k) sum_b dA_ij
    with E_i = sum_j P_ij rel_ij

Four kernels, none with atomics, so the same bits in every run:

``backward_q_kernel``, a program for each block of queries, computes dQ. dc_i = dO_i . (C V)_i, as in flash attention; O
also holds the position's part, therefore the forward pass keeps C V as well. In half precision C V is rounded, and the
error of dc would show in d gate, a sum over all rows. That error is ``sum_j C_ij (dA_ij - dc_i)``, which is 0 for the
exact dc: the kernel adds it to dc for the kernels that follow.

``backward_kv_kernel``, a program for each block of keys, computes dK and dV. In half precision P^T dO is a matrix
product of its own on the table's tile as it was loaded: that takes fewer instructions than to convert the tile to
float32 and mix it into C entry by entry. In float32 nothing has to be converted and a product takes more instructions,
so there the tile is mixed into C.

``backward_position_kernel``, a program for each block of queries and group of images, sums dA over its images, which
for a head is one long matrix product, and reduces P o dA to the few numbers that the gate and the positional weights
need, once for all its images.

``backward_reduce_kernel`` adds up the numbers of those programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    LOWEST,
    accumulate,
    dropout_threshold,
    factored_position,
    gate_shares,
    heads_last,
    inner,
    keep_mask,
    load_pair,
    matmul_precision,
    padded,
    saturation,
    split_head_dim,
    store_pair,
    zeros_pair,
)
from .configs import Config, Regime, lookup
from .launch import blocks, launch

LOG2E_: tl.constexpr = tl.constexpr(LOG2E)

# Programs of the position kernel: enough to fill a large GPU, few enough that each sums many images before it reduces.
POSITION_PROGRAMS = 128


@triton.jit
def query_tile(
    dq0, dq1, sum_tile, q0, q1, do0, do1, lse, dc,
    k_ptr, v_ptr, stride_kn, stride_vn, philox_ptr, batch_head, threshold, inverse_keep, logit_scale, rows, start,
    num_tokens,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr,
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
    da = inner(do0, do1, v0, v1, HEAD1, PRECISION)
    if DROPOUT:
        keep = keep_mask(philox_ptr, batch_head, rows, start, threshold, BLOCK_N)
        da = tl.where(keep, da * inverse_keep, 0.0)
    ds = c * (da - dc[:, None])
    if EXACT:
        sum_tile += c
    else:
        sum_tile += ds
    dq0, dq1 = accumulate(ds.to(k0.dtype), k0, k1, dq0, dq1, HEAD1, PRECISION)
    return dq0, dq1, sum_tile


@triton.jit
def backward_q_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, content_ptr, lse_ptr, gate_ptr, philox_ptr, dq_ptr, row_lse_ptr, row_dc_ptr,
    row_factor_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_cb, stride_ch, stride_cn, stride_dqb, stride_dqh, stride_dqn,
    scale, logit_scale, dropout_p, batch_size, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SATURATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dQ and the few numbers of each row that the kernel of dK and dV reads. Grid: (row blocks x images, heads).

    Those rows are (H, B, num_rows), num_rows a multiple of BLOCK_M: row_lse = log2 of what divides ``exp2(logit)`` to
    give ``(1 - g) C``, +inf past the last token, so that a padded row has no probability anywhere; row_dc = dc. EXACT
    (float32): the logarithm's rounding would show, and ``(1 - g) C = exp2(logit - row_lse) * row_factor``. RAGGED: the
    last tile of keys reaches past the last token. It stands behind the loop, which so needs no masks, but not in
    float32: there operands go through registers, and for a second copy of the tile the compiler would hold those of q
    and dO in registers throughout.
    """
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = tl.program_id(0) // row_blocks
    head = tl.program_id(1)
    batch_head = batch * num_heads + head
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    bh64 = batch_head.to(tl.int64)
    do_ptr += b64 * stride_dob + h64 * stride_doh
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    content_ptr += b64 * stride_cb + h64 * stride_ch
    threshold = dropout_threshold(dropout_p)
    inverse_keep = 1.0 / (1.0 - dropout_p)
    content, _position = gate_shares(gate_ptr, head)

    q0, q1 = load_pair(q_ptr, rows, stride_qn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    do0, do1 = load_pair(do_ptr, rows, stride_don, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    cv0, cv1 = load_pair(content_ptr, rows, stride_cn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    dc = tl.sum(do0.to(tl.float32) * cv0.to(tl.float32), 1)
    if HEAD1 > 0:
        dc += tl.sum(do1.to(tl.float32) * cv1.to(tl.float32), 1)
    lse = tl.load(lse_ptr + bh64 * num_tokens + rows, mask=rows < num_tokens, other=float("inf")) * LOG2E_

    dq0, dq1 = zeros_pair(BLOCK_M, HEAD0, HEAD1)
    # Sums over the tiles, entry by entry: what lies in different threads is added once, at the end.
    sum_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXACT:
        whole = num_tokens
    else:
        whole = num_tokens // BLOCK_N * BLOCK_N
    key_step = tl.cast(stride_kn, tl.int64) * BLOCK_N
    value_step = tl.cast(stride_vn, tl.int64) * BLOCK_N
    # Where content is too small a share to matter, dQ is 0, and so is whatever the ragged tile adds: its lse is +inf.
    for start in range(0, tl.where(content < SATURATION, 0, whole), BLOCK_N):
        dq0, dq1, sum_tile = query_tile(
            dq0, dq1, sum_tile, q0, q1, do0, do1, lse, dc,
            k_ptr, v_ptr, stride_kn, stride_vn, philox_ptr, batch_head, threshold, inverse_keep, logit_scale,
            rows, start, num_tokens, HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, EXACT, DROPOUT, RAGGED and EXACT,
        )  # fmt: skip
        k_ptr += key_step
        v_ptr += value_step
    if RAGGED and not EXACT:
        dq0, dq1, sum_tile = query_tile(
            dq0, dq1, sum_tile, q0, q1, do0, do1, lse, dc,
            k_ptr, v_ptr, stride_kn, stride_vn, philox_ptr, batch_head, threshold, inverse_keep, logit_scale,
            rows, whole, num_tokens, HEAD_DIM, HEAD0, HEAD1, BLOCK_N, PRECISION, EXACT, DROPOUT, True,
        )  # fmt: skip

    factor = content + tl.zeros([BLOCK_M], tl.float32)
    row_sum = tl.sum(sum_tile, 1)
    if EXACT:
        # A float32 lse of large logits is off by more than rounding of a probability; rows that sum to 1 again make up
        # for it. Where content has been skipped, and past the last token, the sum is 0.
        factor = factor / tl.where(row_sum > 0.0, row_sum, 1.0)
    else:
        dc += row_sum
    row_scale = (scale * factor)[:, None]
    dq0 *= row_scale
    if HEAD1 > 0:
        dq1 *= row_scale
    dq_ptr += b64 * stride_dqb + h64 * stride_dqh
    store_pair(dq_ptr, rows, stride_dqn, num_tokens, dq0, dq1, HEAD_DIM, HEAD0, HEAD1)
    row = (h64 * batch_size + b64) * num_rows + rows
    if EXACT:
        tl.store(row_lse_ptr + row, lse)
        tl.store(row_factor_ptr + row, factor)
    else:
        tl.store(row_lse_ptr + row, lse - tl.log2(content))
    tl.store(row_dc_ptr + row, dc)


@triton.jit
def key_queries(
    k0, k1, v0, v1, q_ptr, do_ptr, stride_qn, stride_don, row_lse_ptr, row_dc_ptr, row_factor_ptr,
    table_ptr, stride_table, row_table_ptr, col_table_ptr, philox_ptr, batch_head, threshold, inverse_keep, logit_scale,
    position, first_column, num_tokens, height, width,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr, DENSE: tl.constexpr,
    EXACT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Walk over the queries for a block of keys. Tiles are (keys, queries), so that none has to change its layout
    between two products."""
    columns = first_column + tl.arange(0, BLOCK_N)
    dk0, dk1 = zeros_pair(BLOCK_N, HEAD0, HEAD1)
    dv0, dv1 = zeros_pair(BLOCK_N, HEAD0, HEAD1)
    pv0, pv1 = zeros_pair(BLOCK_N, HEAD0, HEAD1)
    col_y = columns // width
    col_x = columns % width
    # Rows count from the tile's first, and the pointers move: so the offsets are the same in every tile, and computed
    # once.
    rows = tl.arange(0, BLOCK_M)
    query_step = tl.cast(stride_qn, tl.int64) * BLOCK_M
    d_out_step = tl.cast(stride_don, tl.int64) * BLOCK_M
    for start in range(0, num_tokens, BLOCK_M):
        left = num_tokens - start
        do0, do1 = load_pair(do_ptr, rows, stride_don, left, HEAD_DIM, HEAD0, HEAD1, True)
        if DROPOUT:
            keep = tl.trans(keep_mask(philox_ptr, batch_head, start + rows, first_column, threshold, BLOCK_N))
        if POSITION:
            if DENSE:
                mask = (rows[:, None] < left) & (columns[None, :] < stride_table)
                p = tl.load(table_ptr + rows[:, None] * stride_table + columns[None, :], mask=mask, other=0.0)
            else:
                token = start + tl.minimum(rows, left - 1)  # past the end P may be anything finite, because dO is 0
                p = factored_position(
                    row_table_ptr,
                    col_table_ptr,
                    token // width,
                    token % width,
                    col_y,
                    col_x,
                    columns,
                    num_tokens,
                    height,
                    width,
                    True,
                ).to(do0.dtype)
            p = tl.trans(p)
        if CONTENT:
            q0, q1 = load_pair(q_ptr, rows, stride_qn, left, HEAD_DIM, HEAD0, HEAD1, True)
            c = tl.exp2(inner(k0, k1, q0, q1, HEAD1, PRECISION) * logit_scale - tl.load(row_lse_ptr + rows)[None, :])
            if EXACT:
                c *= tl.load(row_factor_ptr + rows)[None, :]
            a = c
            if POSITION and EXACT:
                a += position * p.to(tl.float32)
            if DROPOUT:
                a = tl.where(keep, a, 0.0)
            dv0, dv1 = accumulate(a.to(do0.dtype), do0, do1, dv0, dv1, HEAD1, PRECISION)
        if POSITION and not (CONTENT and EXACT):
            if DROPOUT:
                p = tl.where(keep, p, 0.0)
            pv0, pv1 = accumulate(p, do0, do1, pv0, pv1, HEAD1, PRECISION)
        if CONTENT:
            da = inner(v0, v1, do0, do1, HEAD1, PRECISION)
            if DROPOUT:
                da = tl.where(keep, da * inverse_keep, 0.0)
            ds = c * (da - tl.load(row_dc_ptr + rows)[None, :])
            dk0, dk1 = accumulate(ds.to(q0.dtype), q0, q1, dk0, dk1, HEAD1, PRECISION)
        q_ptr += query_step
        do_ptr += d_out_step
        row_lse_ptr += BLOCK_M
        row_dc_ptr += BLOCK_M
        if EXACT:
            row_factor_ptr += BLOCK_M
        if DENSE:
            table_ptr += BLOCK_M * stride_table
    if POSITION and not (CONTENT and EXACT):
        dv0 += position * pv0
        if HEAD1 > 0:
            dv1 += position * pv1
    return dk0, dk1, dv0, dv1


@triton.jit
def backward_kv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, row_lse_ptr, row_dc_ptr, row_factor_ptr, gate_ptr, table_ptr, row_table_ptr,
    col_table_ptr,
    philox_ptr, dk_ptr, dv_ptr,
    stride_dob, stride_doh, stride_don, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_table,
    scale, logit_scale, dropout_p, batch_size, num_heads, num_tokens, num_rows, height, width,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SATURATION: tl.constexpr, DENSE: tl.constexpr, EXACT: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid: (key blocks x images, heads). The rows are those of `backward_q_kernel`, num_rows a multiple of
    BLOCK_M."""
    key_blocks = tl.cdiv(num_tokens, BLOCK_N)
    batch = tl.program_id(0) // key_blocks
    head = tl.program_id(1)
    batch_head = batch * num_heads + head
    first_column = tl.program_id(0) % key_blocks * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    do_ptr += b64 * stride_dob + h64 * stride_doh
    q_ptr += b64 * stride_qb + h64 * stride_qh
    k_ptr += b64 * stride_kb + h64 * stride_kh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    first_row = (h64 * batch_size + b64) * num_rows
    row_lse_ptr += first_row
    row_dc_ptr += first_row
    if EXACT:
        row_factor_ptr += first_row
    if DENSE:
        table_ptr += h64 * num_tokens * stride_table
    else:
        row_table_ptr += h64 * height * height
        col_table_ptr += h64 * width * width
    threshold = dropout_threshold(dropout_p)
    inverse_keep = 1.0 / (1.0 - dropout_p)
    content, position = gate_shares(gate_ptr, head)

    k0, k1 = load_pair(k_ptr, columns, stride_kn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    v0, v1 = load_pair(v_ptr, columns, stride_vn, num_tokens, HEAD_DIM, HEAD0, HEAD1, True)
    if position < SATURATION:
        dk0, dk1, dv0, dv1 = key_queries(
            k0, k1, v0, v1, q_ptr, do_ptr, stride_qn, stride_don, row_lse_ptr, row_dc_ptr, row_factor_ptr,
            table_ptr, stride_table, row_table_ptr, col_table_ptr, philox_ptr, batch_head, threshold, inverse_keep,
            logit_scale,
            position, first_column, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, True, False, DENSE, EXACT, DROPOUT,
        )  # fmt: skip
    elif content < SATURATION:
        dk0, dk1, dv0, dv1 = key_queries(
            k0, k1, v0, v1, q_ptr, do_ptr, stride_qn, stride_don, row_lse_ptr, row_dc_ptr, row_factor_ptr,
            table_ptr, stride_table, row_table_ptr, col_table_ptr, philox_ptr, batch_head, threshold, inverse_keep,
            logit_scale,
            position, first_column, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, False, True, DENSE, EXACT, DROPOUT,
        )  # fmt: skip
    else:
        dk0, dk1, dv0, dv1 = key_queries(
            k0, k1, v0, v1, q_ptr, do_ptr, stride_qn, stride_don, row_lse_ptr, row_dc_ptr, row_factor_ptr,
            table_ptr, stride_table, row_table_ptr, col_table_ptr, philox_ptr, batch_head, threshold, inverse_keep,
            logit_scale,
            position, first_column, num_tokens, height, width,
            HEAD_DIM, HEAD0, HEAD1, BLOCK_M, BLOCK_N, PRECISION, True, True, DENSE, EXACT, DROPOUT,
        )  # fmt: skip

    dk0 *= scale
    if HEAD1 > 0:
        dk1 *= scale
    if DROPOUT:
        dv0 *= inverse_keep
        if HEAD1 > 0:
            dv1 *= inverse_keep
    dk_ptr += b64 * stride_dkb + h64 * stride_dkh
    dv_ptr += b64 * stride_dvb + h64 * stride_dvh
    store_pair(dk_ptr, columns, stride_dkn, num_tokens, dk0, dk1, HEAD_DIM, HEAD0, HEAD1)
    store_pair(dv_ptr, columns, stride_dvn, num_tokens, dv0, dv1, HEAD_DIM, HEAD0, HEAD1)


@triton.jit
def coordinates(token, width):
    """Row and column of tokens of the grid, in float32, without an integer division; exact up to 2^20 tokens."""
    token = token.to(tl.float32)
    y = tl.floor((token + 0.5) * (1.0 / width))
    return y, token - y * width


@triton.jit
def axis_moments(place, size, linear, quadratic, ROWS: tl.constexpr):
    """One factor of P along one axis of the grid, ``exp2(linear * offset + quadratic * offset^2 - top) / total``, from
    each ``place``.

    Returns top, 1 / total and the means of the offset and of its square.
    """
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in range(0, size, 16):
        target = first + tl.arange(0, 16)
        offset = target.to(tl.float32)[None, :] - place[:, None]
        logit = tl.where(target[None, :] < size, offset * (linear + quadratic * offset), float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        e = tl.exp2(logit - new_top[:, None])
        correction = tl.exp2(top - new_top)
        total = total * correction + tl.sum(e, 1)
        mean = mean * correction + tl.sum(e * offset, 1)
        square = square * correction + tl.sum(e * offset * offset, 1)
        top = new_top
    return top, 1.0 / total, mean / total, square / total


@triton.jit
def backward_position_kernel(
    do_ptr, v_ptr, row_dc_ptr, pos_weight_ptr, philox_ptr, partial_ptr,
    stride_dob, stride_doh, stride_don, stride_vb, stride_vh, stride_vn,
    dropout_p, batch_size, num_heads, num_tokens, num_rows, height, width, span, group,
    HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What each row of a block of queries, with ``span`` keys and ``group`` images, adds to sum (dp - dc) and to d
    pos_weight / g.

    ``sum_j P_ij (dA_ij - dc_i) = dp_i - dc_i``; and as ``sum_j P_ij (rel_ij - E_i) = 0``, taking dc out of dA alters
    nothing but rounding there.

    ``partial`` is (H, 4, programs, BLOCK_M). Grid: (row blocks x key spans x groups, heads).
    """
    row_blocks = tl.cdiv(num_tokens, BLOCK_M)
    spans = tl.cdiv(num_tokens, span)
    program = tl.program_id(0)
    head = tl.program_id(1)
    rows = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_key = program // row_blocks % spans * span
    first_image = program // row_blocks // spans * group
    images = tl.minimum(group, batch_size - first_image)
    # What lies past the end repeats the last token: no load needs a mask, P is 0 in such columns, and such rows are
    # dropped at the end.
    inside = tl.minimum(rows, num_tokens - 1)
    b64 = first_image.to(tl.int64)
    h64 = head.to(tl.int64)
    do_ptr += b64 * stride_dob + h64 * stride_doh
    v_ptr += b64 * stride_vb + h64 * stride_vh
    row_dc_ptr += (h64 * batch_size + b64) * num_rows
    threshold = dropout_threshold(dropout_p)
    inverse_keep = 1.0 / (1.0 - dropout_p)

    # Sums over the columns of P o dA times 1 and times dx, dy and dx^2 + dy^2 less their means under P (E): offsets
    # from the query, since absolute coordinates would cancel badly.
    row_y, row_x = coordinates(inside, width)
    wx = tl.load(pos_weight_ptr + head * 3) * LOG2E_
    wy = tl.load(pos_weight_ptr + head * 3 + 1) * LOG2E_
    wr = tl.load(pos_weight_ptr + head * 3 + 2) * LOG2E_
    top_x, share_x, ex, exx = axis_moments(row_x, width, wx, wr, BLOCK_M)
    top_y, share_y, ey, eyy = axis_moments(row_y, height, wy, wr, BLOCK_M)
    er = exx + eyy
    top = top_x + top_y - wr * er
    t0 = tl.zeros([BLOCK_M], tl.float32)
    tx = tl.zeros([BLOCK_M], tl.float32)
    ty = tl.zeros([BLOCK_M], tl.float32)
    tr = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first_key, tl.minimum(first_key + span, num_tokens), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside_columns = tl.minimum(columns, num_tokens - 1)
        da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        image_do = do_ptr
        image_v = v_ptr
        image_dc = row_dc_ptr
        dc = tl.zeros([BLOCK_M], tl.float32)
        for image in range(images):
            do0, do1 = load_pair(image_do, inside, stride_don, num_tokens, HEAD_DIM, HEAD0, HEAD1, False)
            v0, v1 = load_pair(image_v, inside_columns, stride_vn, num_tokens, HEAD_DIM, HEAD0, HEAD1, False)
            if DROPOUT:
                keep = keep_mask(philox_ptr, (first_image + image) * num_heads + head, rows, start, threshold, BLOCK_N)
                da += tl.where(keep, inner(do0, do1, v0, v1, HEAD1, PRECISION) * inverse_keep, 0.0)
            else:
                da = tl.dot(do0, tl.trans(v0), da, input_precision=PRECISION)
                if HEAD1 > 0:
                    da = tl.dot(do1, tl.trans(v1), da, input_precision=PRECISION)
            dc += tl.load(image_dc + inside)
            image_do += stride_dob
            image_v += stride_vb
            image_dc += num_rows
        column_y, column_x = coordinates(inside_columns, width)
        dx = column_x[None, :] - row_x[:, None]
        dy = column_y[None, :] - row_y[:, None]
        dr = dx * dx + (dy * dy - er[:, None])
        # P is computed once for all the images, in float32, since the table is rounded; its normaliser is applied at
        # the end.
        p = tl.exp2(wx * dx + (wy * dy + (wr * dr - top[:, None])))
        t = tl.where(columns[None, :] < num_tokens, p, 0.0) * (da - dc[:, None])
        t0 += tl.sum(t, 1)
        tx += tl.sum(t * (dx - ex[:, None]), 1)
        ty += tl.sum(t * (dy - ey[:, None]), 1)
        tr += tl.sum(t * dr, 1)

    share = tl.where(rows < num_tokens, share_x * share_y, 0.0)
    size = tl.num_programs(0) * BLOCK_M
    partial_ptrs = partial_ptr + h64 * 4 * size + program * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(partial_ptrs, t0 * share)
    tl.store(partial_ptrs + size, tx * share)
    tl.store(partial_ptrs + 2 * size, ty * share)
    tl.store(partial_ptrs + 3 * size, tr * share)


@triton.jit
def backward_reduce_kernel(partial_ptr, gate_ptr, d_gate_ptr, d_pos_weight_ptr, size, BLOCK: tl.constexpr):
    """d gate and d pos_weight, from the position kernel's (H, 4, size) numbers, in a fixed order. Grid: (4, heads)."""
    which = tl.program_id(0)
    head = tl.program_id(1)
    content, position = gate_shares(gate_ptr, head)
    partial_ptr += (head.to(tl.int64) * 4 + which) * size
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.load(partial_ptr + index, mask=index < size - start, other=0.0)
        partial_ptr += BLOCK
    if which == 0:
        tl.store(d_gate_ptr + head, content * position * tl.sum(total, 0))
    else:
        tl.store(d_pos_weight_ptr + head * 3 + which - 1, position * tl.sum(total, 0))


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    content: Tensor,
    lse: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    table: Tensor | None = None,
    row_table: Tensor | None = None,
    col_table: Tensor | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    configs: tuple[Config, Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k, v, the raw gate and the positional weights.

    Args:
        d_out: (B, H, N, D) gradient of the output in the dtype of q, any strides but the last, which is 1.
        q, k, v, gate, grid_size, scale, table, row_table, col_table, dropout_p, philox: as `forward` had them.
        pos_weight: (H, 3) positional weights, contiguous, float32.
        content, lse: results of `forward`; content (B, H, N, D) with a last stride of 1, lse (B, H, N) float32,
            contiguous.
        configs: launch configurations of the kernels of dQ, of dK and dV, and of position; None takes those of the
        table for this device.

    Returns:
        dq, dk, dv (B, H, N, D) in the dtype of q, each a view of a contiguous (B, N, H, D) tensor, d_gate (H,) and
        d_pos_weight (H, 3) in float32.

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
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    if dropout_p > 0.0 and philox is None:
        raise ValueError("dropout needs philox, a tensor with seed and offset")
    if not d_out.stride(-1) == q.stride(-1) == k.stride(-1) == v.stride(-1) == content.stride(-1) == 1:
        raise ValueError("the last stride of d_out, q, k, v and content must be 1")
    if configs is None:
        regime: Regime = "dense" if dense else "factored"
        config_q, config_kv, config_position = (
            lookup(name, dtype=q.dtype, head_dim=head_dim, regime=regime, num_tokens=tokens, device=q.device)
            for name in ("backward_q", "backward_kv", "backward_position")
        )
    else:
        config_q, config_kv, config_position = configs
    head0, head1 = split_head_dim(head_dim)
    precision = matmul_precision(q.dtype)
    shape = {"HEAD_DIM": head_dim, "HEAD0": head0, "HEAD1": head1, "PRECISION": precision, "DROPOUT": dropout_p > 0.0}

    dq, dk, dv = heads_last(q), heads_last(q), heads_last(q)
    # the query blocks of dK and dV must divide those of dQ, whose kernel fills the rows up to the end of its last block
    block_kv = min(config_kv.block_m, config_q.block_m)
    num_rows = blocks(tokens, config_q.block_m) * config_q.block_m
    exact = q.dtype == torch.float32
    row_lse, row_dc, *more = torch.empty((2 + exact, heads, batch, num_rows), dtype=torch.float32, device=q.device)
    row_factor = more[0] if exact else None
    launch(
        backward_q_kernel, (blocks(tokens, config_q.block_m) * batch, heads),
        d_out, q, k, v, content, lse, gate, philox, dq, row_lse, row_dc, row_factor,
        *d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *content.stride()[:3], *dq.stride()[:3], scale, scale * LOG2E, dropout_p, batch, heads, tokens, num_rows,
        **shape, BLOCK_M=config_q.block_m, BLOCK_N=config_q.block_n, SATURATION=saturation(q.dtype), EXACT=exact,
        RAGGED=tokens % config_q.block_n != 0, num_warps=config_q.num_warps, num_stages=config_q.num_stages,
    )  # fmt: skip
    launch(
        backward_kv_kernel, (blocks(tokens, config_kv.block_n) * batch, heads),
        d_out, q, k, v, row_lse, row_dc, row_factor, gate, table, row_table, col_table, philox, dk, dv,
        *d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        padded(tokens),
        scale, scale * LOG2E, dropout_p, batch, heads, tokens, num_rows, height, width,
        **shape, BLOCK_M=block_kv, BLOCK_N=config_kv.block_n, SATURATION=saturation(q.dtype),
        DENSE=dense, EXACT=exact, num_warps=config_kv.num_warps, num_stages=config_kv.num_stages,
    )  # fmt: skip

    # A program sums over as many images as it can, then over as many keys, as long as there are programs for every
    # multiprocessor. The rule knows no device, so the order of the sums, and with it the result, is the same on all.
    row_blocks = blocks(tokens, config_position.block_m)
    key_blocks = blocks(tokens, config_position.block_n)
    share = max(1, heads * row_blocks * key_blocks * batch // POSITION_PROGRAMS)
    group = min(batch, share)
    span = config_position.block_n * min(key_blocks, share // group)
    programs = row_blocks * blocks(tokens, span) * blocks(batch, group)
    size = programs * config_position.block_m
    partial = torch.empty((heads, 4, size), dtype=torch.float32, device=q.device)
    d_gate = torch.empty(heads, dtype=torch.float32, device=q.device)
    d_pos_weight = torch.empty((heads, 3), dtype=torch.float32, device=q.device)
    launch(
        backward_position_kernel, (programs, heads),
        d_out, v, row_dc, pos_weight, philox, partial,
        *d_out.stride()[:3], *v.stride()[:3], dropout_p, batch, heads, tokens, num_rows, height, width, span, group,
        **shape, BLOCK_M=config_position.block_m, BLOCK_N=config_position.block_n,
        num_warps=config_position.num_warps, num_stages=config_position.num_stages,
    )  # fmt: skip
    launch(backward_reduce_kernel, (4, heads), partial, gate, d_gate, d_pos_weight, size, BLOCK=1024, num_warps=4)
    return dq, dk, dv, d_gate, d_pos_weight
