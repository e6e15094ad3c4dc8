"""Positional embeddings for another grid than they were made for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import exporting


def _along(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old) float32: the antialiased bicubic filter of one axis, as timm resamples."""
    eye = torch.eye(old, dtype=torch.float32, device=like.device)[None, None]
    return F.interpolate(eye, size=(new, old), mode="bicubic", antialias=True)[0, 0]


def resample_position(pos_embed: Tensor, made_for: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(1, N, C), N = height * width of made_for, to that of another grid, as timm's `resample_abs_pos_embed` does.

    By one product an axis: torch (2.14) cannot compile the gradient of its interpolation for sizes that change.
    """
    # a program that is exported for any grid must not be one for this grid alone
    if not exporting() and tuple(grid) == tuple(made_for):
        return pos_embed
    (rows, columns), (height, width) = made_for, grid
    by_row = pos_embed.float().reshape(rows, -1)  # (rows, columns * C)
    resized = (_along(rows, height, pos_embed) @ by_row).reshape(height, columns, -1)  # (height, columns, C)
    resized = _along(columns, width, pos_embed) @ resized  # (height, width, C)
    return resized.reshape(1, height * width, -1).to(pos_embed.dtype)
