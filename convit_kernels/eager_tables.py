"""The relative-position tables in plain PyTorch: the ops' fallback, and what an export traces.

The functions have the signatures of the ops (schemas.py). pos_weight and the tables are float32 or float64, on any
device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMN_MULTIPLE = 16  # rows of the dense table are padded to whole tiles of the matrix units


def axis_table(linear: Tensor, quadratic: Tensor, length: int) -> Tensor:
    """(H,), (H,) -> (H, length, length): softmax over keys of linear * offset + quadratic * offset^2."""
    position = torch.arange(length, dtype=linear.dtype, device=linear.device)
    offset = position[None, :] - position[:, None]  # (query, key): key minus query
    return (offset * (linear[:, None, None] + quadratic[:, None, None] * offset)).softmax(dim=-1)


def relative_position_tables(pos_weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """pos_weight (H, 3) -> row_table (H, height, height), col_table (H, width, width); every row sums to 1."""
    along_x, along_y, squared = pos_weight.unbind(dim=1)
    return axis_table(along_y, squared, height), axis_table(along_x, squared, width)


def _axis_gradient(grad: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(H, length, length) twice -> the gradients of `axis_table`'s linear and quadratic, (H,) each in float64."""
    # in float64: thousands of terms of mixed sign are added up
    table, grad = table.double(), grad.double()
    d_logit = table * (grad - (table * grad).sum(dim=-1, keepdim=True))
    position = torch.arange(table.shape[-1], dtype=table.dtype, device=table.device)
    offset = position[None, :] - position[:, None]
    return (d_logit * offset).sum(dim=(1, 2)), (d_logit * offset.square()).sum(dim=(1, 2))


def relative_position_tables_backward(
    grad_row: Tensor, grad_col: Tensor, row_table: Tensor, col_table: Tensor
) -> Tensor:
    """The gradient of pos_weight, (H, 3) in the tables' dtype.

    Args:
        grad_row, row_table: (H, height, height), a gradient and the table that `relative_position_tables` gave.
        grad_col, col_table: (H, width, width), the same.
    """
    along_y, squared_y = _axis_gradient(grad_row, row_table)
    along_x, squared_x = _axis_gradient(grad_col, col_table)
    return torch.stack((along_x, along_y, squared_x + squared_y), dim=1).to(row_table.dtype)


def dense_position_table(pos_weight: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """pos_weight (H, 3) -> (H, N, N rounded up to a multiple of 16) in dtype, N = height * width; the padding is 0."""
    row_table, col_table = relative_position_tables(pos_weight, height, width)
    tokens = height * width
    table = row_table[:, :, None, :, None] * col_table[:, None, :, None, :]  # (H, query y, query x, key y, key x)
    table = table.reshape(-1, tokens, tokens)
    return F.pad(table, (0, -tokens % COLUMN_MULTIPLE)).to(dtype)
