"""A model of time, from public specifications and the kernels' machine code. No number here is a measurement.

For each kernel it gives the time that each unit of the GPU would need if it alone had work and never waited; the
longest is what bounds the kernel, and no real run can be faster unless a specification is wrong. A real run is slower:
the model has no latency, no bank conflicts, no bandwidth of shared memory, no launch overhead, no last wave of programs
that leaves cores idle, and no clock that falls under load.

    HBM      the tensors that a kernel names, each once
    L2       what its programs load and store, as if the L1 cache kept nothing but the factors of position (`traffic`)
    tensor   the matrix products, padding of the tiles included
    exp      the special functions (exp2, log2, reciprocals)
    fp32     additions, multiplications and fused ones
    issue    every instruction of every warp, one for each scheduler and clock

Specifications
    A100 (SXM, 80 GB): 108 SMs, 1.41 GHz, 312 TFLOP/s bf16 and 156 TFLOP/s TF32 dense, 2039 GB/s, L2 reads of 5120 bytes
    a clock: NVIDIA A100 Tensor Core GPU Architecture (whitepaper, 2020) and the A100 80 GB data sheet.
    H100 (SXM5): 132 SMs, 989.4 TFLOP/s bf16 and 494.7 TF32 dense, 3.35 TB/s: NVIDIA H100 Tensor Core GPU Architecture
    (whitepaper, 2022) and the H100 data sheet; 1.83 GHz is the clock that those rates imply at 2048 bf16
    multiply-accumulates an SM and clock. NVIDIA gives no bandwidth of its L2; 5.5 TB/s is the low end of what published
    microbenchmarks found (chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth", 2023).
    Special functions 16 lanes, fp32 64 (A100) and 128 (H100) lanes an SM and clock: CUDA C++ programming guide,
    "Throughput of native arithmetic instructions". Four schedulers an SM, an instruction each a clock: the whitepapers.

    python -m tools.machine_code.time_model [--dtype bfloat16]      a Markdown table for the paper's size
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence

from . import budget


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU's public specifications; rates are of one SM and clock unless they name seconds."""

    name: str
    architecture: str
    sms: int
    clock: float  # Hz
    hbm: float  # bytes a second
    l2: float  # bytes a second
    macs: dict[str, int]  # multiply-accumulates of the tensor cores, by dtype
    special: int  # lanes
    fp32: int  # lanes
    schedulers: int = 4


A100 = Gpu(
    "A100 SXM",
    "sm_80",
    sms=108,
    clock=1.41e9,
    hbm=2.039e12,
    l2=5120 * 1.41e9,
    macs={"bfloat16": 1024, "float16": 1024, "tf32": 512, "float32": 512},
    special=16,
    fp32=64,
)
H100 = Gpu(
    "H100 SXM",
    "sm_90",
    sms=132,
    clock=1.83e9,
    hbm=3.35e12,
    l2=5.5e12,
    macs={"bfloat16": 2048, "float16": 2048, "tf32": 1024, "float32": 1024},
    special=16,
    fp32=128,
)
GPUS = (A100, H100)


def model(gpu: Gpu, row: budget.Row, dtype: str, *, checked: bool = True) -> dict[str, float]:
    """Model, not measurement: the seconds that each unit needs for one launch of a kernel.

    Raises:
        ValueError: for a kernel compiled for another architecture than the GPU's, unless not ``checked``.
    """
    report = row.report
    if report.instructions is None or (checked and report.device != gpu.architecture):
        raise ValueError(f"{gpu.name} needs a counted kernel of {gpu.architecture}, not of {report.device}")
    warps = row.programs * report.warps
    clocks = gpu.sms * gpu.clock
    return {
        "HBM": row.tensor_bytes / gpu.hbm,
        "L2": row.requested_bytes / gpu.l2,
        "tensor": warps * (report.macs or 0) / gpu.macs[dtype] / clocks,
        "exp": warps * 32 * report.instructions["special"] / gpu.special / clocks,
        "fp32": warps * 32 * report.instructions["float"] / gpu.fp32 / clocks,
        "issue": row.warp_instructions / gpu.schedulers / clocks,
    }


def bound(times: dict[str, float]) -> str:
    """The unit that needs longest."""
    return max(times, key=times.__getitem__)


def table(cases: Iterable[budget.Case], gpus: Sequence[Gpu] = GPUS) -> str:
    """Markdown: for each GPU and kernel the model's microseconds for each unit and what bounds it.

    Only cases whose device is one of the GPUs' architectures appear.
    """
    lines = [
        f"Model, not measurement: microseconds for {budget.BATCH} images of {budget.HEADS} heads.",
        "",
        "| GPU | kernel | HBM | L2 | tensor | exp | fp32 | issue | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for gpu in gpus:
            if gpu.architecture != case.device:
                continue
            total = 0.0
            rows = budget.measure(case)
            for row in rows:
                times = model(gpu, row, case.dtype)
                total += max(times.values())
                numbers = " | ".join(f"{1e6 * value:.1f}" for value in times.values())
                lines.append(f"| {gpu.name} | {row.report.kernel} | {numbers} | {bound(times)} |")
            if len(rows) > 1:
                lines.append(f"| {gpu.name} | {case.pass_name}, sum of the bounds | | | | | | {1e6 * total:.1f} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code.time_model", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dtype", choices=tuple(budget.DTYPES), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=48)
    options = parser.parse_args(arguments)
    cases = [
        budget.Case(gpu.architecture, pass_name, options.dtype, options.head_dim)
        for gpu in GPUS
        for pass_name in budget.PASSES
    ]
    print(table(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
