"""The relative-position tables: the positional attention of GPSA as two small factors for each head.

The positional logit of ConViT (arXiv 2103.10697, equations 5 and 7) is w0*dx + w1*dy + w2*(dx^2 + dy^2): a term in x
plus a term in y. Over a full grid its softmax is therefore exactly the product of one along y and one along x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import eager_tables, ops
from .grid import parse_plane


def _checked_weight(pos_weight: Tensor) -> Tensor:
    """pos_weight in the dtype the tables are computed in: float64 as it is, every other one as float32."""
    if not isinstance(pos_weight, Tensor):
        raise TypeError(f"pos_weight must be a tensor, but is a {type(pos_weight).__name__}")
    if not pos_weight.is_floating_point():
        raise TypeError(f"pos_weight must have a floating-point dtype, but has {pos_weight.dtype}")
    if pos_weight.layout is not torch.strided:
        raise TypeError(f"pos_weight must be a dense tensor, but is {pos_weight.layout}: pass pos_weight.to_dense()")
    if pos_weight.dim() != 2 or pos_weight.shape[1] != 3:
        raise ValueError(f"pos_weight must have shape (heads, 3), but has {tuple(pos_weight.shape)}")
    return pos_weight if pos_weight.dtype == torch.float64 else pos_weight.float()


def axis_tables(pos_weight: Tensor, grid: tuple[int, ...], spacing: tuple[float, ...]) -> list[Tensor]:
    """One factor of the positional attention for each side of any grid, (heads, side, side), in plain PyTorch.

    Args:
        pos_weight: (heads, axes + 1) in float32 or float64: of the offsets, the last axis first, and of the squared
            distance.
        grid: the sides. spacing: the distance between neighbours along each.
    """
    *linear, squared = pos_weight.unbind(dim=1)
    return [
        eager_tables.axis_table(weight * step, squared * step**2, side)
        for weight, step, side in zip(reversed(linear), spacing, grid, strict=True)
    ]


def relative_position_tables(pos_weight: Tensor, grid_size: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Factors of the positional attention: P[(yi,xi),(yj,xj)] = row_table[yi,yj] * col_table[xi,xj].

    Args:
        pos_weight: (heads, 3), the weights of (dx, dy, dx^2 + dy^2): the reference layer's `pos_proj.weight`.
        grid_size: (height, width) of the patch grid, or one int for a square one.

    Returns:
        row_table (heads, height, height) and col_table (heads, width, width), float64 for a float64 weight, else
        float32. Every row sums to 1. Differentiable any number of times, forwards too, and under torch.func.

    Raises:
        TypeError: pos_weight is no dense floating-point tensor, or grid_size is no int or pair of ints.
        ValueError: pos_weight is not (heads, 3), or a side of the grid is smaller than 1.
    """
    height, width = parse_plane(grid_size)
    pos_weight = _checked_weight(pos_weight)
    plain = ops.exporting() or ops.why_not(pos_weight)
    function = eager_tables.relative_position_tables if plain else ops.relative_position_tables
    row_table, col_table = function(pos_weight, height, width)
    return row_table, col_table


def dense_position_table(
    pos_weight: Tensor, grid_size: int | Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The positional attention itself, (heads, N, N padded to a multiple of 16 with zeros), N = height * width.

    Args:
        pos_weight: (heads, 3), as for `relative_position_tables`.
        grid_size: (height, width) of the patch grid, or one int for a square one.
        dtype: float32, float16 or bfloat16; the arithmetic is done in pos_weight's own precision.

    Raises:
        TypeError: pos_weight is no dense floating-point tensor, grid_size no int or pair of ints, or dtype another one.
        ValueError: pos_weight is not (heads, 3), or a side of the grid is smaller than 1.
    """
    height, width = parse_plane(grid_size)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the dense table's dtype must be float32, float16 or bfloat16, but is {dtype}")
    pos_weight = _checked_weight(pos_weight)
    function = eager_tables.dense_position_table if ops.why_not(pos_weight) else ops.dense_position_table
    table: Tensor = function(pos_weight, height, width, dtype)
    return table
