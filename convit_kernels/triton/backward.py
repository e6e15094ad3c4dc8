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
    Dropout,
    Position,
    accumulate,
    add_inner,
    dropout_threshold,
    factored_position,
    factors_ptrs,
    gate_shares,
    heads_last,
    inner,
    keep_mask,
    load_rows,
    matmul_precision,
    matrix_ptr,
    mixed,
    padded,
    program_block,
    row_products,
    rows_of,
    saturation,
    scaled,
    split_head_dim,
    store_rows,
    zeros,
)
from .configs import Config, Regime, lookup
from .launch import blocks, launch

LOG2E_: tl.constexpr = tl.constexpr(LOG2E)

# Coordinates of an axis that `axis_moments` takes at once.
AXIS_STEP: tl.constexpr = tl.constexpr(4)

# Programs of the position kernel: enough to fill a large GPU, few enough that each sums many images before it reduces.
POSITION_PROGRAMS = 128


@triton.jit
def query_tile(
    dq, sum_tile, q, do, lse, dc, k_ptr, k_stride, v_ptr, v_stride, draw, inverse_keep, logit_scale, rows, start,
    num_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    DROPOUT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys for a block of queries. k_ptr and v_ptr point at the tile. LAST: it reaches past the last
    token."""
    columns = tl.arange(0, BLOCK_N)
    left = num_tokens - start
    k = load_rows(k_ptr, columns, k_stride, left, HEAD_DIM, SPLIT, LAST)
    v = load_rows(v_ptr, columns, v_stride, left, HEAD_DIM, SPLIT, LAST)
    c = tl.exp2(inner(q, k, PRECISION) * logit_scale - lse[:, None])
    if LAST:
        c = tl.where(columns[None, :] < left, c, 0.0)
    da = inner(do, v, PRECISION)
    if DROPOUT:
        da = tl.where(keep_mask(draw, rows, start, BLOCK_N), da * inverse_keep, 0.0)
    ds = c * (da - dc[:, None])
    if EXACT:
        sum_tile += c
    else:
        sum_tile += ds
    return accumulate(ds.to(k[0].dtype), k, dq, PRECISION), sum_tile


@triton.jit
def backward_q_kernel(
    do, q, k, v, content, lse_ptr, gate_ptr, dropout, dq, row_lse_ptr, row_dc_ptr, row_factor_ptr,
    scale, logit_scale, batch_size, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SATURATION: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """dQ and the few numbers of each row that the kernel of dK and dV reads. Grid: (row blocks x images, heads).

    Those rows are (H, B, num_rows), num_rows a multiple of BLOCK_M: row_lse = log2 of what divides ``exp2(logit)`` to
    give ``(1 - g) C``, +inf past the last token, so that a padded row has no probability anywhere; row_dc = dc. EXACT
    (float32): the logarithm's rounding would show, and ``(1 - g) C = exp2(logit - row_lse) * row_factor``. RAGGED: the
    last tile of keys reaches past the last token. It stands behind the loop, which so needs no masks, but not in
    float32: there operands go through registers, and for a second copy of the tile the compiler would hold those of q
    and dO in registers throughout.
    """
    batch, head, first_row = program_block(num_tokens, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    do_ptr = matrix_ptr(do, batch, head)
    q_ptr = matrix_ptr(q, batch, head)
    k_ptr = matrix_ptr(k, batch, head)
    v_ptr = matrix_ptr(v, batch, head)
    content_ptr = matrix_ptr(content, batch, head)
    draw = (dropout.philox, batch * num_heads + head, dropout_threshold(dropout.p))
    inverse_keep = 1.0 / (1.0 - dropout.p)
    content_share, _position_share = gate_shares(gate_ptr, head)

    q_tile = load_rows(q_ptr, rows, q.row, num_tokens, HEAD_DIM, SPLIT, True)
    do_tile = load_rows(do_ptr, rows, do.row, num_tokens, HEAD_DIM, SPLIT, True)
    cv = load_rows(content_ptr, rows, content.row, num_tokens, HEAD_DIM, SPLIT, True)
    dc = row_products(do_tile, cv)
    first = (batch * num_heads + head).to(tl.int64) * num_tokens
    lse = tl.load(lse_ptr + first + rows, mask=rows < num_tokens, other=float("inf")) * LOG2E_

    dq_tile = zeros(BLOCK_M, SPLIT)
    # Sums over the tiles, entry by entry: what lies in different threads is added once, at the end.
    sum_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXACT:
        whole = num_tokens
    else:
        whole = num_tokens // BLOCK_N * BLOCK_N
    k_step = tl.cast(k.row, tl.int64) * BLOCK_N
    v_step = tl.cast(v.row, tl.int64) * BLOCK_N
    # Where content is too small a share to matter, dQ is 0, and so is whatever the ragged tile adds: its lse is +inf.
    for start in range(0, tl.where(content_share < SATURATION, 0, whole), BLOCK_N):
        dq_tile, sum_tile = query_tile(
            dq_tile, sum_tile, q_tile, do_tile, lse, dc, k_ptr, k.row, v_ptr, v.row, draw, inverse_keep, logit_scale,
            rows, start, num_tokens, HEAD_DIM, SPLIT, BLOCK_N, PRECISION, EXACT, DROPOUT, RAGGED and EXACT,
        )  # fmt: skip
        k_ptr += k_step
        v_ptr += v_step
    if RAGGED and not EXACT:
        dq_tile, sum_tile = query_tile(
            dq_tile, sum_tile, q_tile, do_tile, lse, dc, k_ptr, k.row, v_ptr, v.row, draw, inverse_keep, logit_scale,
            rows, whole, num_tokens, HEAD_DIM, SPLIT, BLOCK_N, PRECISION, EXACT, DROPOUT, True,
        )  # fmt: skip

    factor = content_share + tl.zeros([BLOCK_M], tl.float32)
    row_sum = tl.sum(sum_tile, 1)
    if EXACT:
        # A float32 lse of large logits is off by more than rounding of a probability; rows that sum to 1 again make up
        # for it. Where content has been skipped, and past the last token, the sum is 0.
        factor = factor / tl.where(row_sum > 0.0, row_sum, 1.0)
    else:
        dc += row_sum
    dq_tile = scaled(dq_tile, (scale * factor)[:, None])
    store_rows(matrix_ptr(dq, batch, head), rows, dq.row, num_tokens, dq_tile, HEAD_DIM, SPLIT)
    row = (head * batch_size + batch).to(tl.int64) * num_rows + rows
    if EXACT:
        tl.store(row_lse_ptr + row, lse)
        tl.store(row_factor_ptr + row, factor)
    else:
        tl.store(row_lse_ptr + row, lse - tl.log2(content_share))
    tl.store(row_dc_ptr + row, dc)


@triton.jit
def key_queries(
    k, v, q_ptr, q_stride, do_ptr, do_stride, row_lse_ptr, row_dc_ptr, row_factor_ptr, position, head, draw,
    inverse_keep, logit_scale, position_share, first_column, num_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, DENSE: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Walk over the queries for a block of keys. Tiles are (keys, queries), so that none has to change its layout
    between two products."""
    columns = first_column + tl.arange(0, BLOCK_N)
    dk = zeros(BLOCK_N, SPLIT)
    dv = zeros(BLOCK_N, SPLIT)
    pv = zeros(BLOCK_N, SPLIT)
    keys = (columns // position.width, columns % position.width)
    if DENSE:
        table_ptr = position.table + head.to(tl.int64) * num_tokens * position.columns
        factors = None
    else:
        table_ptr = None
        factors = factors_ptrs(position, head)
    # Rows count from the tile's first, and the pointers move: so the offsets are the same in every tile, and computed
    # once.
    rows = tl.arange(0, BLOCK_M)
    q_step = tl.cast(q_stride, tl.int64) * BLOCK_M
    do_step = tl.cast(do_stride, tl.int64) * BLOCK_M
    for start in range(0, num_tokens, BLOCK_M):
        left = num_tokens - start
        do = load_rows(do_ptr, rows, do_stride, left, HEAD_DIM, SPLIT, True)
        if DROPOUT:
            keep = tl.trans(keep_mask(draw, start + rows, first_column, BLOCK_N))
        if POSITION:
            if DENSE:
                mask = (rows[:, None] < left) & (columns[None, :] < position.columns)
                p = tl.load(table_ptr + rows[:, None] * position.columns + columns[None, :], mask=mask, other=0.0)
            else:
                token = start + tl.minimum(rows, left - 1)  # past the end P may be anything finite, because dO is 0
                queries = (token // position.width, token % position.width)
                p = factored_position(factors, position, queries, keys, columns, num_tokens, True).to(do[0].dtype)
            p = tl.trans(p)
        if CONTENT:
            q = load_rows(q_ptr, rows, q_stride, left, HEAD_DIM, SPLIT, True)
            c = tl.exp2(inner(k, q, PRECISION) * logit_scale - tl.load(row_lse_ptr + rows)[None, :])
            if EXACT:
                c *= tl.load(row_factor_ptr + rows)[None, :]
            a = c
            if POSITION and EXACT:
                a += position_share * p.to(tl.float32)
            if DROPOUT:
                a = tl.where(keep, a, 0.0)
            dv = accumulate(a.to(do[0].dtype), do, dv, PRECISION)
        if POSITION and not (CONTENT and EXACT):
            if DROPOUT:
                p = tl.where(keep, p, 0.0)
            pv = accumulate(p, do, pv, PRECISION)
        if CONTENT:
            da = inner(v, do, PRECISION)
            if DROPOUT:
                da = tl.where(keep, da * inverse_keep, 0.0)
            ds = c * (da - tl.load(row_dc_ptr + rows)[None, :])
            dk = accumulate(ds.to(q[0].dtype), q, dk, PRECISION)
        q_ptr += q_step
        do_ptr += do_step
        row_lse_ptr += BLOCK_M
        row_dc_ptr += BLOCK_M
        if EXACT:
            row_factor_ptr += BLOCK_M
        if DENSE:
            table_ptr += BLOCK_M * position.columns
    if POSITION and not (CONTENT and EXACT):
        dv = mixed(dv, 1.0, pv, position_share)
    return dk, dv


@triton.jit
def backward_kv_kernel(
    do, q, k, v, row_lse_ptr, row_dc_ptr, row_factor_ptr, gate_ptr, position, dropout, dk, dv,
    scale, logit_scale, batch_size, num_heads, num_tokens, num_rows,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SATURATION: tl.constexpr, DENSE: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid: (key blocks x images, heads). The rows are those of `backward_q_kernel`, num_rows a multiple of
    BLOCK_M."""
    batch, head, first_column = program_block(num_tokens, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_N)
    q_ptr = matrix_ptr(q, batch, head)
    do_ptr = matrix_ptr(do, batch, head)
    first_row = (head * batch_size + batch).to(tl.int64) * num_rows
    row_lse_ptr += first_row
    row_dc_ptr += first_row
    if EXACT:
        row_factor_ptr += first_row
    draw = (dropout.philox, batch * num_heads + head, dropout_threshold(dropout.p))
    inverse_keep = 1.0 / (1.0 - dropout.p)
    content_share, position_share = gate_shares(gate_ptr, head)

    k_tile = load_rows(matrix_ptr(k, batch, head), columns, k.row, num_tokens, HEAD_DIM, SPLIT, True)
    v_tile = load_rows(matrix_ptr(v, batch, head), columns, v.row, num_tokens, HEAD_DIM, SPLIT, True)
    if position_share < SATURATION:
        dk_tile, dv_tile = key_queries(
            k_tile, v_tile, q_ptr, q.row, do_ptr, do.row, row_lse_ptr, row_dc_ptr, row_factor_ptr, position, head, draw,
            inverse_keep, logit_scale, position_share, first_column, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, True, False, DENSE, EXACT, DROPOUT,
        )  # fmt: skip
    elif content_share < SATURATION:
        dk_tile, dv_tile = key_queries(
            k_tile, v_tile, q_ptr, q.row, do_ptr, do.row, row_lse_ptr, row_dc_ptr, row_factor_ptr, position, head, draw,
            inverse_keep, logit_scale, position_share, first_column, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, False, True, DENSE, EXACT, DROPOUT,
        )  # fmt: skip
    else:
        dk_tile, dv_tile = key_queries(
            k_tile, v_tile, q_ptr, q.row, do_ptr, do.row, row_lse_ptr, row_dc_ptr, row_factor_ptr, position, head, draw,
            inverse_keep, logit_scale, position_share, first_column, num_tokens,
            HEAD_DIM, SPLIT, BLOCK_M, BLOCK_N, PRECISION, True, True, DENSE, EXACT, DROPOUT,
        )  # fmt: skip

    dk_tile = scaled(dk_tile, scale)
    if DROPOUT:
        dv_tile = scaled(dv_tile, inverse_keep)
    store_rows(matrix_ptr(dk, batch, head), columns, dk.row, num_tokens, dk_tile, HEAD_DIM, SPLIT)
    store_rows(matrix_ptr(dv, batch, head), columns, dv.row, num_tokens, dv_tile, HEAD_DIM, SPLIT)


@triton.jit
def coordinates(token, width):
    """Row and column of tokens of the grid, in float32, without an integer division; exact up to 2^20 tokens."""
    token = token.to(tl.float32)
    y = tl.floor((token + 0.5) * (1.0 / width))
    return y, token - y * width


@triton.jit
def axis_peak(place, size, linear, quadratic):
    """Where P is largest along one axis of the grid, seen from each ``place``: its coordinate, and there the slope.

    Of the offset ``a`` from that coordinate the logit, less the largest, is ``a (slope + quadratic a)``: where P is not
    small, so is a or its factor, and no large numbers cancel, as they would in offsets from the place.
    """
    low = -place
    high = size - 1 - place
    # a parabola's largest value on a segment: at its peak, or where it has none, at an end
    end = tl.where(low * (linear + quadratic * low) > high * (linear + quadratic * high), low, high)
    peak = tl.minimum(tl.maximum(tl.floor(0.5 - 0.5 * linear / quadratic), low), high)
    largest = tl.where(quadratic < 0.0, peak, end)
    return place + largest, linear + 2.0 * quadratic * largest


@triton.jit
def axis_moments(origin, slope, size, quadratic, ROWS: tl.constexpr):
    """Of one factor of P, about the place that `axis_peak` found: 1 / sum of the numerators, and the means of the
    offset and of its square.
    """
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in range(0, size, AXIS_STEP):
        for step in tl.static_range(AXIS_STEP):
            a = first + step - origin
            e = tl.where(first + step < size, tl.exp2(a * (slope + quadratic * a)), 0.0)
            total += e
            mean += e * a
            square += e * a * a
    return 1.0 / total, mean / total, square / total


@triton.jit
def backward_position_kernel(
    do, v, row_dc_ptr, pos_weight_ptr, dropout, partial_ptr,
    batch_size, num_heads, num_tokens, num_rows, height, width, span, group,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    # What lies past the end repeats the last token: no load needs a mask, dA is made 0 in such columns, and such rows
    # are dropped at the end.
    inside = tl.minimum(rows, num_tokens - 1)
    do_ptr = matrix_ptr(do, first_image, head)
    v_ptr = matrix_ptr(v, first_image, head)
    row_dc_ptr += (head * batch_size + first_image).to(tl.int64) * num_rows
    threshold = dropout_threshold(dropout.p)
    inverse_keep = 1.0 / (1.0 - dropout.p)

    # Sums over the columns of P o dA times 1, ax, ay and ax^2 + ay^2, where a is the offset from P's largest entry:
    # with absolute coordinates they would cancel badly.
    row_y, row_x = coordinates(inside, width)
    wx = tl.load(pos_weight_ptr + head * 3) * LOG2E_
    wy = tl.load(pos_weight_ptr + head * 3 + 1) * LOG2E_
    wr = tl.load(pos_weight_ptr + head * 3 + 2) * LOG2E_
    origin_x, slope_x = axis_peak(row_x, width, wx, wr)
    origin_y, slope_y = axis_peak(row_y, height, wy, wr)
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
            do_tile = load_rows(image_do, inside, do.row, num_tokens, HEAD_DIM, SPLIT, False)
            v_tile = load_rows(image_v, inside_columns, v.row, num_tokens, HEAD_DIM, SPLIT, False)
            if DROPOUT:
                draw = (dropout.philox, (first_image + image) * num_heads + head, threshold)
                keep = keep_mask(draw, rows, start, BLOCK_N)
                da += tl.where(keep, inner(do_tile, v_tile, PRECISION) * inverse_keep, 0.0)
            else:
                da = add_inner(da, do_tile, v_tile, PRECISION)
            dc += tl.load(image_dc + inside)
            image_do += do.batch
            image_v += v.batch
            image_dc += num_rows
        column_y, column_x = coordinates(inside_columns, width)
        ax = column_x[None, :] - origin_x[:, None]
        ay = column_y[None, :] - origin_y[:, None]
        # P is computed once for all the images, in float32, since the table is rounded; its normaliser is applied at
        # the end.
        p = tl.exp2(ax * (slope_x[:, None] + wr * ax) + ay * (slope_y[:, None] + wr * ay))
        t = p * tl.where(columns[None, :] < num_tokens, da - dc[:, None], 0.0)
        t0 += tl.sum(t, 1)
        tx += tl.sum(t * ax, 1)
        ty += tl.sum(t * ay, 1)
        tr += tl.sum(t * (ax * ax + ay * ay), 1)

    # less their means under P (E), and for the squares of the offsets from the query itself
    share_x, ex, exx = axis_moments(origin_x, slope_x, width, wr, BLOCK_M)
    share_y, ey, eyy = axis_moments(origin_y, slope_y, height, wr, BLOCK_M)
    tx -= ex * t0
    ty -= ey * t0
    tr += 2.0 * ((origin_x - row_x) * tx + (origin_y - row_y) * ty) - (exx + eyy) * t0
    share = tl.where(rows < num_tokens, share_x * share_y, 0.0)
    size = tl.num_programs(0) * BLOCK_M
    partial_ptrs = partial_ptr + head.to(tl.int64) * 4 * size + program * BLOCK_M + tl.arange(0, BLOCK_M)
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
            lookup(
                name,
                dtype=q.dtype,
                head_dim=head_dim,
                regime=regime,
                num_tokens=tokens,
                batch_heads=batch * heads,
                device=q.device,
            )
            for name in ("backward_q", "backward_kv", "backward_position")
        )
    else:
        config_q, config_kv, config_position = configs
    constants = {
        "HEAD_DIM": head_dim,
        "SPLIT": split_head_dim(head_dim),
        "PRECISION": matmul_precision(q.dtype),
        "DROPOUT": dropout_p > 0.0,
    }
    position = Position(table, padded(tokens), row_table, col_table, height, width)
    dropout = Dropout(philox, dropout_p)
    rows_do, rows_q, rows_k, rows_v = (rows_of(tensor) for tensor in (d_out, q, k, v))

    dq, dk, dv = heads_last(q), heads_last(q), heads_last(q)
    # the query blocks of dK and dV must divide those of dQ, whose kernel fills the rows up to the end of its last block
    block_kv = min(config_kv.block_m, config_q.block_m)
    num_rows = blocks(tokens, config_q.block_m) * config_q.block_m
    exact = q.dtype == torch.float32
    row_lse, row_dc, *more = torch.empty((2 + exact, heads, batch, num_rows), dtype=torch.float32, device=q.device)
    row_factor = more[0] if exact else None
    launch(
        backward_q_kernel, (blocks(tokens, config_q.block_m) * batch, heads),
        rows_do, rows_q, rows_k, rows_v, rows_of(content), lse, gate, dropout, rows_of(dq), row_lse, row_dc, row_factor,
        scale, scale * LOG2E, batch, heads, tokens, num_rows,
        **constants, BLOCK_M=config_q.block_m, BLOCK_N=config_q.block_n, SATURATION=saturation(q.dtype), EXACT=exact,
        RAGGED=tokens % config_q.block_n != 0, num_warps=config_q.num_warps, num_stages=config_q.num_stages,
    )  # fmt: skip
    launch(
        backward_kv_kernel, (blocks(tokens, config_kv.block_n) * batch, heads),
        rows_do, rows_q, rows_k, rows_v, row_lse, row_dc, row_factor, gate, position, dropout, rows_of(dk), rows_of(dv),
        scale, scale * LOG2E, batch, heads, tokens, num_rows,
        **constants, BLOCK_M=block_kv, BLOCK_N=config_kv.block_n, SATURATION=saturation(q.dtype),
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
        rows_do, rows_v, row_dc, pos_weight, dropout, partial,
        batch, heads, tokens, num_rows, height, width, span, group,
        **constants, BLOCK_M=config_position.block_m, BLOCK_N=config_position.block_n,
        num_warps=config_position.num_warps, num_stages=config_position.num_stages,
    )  # fmt: skip
    launch(backward_reduce_kernel, (4, heads), partial, gate, d_gate, d_pos_weight, size, BLOCK=1024, num_warps=4)
    return dq, dk, dv, d_gate, d_pos_weight
