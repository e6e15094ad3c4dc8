"""The tests of equivalence on other draws of rounding: many seeds, other processors, other numbers of threads.

    python tests/steady.py              20 seeds as this machine is, then one under each variation, small grids
    python tests/steady.py --sample     one seed under some variations, small grids: for each change, after `make test`

A variation is a process of its own whose environment caps what PyTorch, its libraries or these kernels use of the
processor. A rule that holds only on one draw fails here.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from convit_kernels import extension, linear
from convit_kernels.bench.machine import describe, machine

TESTS = Path(__file__).parent
PASSED = re.compile(r"(\d+) passed")
LARGEST = re.compile(r"(\S+) of what is allowed: (\S+) in")


class Variation(NamedTuple):
    """Environment variables of a run; whether the sample has it."""

    environment: dict[str, str]
    sampled: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.environment.items()) or "as it is"


def variations() -> list[Variation]:
    """One variable at a time. ATen takes what it is told, so only what the processor has; the others are bounds."""
    levels = ["default", "avx2", "avx512"]
    capability = torch.backends.cpu.get_cpu_capability().lower().split("_")[0]
    runs_here = levels[: levels.index(capability) + 1] if capability in levels else ["default"]
    sets = extension.instruction_sets() if extension.status["_C"] is None else []
    found = [Variation({"ATEN_CPU_CAPABILITY": level}, level == "default") for level in runs_here]
    found += [Variation({"MKL_ENABLE_INSTRUCTIONS": level}) for level in ("SSE4_2", "AVX2", "AVX512")]
    caps = ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
    onednn = {linear.VARIABLE: "1"}
    found += [Variation({"ONEDNN_MAX_CPU_ISA": cap} | onednn, cap == "AVX2") for cap in caps]
    found += [Variation({"OMP_NUM_THREADS": str(count)}, count == 3) for count in (1, 2, 3)]
    return found + [Variation({"CONVIT_KERNELS_ISA": name}, name == sets[-1]) for name in sets]


def run(variation: Variation, seeds: int, selection: list[str]) -> tuple[bool, str, str]:
    """Whether all tests passed, how many, and the largest error; the output where they did not."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.equivalence" in path.read_text()]
    command = [sys.executable, "-m", "pytest", *files, "-m", "equivalence", "-q", "--seeds", str(seeds)]
    command += ["-p", "no:cacheprovider", "--no-header", "--tb=short", *selection]
    environment = os.environ | variation.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    passed, largest = PASSED.search(done.stdout), LARGEST.search(done.stdout)
    if done.returncode != 0:
        Console(stderr=True).print(f"{variation}\n{done.stdout[-6000:]}{done.stderr[-2000:]}", markup=False)
    return done.returncode == 0, passed[1] if passed else "0", f"{largest[1]} {largest[2]}" if largest else ""


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds as this machine is.")] = 20,
    others: Annotated[int, typer.Option(min=1, help="Seeds under each variation.")] = 1,
    sample: Annotated[bool, typer.Option(help="One seed under some variations, small grids alone.")] = False,
) -> None:
    if sample:
        chosen = [(one, 1) for one in variations() if one.sampled]
    else:
        chosen = [(Variation({}), seeds)] + [(one, others) for one in variations()]
    small = ["-k", "not many_tokens and not chunked"]
    table = Table(title=f"Equivalence on {describe(machine())}", title_justify="left")
    for heading in ("variation", "seeds", "passed", "largest error of allowed", "s"):
        table.add_column(heading, justify="left" if heading == "variation" else "right")
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        work = progress.add_task("", total=len(chosen))
        for variation, count in chosen:
            progress.update(work, description=str(variation))
            begin = time.monotonic()
            right, passed, largest = run(variation, count, small if variation.environment else [])
            failed += not right
            verdict = passed if right else f"[red]FAIL[/red] ({passed})"
            table.add_row(str(variation), str(count), verdict, largest, f"{time.monotonic() - begin:.0f}")
            progress.advance(work)
    Console(width=120).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
