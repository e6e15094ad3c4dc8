"""`selfcheck`: holds a backend to float64 on this machine, in every dtype, regime, odd shape and gradient."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..attention import backends, fastest, gpsa_attention, why_not
from ..bench.machine import machine
from ..equivalence import NAMES, expected_attention, with_gradients
from ..inputs import Inputs, checked
from .options import Device, JsonFile
from .output import console, write_json

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


def command(
    device: Device = "auto",
    backend: Annotated[
        str, typer.Option(help="triton, cpu, composite, reference, or auto: the one that backend=None takes.")
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Holds a backend to float64 on this machine: every dtype, regime, odd shape and gradient.

    The Triton kernels run on a CPU too, interpreted: --backend triton --device cpu.
    """
    names = [each.name for each in backends()]
    if backend not in ("auto", *names):
        raise ValueError(f"unknown --backend {backend!r}: allowed are auto, {', '.join(names)}")
    if backend == "auto":
        inputs, _ = cases(device, False)[0].inputs(device)
        backend = fastest(inputs)
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        raise typer.Exit(_interpreted(json_file))
    chosen = cases(device, interpreted)
    outcomes = list(track(run(backend, device, chosen), "checking", len(chosen), console=console, transient=True))
    console.print(_table(outcomes, f"{backend}, {device}"))
    for outcome in outcomes:
        if outcome.error:
            console.print(f"{outcome.case}: {outcome.error}", style="red", markup=False, soft_wrap=True)
        elif outcome.cannot_run:
            console.print(f"{outcome.case}: cannot run here: {outcome.cannot_run}", markup=False, soft_wrap=True)
    if interpreted:
        console.print("In Triton's interpreter, on small shapes, without bfloat16: no GPU ran.", style="yellow")
    write_json(
        json_file,
        {
            "machine": machine(),
            "device": device,
            "backend": backend,
            "results": [outcome.to_json() for outcome in outcomes],
        },
    )
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def _interpreted(json_file: Path | None) -> int:
    """The exit code of a process of its own: the interpreter is chosen when triton is imported."""
    package = str(__package__).rpartition(".")[0]
    command = [sys.executable, "-m", package, "selfcheck", "--backend", "triton", "--device", "cpu"]
    command += [] if json_file is None else ["--json", str(json_file)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


def _table(outcomes: list[Outcome], title: str) -> Table:
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Errors against float64, as a share of what is allowed: {title}",
    )
    table.add_column("case", no_wrap=True)
    for heading in ("out", "dq", "dk", "dv", "d weight", "d gate", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        shares = [f"{min(outcome.shares[name], 99):.2f}" if outcome.shares else "" for name in NAMES]
        verdict = "[red]FAIL[/red]" if outcome.failed else "[green]ok[/green]"
        table.add_row(str(outcome.case), *shares, "[yellow]cannot run here[/yellow]" if outcome.cannot_run else verdict)
    return table
