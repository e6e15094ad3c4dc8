"""Holds a backend to float64 on the machine at hand: every dtype, regime, odd shape and gradient."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import gpsa_attention
from .equivalence import expected_attention, with_gradients

LARGE = 1024  # tokens beyond which one image and two simulations do


class Case(NamedTuple):
    """One call: dtype, grid, head_dim, gate (None: a different one for each head)."""

    dtype: torch.dtype
    grid: tuple[int, int]
    head_dim: int
    gate: float | None = None

    def __str__(self) -> str:
        gate = "" if self.gate is None else f", gate {self.gate:g}"
        return f"{str(self.dtype)[6:]} {self.grid[0]}x{self.grid[1]} D={self.head_dim}{gate}"


def cases(interpreted: bool) -> list[Case]:
    """What is checked. Interpreted: small shapes, and no bfloat16, whose products Triton's interpreter gets wrong."""
    if interpreted:
        return [Case(*c) for c in itertools.product((torch.float32, torch.float16), ((3, 5), (2, 8)), (16, 48))]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    shapes = (
        ((1, 1), 48),
        ((3, 5), 16),
        ((14, 14), 48),
        ((8, 18), 64),
        ((17, 31), 80),
        ((14, 14), 128),
        ((64, 64), 48),
    )
    ordinary = [Case(dtype, *shape) for dtype, shape in itertools.product(dtypes, shapes)]
    return ordinary + [Case(dtype, (14, 14), 48, gate) for dtype, gate in itertools.product(dtypes, (-40.0, 40.0))]


def check(case: Case, backend: str, device: str) -> dict[str, Any]:
    """The largest error of each result as a share of what is allowed, and whether all stay below 1."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads = case.grid[0] * case.grid[1], 3
    batch, draws = (1, 2) if tokens > LARGE else (2, 4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    q, k, v, d_out = (normal(batch, tokens, heads, case.head_dim).transpose(1, 2) for _ in range(4))
    weight = normal(heads, 3).float() * torch.tensor([0.5, 0.5, 0.2], device=device)
    gate = normal(heads).float() if case.gate is None else torch.full((heads,), case.gate, device=device)
    inputs = (q, k, v, weight, gate)
    expected = expected_attention(q, k, v, weight, gate, d_out, case.grid, draws=draws)
    found = with_gradients(lambda *leaves: gpsa_attention(*leaves, grid_size=case.grid, backend=backend), inputs, d_out)
    shares = {name: expected[name].share(result) for name, result in found.items()}
    return {"case": str(case), "shares": shares, "passed": max(shares.values()) <= 1}


def run(backend: str, device: str, interpreted: bool) -> Iterator[dict[str, Any]]:
    """`check` of every case, one after the other."""
    for case in cases(interpreted):
        try:
            yield check(case, backend, device)
        except Exception as error:  # a kernel that does not compile or launch is a result too
            yield {"case": str(case), "shares": {}, "passed": False, "error": f"{type(error).__name__}: {error}"}
