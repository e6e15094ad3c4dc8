"""Holds a backend to float64 on the machine at hand: every dtype, regime, odd shape and gradient.

The rule is flash-attention's: our error may be at most twice that of the eager reference layer in the same dtype, plus
rounding of the result.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import gpsa_attention

NAMES = ("out", "dq", "dk", "dv", "d_pos_weight", "d_gate")


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


def eager_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor, grid: tuple[int, int]) -> Tensor:
    """The attention of the reference layer, in the inputs' own dtype."""
    token = torch.arange(grid[0] * grid[1], device=q.device)
    dx = (token % grid[1])[None, :] - (token % grid[1])[:, None]
    dy = (token // grid[1])[None, :] - (token // grid[1])[:, None]
    features = torch.stack((dx, dy, dx**2 + dy**2), dim=-1).to(q.dtype)
    position = torch.nn.functional.linear(features, weight.to(q.dtype)).permute(2, 0, 1).softmax(dim=-1)
    content = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    g = torch.sigmoid(gate.to(q.dtype)).view(-1, 1, 1)
    out: Tensor = ((1 - g) * content + g * position) @ v
    return out


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def check(case: Case, backend: str, device: str) -> dict[str, Any]:
    """The largest error of each result as a share of what is allowed, and whether all stay below 1."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens = 2, 3, case.grid[0] * case.grid[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device)

    q, k, v, d_out = (normal(batch, tokens, heads, case.head_dim).transpose(1, 2) for _ in range(4))
    weight = normal(heads, 3).float() * torch.tensor([0.5, 0.5, 0.2], device=device)
    gate = normal(heads).float() if case.gate is None else torch.full((heads,), case.gate, device=device)
    inputs = [q, k, v, weight, gate]

    def eager(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return eager_attention(q, k, v, weight, gate, case.grid)

    exact = _gradients(eager, [tensor.double() for tensor in inputs], d_out.double())
    theirs = _gradients(eager, inputs, d_out)
    ours = _gradients(lambda *args: gpsa_attention(*args, grid_size=case.grid, backend=backend), inputs, d_out)
    # what cancels to zero is zero up to rounding of its terms
    terms = ((d_out * v).abs().sum(dim=-1).max() * k.abs().max().clamp(min=1)).item() if tokens == 1 else 0.0
    # sums over all images and queries may each round in another order than eager's
    sums = torch.finfo(torch.float32).eps * (batch * tokens) ** 0.5 * (d_out.norm(dim=-1) * v.norm(dim=-1)).max().item()
    shares = {}
    for name, mine, other, truth in zip(NAMES, ours, theirs, exact, strict=True):
        # torch's own fused attention, too, takes a few roundings more than eager in float32
        rounding = torch.finfo(case.dtype).eps * (4 if case.dtype == torch.float32 else 1)
        allowed = 2 * (other.double() - truth).abs().max() + rounding * (truth.abs().max() + terms * batch)
        allowed += sums if name in ("d_pos_weight", "d_gate") else 0.0
        error = (mine.double() - truth).abs().max()
        shares[name] = (error / allowed).item() if torch.isfinite(error) and allowed > 0 else float(error != 0) * 1e9
    return {"case": str(case), "shares": shares, "passed": max(shares.values()) <= 1}


def run(backend: str, device: str, interpreted: bool) -> Iterator[dict[str, Any]]:
    """`check` of every case, one after the other."""
    for case in cases(interpreted):
        try:
            yield check(case, backend, device)
        except Exception as error:  # a kernel that does not compile or launch is a result too
            yield {"case": str(case), "shares": {}, "passed": False, "error": f"{type(error).__name__}: {error}"}
