"""Pieces that the forward and the backward kernels share.

Conventions of every kernel here:

* The softmax works in base 2: logits are multiplied by ``scale * log2(e)``. What leaves a kernel (``lse``) is a natural
  logarithm.
* Products accumulate in float32. Operands stay in the compute dtype, the dtype of q, k and v.
* A head_dim is cut into at most two column blocks, each a power of two of at least 16 (48 = 32 + 16, 80 = 64 + 16),
  because a tile's side must be a power of two and padding 48 to 64 would waste a quarter of the products. Every tensor
  with a head_dim is therefore a pair ``x0, x1`` in the kernels; where ``HEAD1 == 0`` the second is an unused stand-in
  that the compiler removes.
* Offsets along the batch, the heads and the rows are 64 bits wide.

Arguments have the same names in all of them. B images, H heads, N = height * width tokens, D channels a head:

    q_ptr, k_ptr, v_ptr, do_ptr          (B, H, N, D) in the compute dtype; do is the gradient of out
    out_ptr, content_ptr                 (B, H, N, D), the result and the content's own part C V
    dq_ptr, dk_ptr, dv_ptr               (B, H, N, D), the gradients
    stride_qb, stride_qh, stride_qn      of q: elements from one image, head, token to the next; the last stride is 1.
                                         So with k, v, o (out, content), do, c (content in the backward), dq, dk, dv
    gate_ptr, pos_weight_ptr             (H,) before the sigmoid, and (H, 3); float32
    table_ptr, stride_table              (H, N, padded(N)) P in the compute dtype, and padded(N); where DENSE
    row_table_ptr, col_table_ptr         (H, height, height), (H, width, width) the factors in float32; where not DENSE
    lse_ptr                              (B, H, N) float32, the content's log-sum-exp
    row_lse_ptr, row_dc_ptr,             (H, B, num_rows) float32, from `backward_q_kernel` for the kernels after it;
    row_factor_ptr                       num_rows is N rounded up to whole blocks of queries
    philox_ptr                           (2,) int64, seed and offset of the dropout; where DROPOUT
    partial_ptr                          (H, 4, programs x BLOCK_M) float32, sums that `backward_reduce_kernel` adds up
    scale, logit_scale                   of the content logits; times log2(e)
    dropout_p                            probability that an entry of the mixed map is dropped
    batch_size, num_heads, num_tokens    B, H, N

    HEAD_DIM, HEAD0, HEAD1               D and its two column blocks
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
softmax; ``c0, c1`` and ``p0, p1`` (BLOCK_M, D), the accumulators of content and position; ``content`` and ``position``,
the shares 1 - g and g of a head.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# The running maximum starts at a finite number: a tile whose logits are all -inf then leaves exp2(0) = 1, not NaN, as
# correction.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)

MAX_HEAD_DIM = 256


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Column blocks ``(HEAD0, HEAD1)`` of a head_dim: powers of two of at least 16, or ``HEAD1 = 0``, with the smallest
    sum >= head_dim.

    48 -> (32, 16), 64 -> (64, 0), 80 -> (64, 16), 96 -> (64, 32). Where the sum is larger than head_dim, the kernels
    mask the rest.

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
    return power, 0


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


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    ptr,
    rows,
    stride,
    num_rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Tile ``(len(rows), WIDTH)`` from column FIRST on of a matrix with HEAD_DIM columns; what lies outside is zero.

    ``rows`` must lie inside the matrix unless MASK_ROWS.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return load_ptrs(ptrs, rows, num_rows, FIRST, WIDTH, HEAD_DIM, MASK_ROWS)


@triton.jit
def pair_ptrs(ptr, rows, stride, HEAD0: tl.constexpr, HEAD1: tl.constexpr):
    """Pointers of both column blocks of the given rows, to be moved on from tile to tile: cheaper in a loop than
    `load_pair`.
    """
    row_ptrs = ptr + rows.to(tl.int64)[:, None] * stride
    x0 = row_ptrs + tl.arange(0, HEAD0)[None, :]
    if HEAD1 > 0:
        x1 = row_ptrs + (HEAD0 + tl.arange(0, HEAD1))[None, :]
    else:
        x1 = x0
    return x0, x1


@triton.jit
def load_ptrs(
    ptrs, rows, num_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Tile at the given pointers, with the mask of `load_rows`."""
    columns = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > HEAD_DIM:
        mask = columns[None, :] < HEAD_DIM
        if MASK_ROWS:
            mask = mask & (rows[:, None] < num_rows)
        return tl.load(ptrs, mask=mask, other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < num_rows, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_pair_at(
    ptrs0,
    ptrs1,
    rows,
    num_rows,
    HEAD_DIM: tl.constexpr,
    HEAD0: tl.constexpr,
    HEAD1: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Both column blocks at the pointers of `pair_ptrs`."""
    x0 = load_ptrs(ptrs0, rows, num_rows, 0, HEAD0, HEAD_DIM, MASK_ROWS)
    if HEAD1 > 0:
        x1 = load_ptrs(ptrs1, rows, num_rows, HEAD0, HEAD1, HEAD_DIM, MASK_ROWS)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def load_pair(
    ptr,
    rows,
    stride,
    num_rows,
    HEAD_DIM: tl.constexpr,
    HEAD0: tl.constexpr,
    HEAD1: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Both column blocks of the given rows."""
    x0 = load_rows(ptr, rows, stride, num_rows, 0, HEAD0, HEAD_DIM, MASK_ROWS)
    if HEAD1 > 0:
        x1 = load_rows(ptr, rows, stride, num_rows, HEAD0, HEAD1, HEAD_DIM, MASK_ROWS)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def store_rows(ptr, rows, stride, num_rows, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store a tile at column FIRST of a matrix with HEAD_DIM columns, rounded to the matrix's dtype."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = rows[:, None] < num_rows
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns[None, :] < HEAD_DIM)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_pair(ptr, rows, stride, num_rows, x0, x1, HEAD_DIM: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr):
    """Store both column blocks of the given rows."""
    store_rows(ptr, rows, stride, num_rows, x0, 0, HEAD0, HEAD_DIM)
    if HEAD1 > 0:
        store_rows(ptr, rows, stride, num_rows, x1, HEAD0, HEAD1, HEAD_DIM)


# --- products over or into the head_dim -------------------------------------------------------------------------------


@triton.jit
def inner(a0, a1, b0, b1, HEAD1: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T``, the product over the head_dim: (M, D), (N, D) -> (M, N) in float32."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if HEAD1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(a, b0, b1, c0, c1, HEAD1: tl.constexpr, PRECISION: tl.constexpr):
    """``c + a b``: (M, N), (N, D), (M, D) -> (M, D) in float32. ``a`` has the dtype of b."""
    c0 = tl.dot(a, b0, c0, input_precision=PRECISION)
    if HEAD1 > 0:
        c1 = tl.dot(a, b1, c1, input_precision=PRECISION)
    return c0, c1


@triton.jit
def zeros_pair(ROWS: tl.constexpr, HEAD0: tl.constexpr, HEAD1: tl.constexpr):
    """A float32 accumulator (ROWS, head_dim) of zeros."""
    x0 = tl.zeros([ROWS, HEAD0], tl.float32)
    if HEAD1 > 0:
        x1 = tl.zeros([ROWS, HEAD1], tl.float32)
    else:
        x1 = 0.0
    return x0, x1


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
def factored_position(
    row_table_ptr,
    col_table_ptr,
    row_y,
    row_x,
    col_y,
    col_x,
    columns,
    num_tokens,
    height,
    width,
    MASK_COLUMNS: tl.constexpr,
):
    """Tile of the position map from one head's factors, ``Py[row_y, col_y] * Px[row_x, col_x]`` in float32; zero for
    columns >= num_tokens.
    """
    y_ptrs = row_table_ptr + (row_y.to(tl.int64) * height)[:, None] + col_y[None, :]
    x_ptrs = col_table_ptr + (row_x.to(tl.int64) * width)[:, None] + col_x[None, :]
    if MASK_COLUMNS:
        mask = columns[None, :] < num_tokens
        return tl.load(y_ptrs, mask=mask, other=0.0) * tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        return tl.load(y_ptrs) * tl.load(x_ptrs)


@triton.jit
def next_tile(y, x, step, width):
    """Grid coordinates of the tokens ``step`` further on, without a division for each token."""
    x = x + step % width
    wrap = x >= width
    return y + step // width + wrap.to(tl.int32), tl.where(wrap, x - width, x)


# --- dropout ----------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_threshold(dropout_p):
    """Integer that a 31-bit random number must reach for its entry to be kept."""
    return tl.cast(dropout_p * 2147483648.0, tl.int32)


@triton.jit
def keep_mask(philox_ptr, batch_head, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Which entries of the mixed map are kept: tile (len(rows), COLUMNS) from ``first_column`` on, a multiple of 4.

    A pure function of seed, offset, image and head, row and column, the same for every tile shape: one Philox4x32-10
    call with key ``seed`` and counter ``(column // 4, row, batch * H + head, offset)`` serves four neighbouring
    columns, the first output the first. ``philox_ptr`` points at two int64, seed and offset (its low 32 bits count), on
    the device: no synchronisation with the host.
    """
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
