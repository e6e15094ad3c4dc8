"""A backend held to float64 on this machine, case by case: every dtype, regime, odd shape and gradient."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import backends, gpsa_attention, why_not
from ..equivalence import expected_attention, with_gradients
from ..inputs import Inputs, checked

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

    def inputs(self, device: str) -> tuple[Inputs, Tensor]:
        """Of three heads, and the gradient of the output, (B, H, N, D)."""
        generator = torch.Generator().manual_seed(0)
        tokens, heads = self.grid[0] * self.grid[1], 3
        batch = 1 if tokens > LARGE else 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(device)

        q, k, v, d_out = (normal(batch, tokens, heads, self.head_dim).transpose(1, 2) for _ in range(4))
        weight = normal(heads, 3).float() * torch.tensor([0.5, 0.5, 0.2], device=device)
        gate = normal(heads).float() if self.gate is None else torch.full((heads,), self.gate, device=device)
        return checked(q, k, v, weight, gate, self.grid, None, 0.0), d_out


@dataclass
class Outcome:
    """Of a case: each result's error as a share of what is allowed, or why there is none."""

    case: Case
    shares: dict[str, float] = field(default_factory=dict)
    cannot_run: str = ""  # the backend's own reason
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or any(not share <= 1 for share in self.shares.values())

    def to_json(self) -> dict[str, Any]:
        passed = None if self.cannot_run else not self.failed
        reasons = {name: text for name in ("cannot_run", "error") if (text := getattr(self, name))}
        return {"case": str(self.case), "shares": self.shares, "passed": passed} | reasons


def cases(device: str, interpreted: bool) -> list[Case]:
    """What is checked. Interpreted: small shapes, and no bfloat16, whose products Triton's interpreter gets wrong."""
    if interpreted:
        return [Case(*c) for c in itertools.product((torch.float32, torch.float16), ((3, 5), (2, 8)), (16, 48))]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    # beyond what the fused kernels keep at once: on a GPU the dense positional table, on a CPU a block's scores
    largest = (40, 40) if device == "cpu" else (64, 64)
    shapes = (
        ((1, 1), 48),
        ((3, 5), 16),
        ((14, 14), 48),
        ((8, 18), 64),
        ((17, 31), 80),
        ((14, 14), 128),
        (largest, 48),
    )
    ordinary = [Case(dtype, *shape) for dtype, shape in itertools.product(dtypes, shapes)]
    return ordinary + [Case(dtype, (14, 14), 48, gate) for dtype, gate in itertools.product(dtypes, (-40.0, 40.0))]


def check(case: Case, backend: str, device: str) -> Outcome:
    """Holds the backend's output and gradients to float64."""
    inputs, d_out = case.inputs(device)
    if reason := why_not(backend, inputs):
        return Outcome(case, cannot_run=reason)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.pos_weight, inputs.gate)
    draws = 2 if inputs.q.shape[2] > LARGE else 4

    def attention(*leaves: Tensor) -> Tensor:
        return gpsa_attention(*leaves, grid_size=case.grid, backend=backend)

    try:
        expected = expected_attention(*tensors, d_out, case.grid, draws=draws)
        results = with_gradients(attention, tensors, d_out)
    except Exception as error:  # a kernel that does not compile or launch is an outcome too
        return Outcome(case, error=f"{type(error).__name__}: {error}")
    return Outcome(case, {name: expected[name].share(result) for name, result in results.items()})


def run(backend: str, device: str, chosen: list[Case]) -> Iterator[Outcome]:
    """`check` of every case, one after the other.

    Raises:
        ValueError: the backend can run none of them; the text says why, and which backends can.
    """
    reasons = []
    for case in chosen:
        outcome = check(case, backend, device)
        reasons.append(outcome.cannot_run)
        yield outcome
    if all(reasons):
        inputs, _ = chosen[0].inputs(device)
        others = [each.name for each in backends() if not why_not(each.name, inputs)]
        raise ValueError(
            f"--backend {backend} cannot run on {device} here: {reasons[0]}. What can: {', '.join(others)}"
        )
