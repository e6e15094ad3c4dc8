"""The package's torch.library ops: schemas, fallback kernels, fake kernels and autograd formulas.

The native libraries register kernels for the CPU and CUDA dispatch keys against the same schemas; where there is none,
torch's dispatcher finds the fallback in plain PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from . import (
    eager_tables,
    extension,  # noqa: F401  (loading it registers the native kernels)
)
from .schemas import SCHEMAS

NAMESPACE = "convit_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(eager_tables, _name), "CompositeExplicitAutograd")

relative_position_tables = torch.ops.convit_kernels.relative_position_tables.default
relative_position_tables_backward = torch.ops.convit_kernels.relative_position_tables_backward.default
dense_position_table = torch.ops.convit_kernels.dense_position_table.default


def _tables_fake(pos_weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    heads = pos_weight.shape[0]
    return pos_weight.new_empty(heads, height, height), pos_weight.new_empty(heads, width, width)


def _tables_backward_fake(grad_row: Tensor, grad_col: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    return row_table.new_empty(row_table.shape[0], 3)


def _dense_fake(pos_weight: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    tokens = height * width
    columns = tokens + -tokens % eager_tables.COLUMN_MULTIPLE
    return pos_weight.new_empty(pos_weight.shape[0], tokens, columns, dtype=dtype)


for _name, _fake in (
    ("relative_position_tables", _tables_fake),
    ("relative_position_tables_backward", _tables_backward_fake),
    ("dense_position_table", _dense_fake),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


def _tables_gradient(grad_row: Tensor, grad_col: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    # a second derivative needs a formula that autograd can follow
    twice = torch.is_grad_enabled() and any(t.requires_grad for t in (grad_row, grad_col, row_table, col_table))
    function = eager_tables.relative_position_tables_backward if twice else relative_position_tables_backward
    return function(grad_row, grad_col, row_table, col_table)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)


def _tables_vjp(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor, None, None]:
    return _tables_gradient(grad_row, grad_col, *ctx.saved_tensors), None, None


torch.library.register_autograd(
    f"{NAMESPACE}::relative_position_tables", _tables_vjp, setup_context=_save_tables, lib=_library
)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pos_weight, ctx.height, ctx.width, _ = inputs
    ctx.save_for_backward(pos_weight)


def _dense_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (pos_weight,) = ctx.saved_tensors
    height, width = ctx.height, ctx.width
    row_table, col_table = relative_position_tables(pos_weight, height, width)
    grad = grad[..., : height * width].to(row_table.dtype).reshape(-1, height, width, height, width)
    grad_row = torch.einsum("hyxuw,hxw->hyu", grad, col_table)
    grad_col = torch.einsum("hyxuw,hyu->hxw", grad, row_table)
    return _tables_gradient(grad_row, grad_col, row_table, col_table), None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::dense_position_table", _dense_vjp, setup_context=_save_weight, lib=_library
)
