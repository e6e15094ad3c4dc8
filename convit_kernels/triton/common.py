"""Pieces that the forward and the backward kernels share.

Conventions of every kernel here:

* The softmax works in base 2: logits are multiplied by ``scale * log2(e)``. What leaves a kernel (``lse``) is a natural
  logarithm.
* Products accumulate in float32. Operands stay in the compute dtype, the dtype of q, k and v.
* A head_dim is cut into at most two column blocks, each a power of two of at least 16 (48 = 32 + 16, 80 = 64 + 16),
  because a tile's side must be a power of two and padding 48 to 64 would waste a quarter of the products. What has a
  head_dim is therefore a tuple of one or two blocks in the kernels.
* Offsets along the batch, the heads and the rows are 64 bits wide.

Arguments have the same names in all of them. B images, H heads, N = height * width tokens, D channels a head:

    q, k, v, do                          `Rows`, (B, H, N, D) in the compute dtype; do is the gradient of out
    out, content                         `Rows`, (B, H, N, D), the result and the content's own part C V; content_ptr:
                                         laid out as out
    dq, dk, dv                           `Rows`, (B, H, N, D), the gradients
    gate_ptr, pos_weight_ptr             (H,) before the sigmoid, and (H, 3); float32
    position                             `Position`: the dense table (H, N, padded(N)), P in the compute dtype, where
                                         DENSE; else the factors (H, height, height), (H, width, width) in float32
    lse_ptr                              (B, H, N) float32, the content's log-sum-exp
    row_lse_ptr, row_dc_ptr,             (H, B, num_rows) float32, from `backward_q_kernel` for the kernels after it;
    row_factor_ptr                       num_rows is N rounded up to whole blocks of queries
    dropout                              `Dropout`; read where DROPOUT
    partial_ptr                          (H, 4, programs x BLOCK_M) float32, sums that `backward_reduce_kernel` adds up
    scale, logit_scale                   of the content logits; times log2(e)
    batch_size, num_heads, num_tokens    B, H, N

    HEAD_DIM, SPLIT                      D and the sizes of its column blocks, see `split_head_dim`
    BLOCK_M, BLOCK_N                     queries and keys of a tile
    PRECISION                            "tf32" or "ieee", for float32 products
    SATURATION                           share of the mix below which a branch is skipped, see `saturation`
    CONTENT, POSITION                    which branches a function computes
    DENSE, DROPOUT                       which arguments are read, see above
    TAIL                                 keys of the ragged tile, 0 where there is none, see `tail`
    RAGGED, LAST                         whether there is a ragged tile; whether this tile is it
    EXACT                                the compute dtype is float32
    NEED_GRAD, NEGATIVE_SCALE            whether content and lse are stored; whether scale < 0

What device functions take and return, in float32: ``m`` and ``total`` (BLOCK_M,), the running maximum and sum of the
softmax; ``c`` and ``p`` (BLOCK_M, D), the accumulators of content and position; ``content_share`` and
``position_share``, 1 - g and g of a head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# The running maximum starts at a finite number: a tile whose logits are all -inf then leaves exp2(0) = 1, not NaN, as
# correction.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)

MAX_HEAD_DIM = 256


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, ...]:
    """Sizes of a head_dim's column blocks: one power of two of at least 16, or two, with the smallest sum >= head_dim.

    48 -> (32, 16), 64 -> (64,), 80 -> (64, 16), 96 -> (64, 32). Where the sum is larger than head_dim, the kernels mask
    the rest.

    Raises ValueError for a head_dim outside 1 ... 256.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be between 1 and {MAX_HEAD_DIM}, not {head_dim}")
    power = 16
    while power < head_dim:
        power *= 2
    half = power // 2
    if half >= 16:
        rest = 16
        while half + rest < head_dim:
            rest *= 2
        if rest < half:
            return half, rest
    return (power,)


@functools.cache
def saturation(dtype: torch.dtype) -> float:
    """Share of the mix below which a branch is skipped: its whole contribution is far below the rounding of the result
    in ``dtype``.

    The factor of 2^-8 under the dtype's epsilon leaves room for a branch whose average of V is larger than the other's.
    """
    return torch.finfo(dtype).eps / 256


def heads_last(q: torch.Tensor) -> torch.Tensor:
    """An empty tensor of q's shape (B, H, N, D) and dtype, laid out as (B, N, H, D)."""
    batch, heads, tokens, head_dim = q.shape
    return torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)


def padded(num_tokens: int) -> int:
    """Number of columns of a dense position table: the token count rounded up to 16, so that its rows can be read in
    16-byte words.
    """
    return (num_tokens + 15) // 16 * 16


def matmul_precision(dtype: torch.dtype) -> str:
    """How float32 products are made: ``"tf32"`` if ``torch.get_float32_matmul_precision()`` allows it, else
    ``"ieee"``.
    """
    # Not every AMD GPU has TF32, and Triton refuses it for those that have not.
    if dtype == torch.float32 and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def tail(num_tokens: int, block: int) -> int:
    """Size of the tile for the tokens that whole blocks leave over: a power of two of at least 16, or 0 if there are
    none.
    """
    rest = num_tokens % block
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0


# --- arguments --------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A tensor (B, H, N, D) whose last stride is 1, and its other strides: elements from one image, head, token to the
    next.
    """

    ptr: Any
    batch: Any
    head: Any
    row: Any


class Position(NamedTuple):
    """The dense table and the length of its rows, or both factors; and the grid. What is not there is None."""

    table: Any
    columns: Any
    row_table: Any
    col_table: Any
    height: Any
    width: Any


class Dropout(NamedTuple):
    """(2,) int64 on the device, seed and offset, and the probability that an entry of the mixed map is dropped."""

    philox: Any
    p: Any


def rows_of(x: Tensor, *, constant: bool = False) -> Rows:
    """A tensor as the kernels take it.

    Args:
        constant: whether the row's stride is compiled in: then the rows of a tile are fixed distances from one pointer.
            For tensors whose row stride belongs to a model, not to an input.
    """
    batch, head, row, _ = x.stride()
    return Rows(x, batch, head, tl.constexpr(row) if constant else row)


@triton.jit
def program_block(num_rows, BLOCK: tl.constexpr):
    """Image, head and first row of a program. Grid: (blocks of rows x images, heads)."""
    blocks = tl.cdiv(num_rows, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(0) % blocks * BLOCK


@triton.jit
def matrix_offset(x, batch, head):
    """Elements before the first row of an image's head."""
    return batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@triton.jit
def matrix_ptr(x, batch, head):
    """The first row of an image's head."""
    return x.ptr + matrix_offset(x, batch, head)


# --- tiles: tuples of column blocks -----------------------------------------------------------------------------------


@triton.jit
def block_ptrs(ptr, rows, stride, SPLIT: tl.constexpr):
    """Pointers of the given rows of a matrix, to be moved on from tile to tile: cheaper in a loop than `load_rows`."""
    row_ptrs = ptr + rows.to(tl.int64)[:, None] * stride
    first = row_ptrs + tl.arange(0, SPLIT[0])[None, :]
    if len(SPLIT) > 1:
        return first, row_ptrs + (SPLIT[0] + tl.arange(0, SPLIT[1]))[None, :]
    else:
        return (first,)


@triton.jit
def moved(ptrs, step):
    """The pointers, ``step`` elements further on."""
    first = ptrs[0] + step
    if len(ptrs) > 1:
        return first, ptrs[1] + step
    else:
        return (first,)


@triton.jit
def edge_mask(tile, rows, num_rows, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """What of a block from column FIRST on lies in a matrix of HEAD_DIM columns; None where all of it does.

    ``rows`` must lie inside the matrix unless MASK_ROWS.
    """
    columns = FIRST + tl.arange(0, tile.shape[1])
    if FIRST + tile.shape[1] > HEAD_DIM:
        mask = columns[None, :] < HEAD_DIM
        if MASK_ROWS:
            mask = mask & (rows[:, None] < num_rows)
    elif MASK_ROWS:
        mask = rows[:, None] < num_rows
    else:
        mask = None
    return mask


@triton.jit
def load_block(ptrs, rows, num_rows, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """One block; what lies outside of the matrix is zero."""
    if MASK_ROWS or FIRST + ptrs.shape[1] > HEAD_DIM:
        return tl.load(ptrs, mask=edge_mask(ptrs, rows, num_rows, FIRST, HEAD_DIM, MASK_ROWS), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_at(ptrs, rows, num_rows, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The tile at the pointers of `block_ptrs`; what lies outside of the matrix is zero.

    ``rows`` must lie inside the matrix unless MASK_ROWS.
    """
    first = load_block(ptrs[0], rows, num_rows, 0, HEAD_DIM, MASK_ROWS)
    if len(ptrs) > 1:
        return first, load_block(ptrs[1], rows, num_rows, ptrs[0].shape[1], HEAD_DIM, MASK_ROWS)
    else:
        return (first,)


@triton.jit
def load_rows(ptr, rows, stride, num_rows, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The tile of the given rows of a matrix, as `load_at`."""
    return load_at(block_ptrs(ptr, rows, stride, SPLIT), rows, num_rows, HEAD_DIM, MASK_ROWS)


@triton.jit
def store_rows(ptr, rows, stride, num_rows, x, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr):
    """Store a tile in the given rows of a matrix, rounded to its dtype."""
    ptrs = block_ptrs(ptr, rows, stride, SPLIT)
    dtype = ptr.dtype.element_ty
    tl.store(ptrs[0], x[0].to(dtype), mask=edge_mask(ptrs[0], rows, num_rows, 0, HEAD_DIM, True))
    if len(ptrs) > 1:
        tl.store(ptrs[1], x[1].to(dtype), mask=edge_mask(ptrs[1], rows, num_rows, SPLIT[0], HEAD_DIM, True))


# --- arithmetic of tiles ----------------------------------------------------------------------------------------------


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """``a b^T``, the product over the head_dim: (M, D), (N, D) -> (M, N) in float32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_inner(c, a, b, PRECISION: tl.constexpr):
    """``c + a b^T``, see `inner`."""
    c = tl.dot(a[0], tl.trans(b[0]), c, input_precision=PRECISION)
    if len(a) > 1:
        c = tl.dot(a[1], tl.trans(b[1]), c, input_precision=PRECISION)
    return c


@triton.jit
def accumulate(a, b, c, PRECISION: tl.constexpr):
    """``c + a b``: (M, N), (N, D), (M, D) -> (M, D) in float32. ``a`` has the dtype of b."""
    first = tl.dot(a, b[0], c[0], input_precision=PRECISION)
    if len(c) > 1:
        return first, tl.dot(a, b[1], c[1], input_precision=PRECISION)
    else:
        return (first,)


@triton.jit
def accumulate_both(a, b, x, c, d, PRECISION: tl.constexpr):
    """``c + a x`` and ``d + b x``, each as `accumulate` makes it, block by block."""
    c0 = tl.dot(a, x[0], c[0], input_precision=PRECISION)
    d0 = tl.dot(b, x[0], d[0], input_precision=PRECISION)
    if len(x) > 1:
        c1 = tl.dot(a, x[1], c[1], input_precision=PRECISION)
        d1 = tl.dot(b, x[1], d[1], input_precision=PRECISION)
        return (c0, c1), (d0, d1)
    else:
        return (c0,), (d0,)


@triton.jit
def zeros(ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """A float32 accumulator (ROWS, head_dim) of zeros."""
    WIDTH0: tl.constexpr = SPLIT[0]
    first = tl.zeros([ROWS, WIDTH0], tl.float32)
    if len(SPLIT) > 1:
        WIDTH1: tl.constexpr = SPLIT[1]
        return first, tl.zeros([ROWS, WIDTH1], tl.float32)
    else:
        return (first,)


@triton.jit
def scaled(x, factor):
    """A tile times a number, or times one for each row, (ROWS, 1)."""
    first = x[0] * factor
    if len(x) > 1:
        return first, x[1] * factor
    else:
        return (first,)


@triton.jit
def negated(x):
    """Minus a tile, in its dtype."""
    first = (-x[0].to(tl.float32)).to(x[0].dtype)
    if len(x) > 1:
        return first, (-x[1].to(tl.float32)).to(x[1].dtype)
    else:
        return (first,)


@triton.jit
def mixed(x, x_factor, y, y_factor):
    """The sum of two tiles, each times a factor as in `scaled`."""
    first = x[0] * x_factor + y[0] * y_factor
    if len(x) > 1:
        return first, x[1] * x_factor + y[1] * y_factor
    else:
        return (first,)


@triton.jit
def row_products(a, b):
    """``a . b`` row by row, (ROWS,) in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


# --- the mix ----------------------------------------------------------------------------------------------------------


@triton.jit
def gate_shares(gate_ptr, head):
    """Shares ``(1 - g, g)`` of content and position of a head, g = sigmoid(gate), each accurate even where the other
    is nearly 1.
    """
    gate = tl.load(gate_ptr + head).to(tl.float32)
    odds = tl.exp(-tl.abs(gate))
    larger = 1.0 / (1.0 + odds)
    smaller = odds * larger
    return tl.where(gate > 0.0, smaller, larger), tl.where(gate > 0.0, larger, smaller)


# --- position ---------------------------------------------------------------------------------------------------------


@triton.jit
def dense_ptrs(table_ptr, rows, columns, stride):
    """Pointers of a tile of one head's dense table, which has less than 2^31 elements."""
    return table_ptr + (rows[:, None] * stride + columns[None, :])


@triton.jit
def factors_ptrs(position, head):
    """Pointers of one head's factors."""
    h64 = head.to(tl.int64)
    return (
        position.row_table + h64 * position.height * position.height,
        position.col_table + h64 * position.width * position.width,
    )


@triton.jit
def factored_position(factors, position, queries, keys, columns, num_tokens, MASK_COLUMNS: tl.constexpr):
    """Tile of the position map from one head's factors, ``Py[query y, key y] * Px[query x, key x]`` in float32; zero
    for columns >= num_tokens.

    ``queries`` and ``keys`` are coordinates on the grid, (y, x).
    """
    y_ptrs = factors[0] + (queries[0].to(tl.int64) * position.height)[:, None] + keys[0][None, :]
    x_ptrs = factors[1] + (queries[1].to(tl.int64) * position.width)[:, None] + keys[1][None, :]
    if MASK_COLUMNS:
        mask = columns[None, :] < num_tokens
        return tl.load(y_ptrs, mask=mask, other=0.0) * tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        return tl.load(y_ptrs) * tl.load(x_ptrs)


@triton.jit
def next_tokens(tokens, step, width):
    """Grid coordinates (y, x) of the tokens ``step`` further on, without a division for each token."""
    x = tokens[1] + step % width
    wrap = x >= width
    return tokens[0] + step // width + wrap.to(tl.int32), tl.where(wrap, x - width, x)


# --- dropout ----------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_threshold(dropout_p):
    """Integer that a 31-bit random number must reach for its entry to be kept."""
    return tl.cast(dropout_p * 2147483648.0, tl.int32)


@triton.jit
def keep_mask(draw, rows, first_column, COLUMNS: tl.constexpr):
    """Which entries of the mixed map are kept: tile (len(rows), COLUMNS) from ``first_column`` on, a multiple of 4.

    ``draw`` is (philox pointer, batch * H + head, `dropout_threshold`). A pure function of seed, offset, image and
    head, row and column, the same for every tile shape: one Philox4x32-10 call with key ``seed`` and counter
    ``(column // 4, row, batch * H + head, offset)`` serves four neighbouring columns, the first output the first. Of
    the offset the low 32 bits count.
    """
    philox_ptr, batch_head, threshold = draw
    seed = tl.load(philox_ptr)
    offset = tl.load(philox_ptr + 1).to(tl.int32)
    column = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zero = rows[:, None] * 0 + column * 0
    r0, r1, r2, r3 = tl.philox(seed, zero + column, zero + rows[:, None], zero + batch_head, zero + offset)
    k0 = (r0 >> 1).to(tl.int32) >= threshold
    k1 = (r1 >> 1).to(tl.int32) >= threshold
    k2 = (r2 >> 1).to(tl.int32) >= threshold
    k3 = (r3 >> 1).to(tl.int32) >= threshold
    # join adds a last axis; flattened, the inner join's operands are two columns apart, the outer join's one.
    keep = tl.join(tl.join(k0.to(tl.int8), k2.to(tl.int8)), tl.join(k1.to(tl.int8), k3.to(tl.int8)))
    return tl.reshape(keep, [rows.shape[0], COLUMNS]) != 0
