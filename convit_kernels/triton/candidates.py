"""The launch configurations worth trying for each kernel: chosen among by compiling, and by `tune` measured."""

from __future__ import annotations

from collections.abc import Iterable

from .configs import Config

# Rows x columns x warps for 16-bit elements and for float32. The best first, by a model of time: more rows a program
# mean less traffic from L2 and fewer instructions, until registers run out.
TILES = {
    ("forward", 2): "128x32x8 128x64x8 64x32x4 64x64x4 64x32x8 32x32x8 32x32x4 32x16x4 16x16x4 16x16x8",
    ("forward", 4): "64x32x8 32x32x8 32x32x4 32x16x4 32x16x8 16x16x4 16x16x8",
    ("backward_q", 2): "128x32x8 64x32x4 64x16x4 64x16x8 32x32x4 16x64x4 32x16x4 16x32x8 16x16x4 16x16x8",
    ("backward_q", 4): "64x64x8 64x32x8 32x64x8 32x32x8 32x32x4 32x16x8 16x32x8 16x16x8 16x16x4",
    ("backward_kv", 2): "32x128x8 32x64x4 32x64x8 32x32x4 32x32x8 16x32x4 16x32x8 16x16x4 16x16x8",
    ("backward_kv", 4): "32x64x8 32x32x8 16x64x8 16x32x8 16x32x4 16x16x4 16x16x8",
    ("backward_position", 2): "64x64x4 128x64x8 64x32x4 64x64x8 32x32x4 32x32x8 16x32x4",
    ("backward_position", 4): "64x64x8 64x32x8 32x32x8 32x32x4 16x32x4 16x16x4 16x16x8",
}

# Multiply-accumulates of one product beyond which float32 without tensor cores spills, after minutes of compiling.
MOST_MACS = 64 * 32 * 128


def candidates(pass_name: str, itemsize: int, head_dim: int, stages: Iterable[int]) -> list[Config]:
    """The candidates of a pass with each of the numbers of ``stages``: for each number the best tile first.

    Args:
        pass_name: one of `configs.PASSES`.
        itemsize: bytes of an element: 2 or 4.
        head_dim: 1 to 256.
    """
    tiles = [tuple(map(int, tile.split("x"))) for tile in TILES[pass_name, itemsize].split()]
    return [
        Config(rows, columns, warps, num_stages)
        for num_stages in stages
        for rows, columns, warps in tiles
        if itemsize < 4 or rows * columns * head_dim <= MOST_MACS
    ]
