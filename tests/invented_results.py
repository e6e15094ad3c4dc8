"""Results of benchmarks that nobody ran, for the tests of what is made of results."""

import json
import random
from dataclasses import replace
from pathlib import Path

from convit_kernels.bench.implementations import Task
from convit_kernels.bench.results import Results, Row

MACHINE = {
    "gpu": None,
    "driver": None,
    "cuda": None,
    "cpu": "Abacus",
    "cpu_capability": "AVX2",
    "cores": 2,
    "load_1_minute": 2.5,
    "threads": 2,
    "cpu_clock_mhz": 1000.0,
    "torch": "2.14.1",
    "commit": "abc1234",
}


def row(implementation="composite", seconds=0.010, rounds=15, noise=0.05, drift=1.0, seed=0, task=None) -> Row:
    """Times around `seconds`, eager's around 40 ms beside them; `drift` slows the whole machine."""
    task = task or Task("attention", "convit_small", 8)
    draw = random.Random(f"{seed} {implementation} {task}")
    paces = [drift * draw.lognormvariate(0, noise) for _ in range(rounds)]
    return Row(
        group=str(task),
        implementation=implementation,
        seconds=[seconds * pace * draw.lognormvariate(0, noise) for pace in paces],
        eager_seconds=[0.040 * pace * draw.lognormvariate(0, noise) for pace in paces],
        error=1e-6,
        eager_error=2e-6,
        allowed_error=4.5e-6,
        peak_memory=int(1e3 * task.tokens),
        peak_resident=None,
        gflops=task.flops() / seconds / 1e9,
        share_of_peak=0.5,
        bound="arithmetic",
        peak="made up",
        part=task.part,
        model=task.model,
        batch=task.batch,
        tokens=task.tokens,
        backward=task.backward,
        dtype=str(task.dtype)[6:],
        device="cpu",
        load_1_minute=MACHINE["load_1_minute"],
    )


def results(*rows: Row, not_measured=()) -> Results:
    return Results(list(rows), list(not_measured), MACHINE, "2026-11-25")


def write(written: Results, path: Path) -> Path:
    """As pytest-benchmark writes it."""
    content = {
        "machine_info": {"convit_kernels": written.machine},
        "benchmarks": [{"extra_info": one.to_json()} for one in written.rows],
        "not_measured": [entry._asdict() for entry in written.not_measured],
        "datetime": f"{written.date}T12:00:00+00:00",
    }
    path.write_text(json.dumps(content))
    return path


def disturbed(one: Row, factor: float) -> Row:
    """As if something had run beside eager, each time before this implementation's turn."""
    return replace(one, eager_seconds=[factor * time for time in one.eager_seconds])


def run(noise: float = 0.05, **seconds: float) -> list[Row]:
    """Three tasks by several implementations, eager first, which takes 40 ms."""
    tasks = [Task("attention", model, 8) for model in ("convit_tiny", "convit_small", "convit_base")]
    implementations = {"eager": 0.040, **seconds}
    return [row(name, time, noise=noise, task=task) for task in tasks for name, time in implementations.items()]


def disturbed_run() -> list[Row]:
    """Eager took 2.5 times as long beside the first task's composite, which is twice as fast as eager."""
    first, second, third, *rest = run(cpu=0.010, composite=0.020, reference=0.030)
    return [first, second, disturbed(third, 2.5), *rest]
