"""`selfcheck`: shows the cases of `bench.selfcheck`, and says whether all of them are right."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table

from ..attention import backends, fastest
from ..bench.machine import machine
from ..bench.selfcheck import Outcome, cases, run
from ..equivalence import NAMES
from .options import Device, JsonFile
from .output import console, write_json


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
