"""Inputs of the attention in every layout, and results held to `convit_kernels.equivalence`."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from convit_kernels import equivalence
from convit_kernels.equivalence import NAMES, Expected, expected_attention


class Inputs(NamedTuple):
    """What gpsa_attention takes, and the gradient that comes back into it."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(tensor.detach().to(dtype) for tensor in self))


def sliced(*shape: int) -> Tensor:
    """Normal values as a strided slice of a larger tensor, (B, N, H, D) in memory as a linear layer leaves it."""
    batch, heads, tokens, head_dim = shape
    wide = torch.randn(batch, tokens + 1, heads + 1, head_dim + 3, dtype=torch.float64)
    return wide[:, 1:, 1:, 1 : head_dim + 1].transpose(1, 2)


def make_inputs(
    batch: int,
    heads: int,
    grid: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    gate: float | None = None,
    logits: float = 1.0,
) -> Inputs:
    """Inputs whose float64 values are exactly representable in dtype; gates and positions differ by head."""
    tokens = grid[0] * grid[1]
    shape = (batch, heads, tokens, head_dim)
    pos_weight = torch.randn(heads, 3, dtype=torch.float64) * torch.tensor([0.5, 0.5, 0.2], dtype=torch.float64)
    gates = torch.randn(heads, dtype=torch.float64) if gate is None else torch.full((heads,), gate, dtype=torch.float64)
    q, k, v, grad = (sliced(*shape) for _ in range(4))
    exact = Inputs(q * logits, k, v, pos_weight, gates, grad)
    return exact.to(dtype)


@cache
def _problem(
    seed: int,
    scale: float | None,
    forward_only: bool,
    recomputed: bool,
    draws: int,
    options: tuple[tuple[str, object], ...],
) -> tuple[Inputs, dict[str, Expected]]:
    torch.manual_seed(seed)
    inputs = make_inputs(**dict(options))
    d_out = None if forward_only else inputs.grad
    rule = expected_attention(
        *inputs[:5], d_out, dict(options)["grid"], scale=scale, recomputed=recomputed, draws=draws
    )
    return inputs, rule


def problem(
    scale: float | None = None,
    forward_only: bool = False,
    recomputed: bool = False,
    draws: int = equivalence.DRAWS,
    **options,
) -> tuple[Inputs, dict[str, Expected]]:
    """`make_inputs(**options)` of the test's seed and what they must give: found once for all backends."""
    return _problem(torch.initial_seed(), scale, forward_only, recomputed, draws, tuple(sorted(options.items())))


def eager_attention(inputs: Inputs, grid: tuple[int, int], scale: float) -> Tensor:
    """The attention of the reference layer on a grid."""
    return equivalence.eager_attention(*inputs[:5], equivalence.relative_indices(grid, inputs.q), scale)


def with_gradients(function: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    """The output, then the gradients of q, k, v, pos_weight and gate."""
    results = equivalence.with_gradients(
        lambda *leaves: function(Inputs(*leaves, inputs.grad)), inputs[:5], inputs.grad
    )
    return list(results.values())


# of each result the largest error so far, as a part of what is allowed, and the test where it was
shares: dict[str, tuple[float, str]] = {}


def assert_as_exact(found: Sequence[Tensor] | Mapping[str, Tensor], expected: Mapping[str, Expected]) -> None:
    """Holds each result to the rule of `convit_kernels.equivalence`; a sequence is in the order of its NAMES."""
    named = found if isinstance(found, Mapping) else dict(zip(NAMES, found, strict=False))
    assert named.keys() <= expected.keys()
    for name, result in named.items():
        share, allowed = expected[name].share(result), expected[name].allowed
        shares[name] = max((share, os.environ.get("PYTEST_CURRENT_TEST", "")), shares.get(name, (0.0, "")))
        assert result.shape == expected[name].exact.shape, name
        assert share <= 1, f"{name}: error {expected[name].error(result):.3e}, allowed {allowed:.3e} in {result.dtype}"
