"""The patch grid: which positions a sequence of tokens stands for."""

import math
from collections.abc import Sequence

import torch

GridSize = int | Sequence[int] | None

_MAX_AXES = 3
_INTS = (int, torch.SymInt)


def parse_grid(grid_size: int | Sequence[int]) -> tuple[int, ...]:
    """The sides of what a user passed: one to three of them, or one number for a square grid.

    Raises:
        TypeError: grid_size is neither an int nor one to three ints.
        ValueError: a side is smaller than 1.
    """
    if type(grid_size) is int and grid_size > 0:  # the usual, at once: this is asked at every call
        return grid_size, grid_size
    sides = (grid_size, grid_size) if isinstance(grid_size, _INTS) else grid_size
    if (
        isinstance(grid_size, (bool, str))
        or not isinstance(sides, Sequence)
        or not 1 <= len(sides) <= _MAX_AXES
        or not all(isinstance(side, _INTS) and not isinstance(side, bool) for side in sides)
    ):
        raise TypeError(
            "grid_size must be an int for a square, (tokens,), (height, width) or (depth, height, width), "
            f"but is {grid_size!r}"
        )
    if min(sides) < 1:
        raise ValueError(f"grid_size must have sides of at least 1, but is {grid_size!r}")
    return tuple(sides)


def parse_plane(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width), for what knows two axes only.

    Raises:
        TypeError: grid_size is neither an int nor a pair of ints.
        ValueError: a side is smaller than 1.
    """
    sides = parse_grid(grid_size)
    if len(sides) != 2:
        raise TypeError(f"grid_size must be an int or a pair of ints (height, width) here, but is {grid_size!r}")
    return sides


def resolve_grid(grid_size: GridSize, num_tokens: int) -> tuple[int, ...]:
    """The grid of num_tokens tokens in row-major order; None means a square one.

    Raises:
        TypeError: grid_size is neither None, an int nor one to three ints.
        ValueError: the grid does not have num_tokens tokens, or none was given and num_tokens is no square.
    """
    sides = None if grid_size is None else parse_grid(grid_size)
    return fitted_grid(sides, num_tokens)


def fitted_grid(sides: tuple[int, ...] | None, num_tokens: int) -> tuple[int, ...]:
    """The same from sides that `parse_grid` gave."""
    if isinstance(num_tokens, torch.Tensor):  # as torch.jit.trace has it, whose program is for one grid
        num_tokens = int(num_tokens)
    if sides is None:
        side = math.trunc(num_tokens**0.5)  # math.isqrt would fix a number that is symbolic
        if side * side != num_tokens or side == 0:
            raise ValueError(
                f"{num_tokens} tokens form no square grid: "
                f"pass grid_size=(height, width) with height * width == {num_tokens}"
            )
        return side, side
    if math.prod(sides) != num_tokens:
        raise ValueError(f"grid_size {sides} has {math.prod(sides)} tokens, but the input has {num_tokens}")
    return sides
