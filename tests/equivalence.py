"""When two results count as equal: design after flash-attention's rule, which scales itself with dtype and size.

Our error against float64 may be at most twice that of the eager reference layer in the same dtype, plus a floor for the
rounding of the result itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv", "d_pos_weight", "d_gate")


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


def eager_attention(inputs: Inputs, grid: tuple[int, int], scale: float) -> Tensor:
    """The attention part of the reference layer, operation by operation in the inputs' own dtype, batch-wide tables."""
    q, k, v, pos_weight, gate, _ = inputs
    height, width = grid
    token = torch.arange(height * width)
    dx = (token % width)[None, :] - (token % width)[:, None]
    dy = (token // width)[None, :] - (token // width)[:, None]
    features = torch.stack((dx, dy, dx**2 + dy**2), dim=-1).to(q.dtype).expand(q.shape[0], -1, -1, -1)
    position = torch.nn.functional.linear(features, pos_weight).permute(0, 3, 1, 2).softmax(dim=-1)
    content = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    g = torch.sigmoid(gate).view(1, -1, 1, 1)
    mixed = (1 - g) * content + g * position
    return (mixed / mixed.sum(dim=-1, keepdim=True)) @ v


def with_gradients(function, inputs: Inputs) -> list[Tensor]:
    """The output, then the gradients of q, k, v, pos_weight and gate."""
    leaves = Inputs(*(tensor.detach().requires_grad_() for tensor in inputs[:5]), inputs.grad)
    out = function(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves[:5], inputs.grad)]


def rounding_floor(exact: Tensor, dtype: torch.dtype) -> float:
    reference = exact.to(dtype)
    return 2 * ((reference + 0.3 - 0.3) - reference).abs().max().item() if reference.numel() else 0.0


def assert_as_exact(
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    cancelling: float = 0.0,
    rounds: float = 0.0,
) -> None:
    """Holds each of our results to the rule above.

    `cancelling` is the size of terms that add up to an exact zero, where eager's error is zero by luck: with one token
    the softmax is constant and most gradients vanish. Rounding of those terms is then allowed for. `rounds` allows an
    error of that many roundings of the result's largest value.
    """
    for name, mine, theirs, truth in zip(NAMES, ours, eager, exact, strict=False):
        assert mine.shape == truth.shape, name
        assert torch.isfinite(mine).all(), f"{name} is not finite"
        error = (mine.double() - truth).abs().max().item()
        allowed = 2 * (theirs.double() - truth).abs().max().item() + rounding_floor(truth, mine.dtype)
        allowed += 2 * torch.finfo(mine.dtype).eps * cancelling
        allowed += rounds * torch.finfo(mine.dtype).eps * truth.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} in {mine.dtype}"
