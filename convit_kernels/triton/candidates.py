"""The launch configurations worth trying for each kernel: `choose` compiles them, `tune` measures them."""

from __future__ import annotations

from .configs import Config

# Rows x columns x warps for 16-bit elements and for float32. The best first, by the model of time: more rows a program
# mean less traffic from L2 and fewer instructions, until registers run out.
LADDERS = {
    ("forward", 2): "128x32x8 128x64x8 64x32x4 64x32x8 32x32x8 32x32x4 32x16x4 16x16x4 16x16x8",
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


def ladder(pass_name: str, itemsize: int, head_dim: int, num_stages: int = 2) -> list[Config]:
    """The candidates of a pass for a head_dim and a dtype of ``itemsize`` bytes, the best first."""
    tiles = LADDERS[pass_name, itemsize].split()
    found = [Config(*map(int, f"{tile}x{num_stages}".split("x"))) for tile in tiles]
    return [one for one in found if itemsize < 4 or one.block_m * one.block_n * head_dim <= MOST_MACS]
