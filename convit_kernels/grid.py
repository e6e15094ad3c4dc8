"""The patch grid: how many rows and columns a sequence of tokens stands for."""

import math
from collections.abc import Sequence

import torch

GridSize = int | Sequence[int] | None


def parse_grid(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of what a user passed: a pair, or one number for a square grid.

    Raises:
        TypeError: grid_size is neither an int nor a pair of ints.
        ValueError: a side is smaller than 1.
    """
    whole = (int, torch.SymInt)  # symbolic where a program for several sizes is made
    pair = (grid_size, grid_size) if isinstance(grid_size, whole) else grid_size
    if (
        isinstance(grid_size, (bool, str))
        or not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(isinstance(side, whole) and not isinstance(side, bool) for side in pair)
    ):
        raise TypeError(f"grid_size must be an int or a pair of ints (height, width), but is {grid_size!r}")
    height, width = pair
    if height < 1 or width < 1:
        raise ValueError(f"grid_size must have sides of at least 1, but is {grid_size!r}")
    return height, width


def resolve_grid(grid_size: GridSize, num_tokens: int) -> tuple[int, int]:
    """The grid (height, width) of num_tokens tokens in row-major order; None means a square one.

    Raises:
        TypeError: grid_size is neither None, an int nor a pair of ints.
        ValueError: the grid does not have num_tokens tokens, or none was given and num_tokens is no square.
    """
    if isinstance(num_tokens, torch.Tensor):  # as torch.jit.trace has it, whose program is for one grid
        num_tokens = int(num_tokens)
    if grid_size is None:
        side = math.trunc(num_tokens**0.5)  # math.isqrt would fix a number that is symbolic
        if side * side != num_tokens or side == 0:
            raise ValueError(
                f"{num_tokens} tokens form no square grid: "
                f"pass grid_size=(height, width) with height * width == {num_tokens}"
            )
        return side, side
    height, width = parse_grid(grid_size)
    if height * width != num_tokens:
        raise ValueError(f"grid_size ({height}, {width}) has {height * width} tokens, but the input has {num_tokens}")
    return height, width
