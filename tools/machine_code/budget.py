"""The budget of the machine code: what every kernel may use, in a file under version control that tests hold.

Two tables make the file. ``paper`` has the kernels at the paper's size (14 x 14 tokens, head_dim 48, bfloat16, dense
positions) beside a content-only flash attention of the same tile, with the ratio of the issued instructions. ``matrix``
has every configuration that `configs` can choose, by architecture, dtype, head_dim, regime and pass: it must compile,
fit the device and spill nothing.

What is held is exact for one version of Triton (the file names it) and an upper limit with `SLACK` for another, whose
compiler allots registers in its own way. What such numbers say and do not say: `tools.machine_code`.

    python -m tools.machine_code.budget              prints the paper's table
    python -m tools.machine_code.budget --check      ... and compares with the file; exit code 1 where it is exceeded
    python -m tools.machine_code.budget --write      rewrites the file
    --all: the whole matrix too (an hour)      --sample N: every N-th case of it
    --json: the numbers instead of a table          --jobs N: processes
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from convit_kernels.triton import configs
from convit_kernels.triton.backward import AXIS_STEP, backward
from convit_kernels.triton.common import padded
from convit_kernels.triton.config_table import TABLE
from convit_kernels.triton.configs import Config
from convit_kernels.triton.forward import forward

from .baseline import content_backward, content_forward
from .compiled import DEVICES, Launch, compile_launch, recorded_launches
from .counts import Loop
from .report import Report, read
from .traffic import requested_bytes

FILE = Path(__file__).with_name("budget.json")

# The issued instructions may be at most so many times those of content-only attention. These are targets, not
# measurements: they stay when the file is rewritten.
MAX_RATIO = {"forward": 1.20, "backward": 1.30}

# How far another version of Triton than the file's may exceed what the file has.
SLACK = 1.10

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PASSES = ("forward", "backward")

# Images and heads of the tensors that the launchers get: the tiny model's heads and a training batch for one GPU. Only
# the work that a batch shares depends on it.
BATCH, HEADS = 128, 4
# The grid of the paper, and one beyond the dense regime.
GRIDS: dict[configs.Regime, tuple[int, int]] = {"dense": (14, 14), "factored": (48, 48)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: a pass, or its baseline "content_" + pass, on a device for tensors of a kind."""

    device: str
    pass_name: str
    dtype: str = "bfloat16"
    head_dim: int = 48
    regime: configs.Regime = "dense"
    few: bool = False  # the configurations for few programs

    def __str__(self) -> str:
        return f"{self.device}/{self.pass_name}/{self.dtype}/{self.head_dim}/{self.regime}{'/few' if self.few else ''}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of a case: its launch configuration, how many programs run, and what its machine code says."""

    tile: tuple[int, int]
    programs: int
    report: Report
    tensor_bytes: int  # of the tensors that it reads and writes, each once
    requested_bytes: int  # see `traffic`

    @property
    def warp_instructions(self) -> int:
        """Of the whole launch."""
        return (self.report.issued or 0) * self.programs


def configurations(case: Case, chosen: Mapping[str, Config] | None = None) -> dict[str, Config]:
    """The launch configuration of each of `configs.PASSES` for a case: the chosen one, else the table's."""
    table = {
        name: configs.table_config(
            name,
            dtype=DTYPES[case.dtype],
            head_dim=case.head_dim,
            regime=case.regime,
            family_name=configs.FAMILIES[case.device],
            few=case.few,
        )
        for name in configs.PASSES
    }
    return table | dict(chosen or {})


def of_its_own(case: Case) -> set[str]:
    """The kernels that an entry of the matrix holds, those that no other has: kernels that read no position map are in
    the dense cases alone, those for few programs where their configuration is another."""
    names = {name for name in configs.PASSES if case.regime in configs.regimes(name)}
    if case.few:
        usual = configurations(dataclasses.replace(case, few=False))
        names = {name for name in names if configurations(case)[name] != usual[name]}
    elif case.regime == "dense":
        names.add("backward_reduce")
    return {f"{name}_kernel" for name in names if name.startswith(case.pass_name)}


def launches(case: Case, chosen: Mapping[str, Config] | None = None) -> list[Launch]:
    """The launches of a case, recorded from the launcher, with the strides that the linear layers' outputs have.

    Args:
        chosen: launch configurations by name of `configs.PASSES`, where they are not the table's.
    """
    dtype, (height, width) = DTYPES[case.dtype], GRIDS[case.regime]
    tokens = height * width
    qk = torch.empty(BATCH, tokens, 2, HEADS, case.head_dim, dtype=dtype)
    q, k = qk.permute(2, 0, 3, 1, 4)
    v, d_out = (torch.empty(BATCH, tokens, HEADS, case.head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    gate, pos_weight, scale = torch.empty(HEADS), torch.empty(HEADS, 3), case.head_dim**-0.5
    lse = torch.empty(BATCH, HEADS, tokens)
    factors: dict[str, Any] = {
        "row_table": torch.empty(HEADS, height, height),
        "col_table": torch.empty(HEADS, width, width),
    }
    table: dict[str, Any] = (
        {"table": torch.empty(HEADS, tokens, padded(tokens), dtype=dtype)} if case.regime == "dense" else {}
    )

    config, config_q, config_kv, config_position = configurations(case, chosen).values()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    try:
        with recorded_launches() as recorded:
            if case.pass_name == "forward":
                forward(q, k, v, gate, (height, width), scale, need_grad=True, config=config, **(table or factors))
            elif case.pass_name == "backward":
                backward(
                    d_out, q, k, v, d_out, lse, pos_weight, gate, (height, width), scale,
                    configs=(config_q, config_kv, config_position), **(table or factors),
                )  # fmt: skip
            elif case.pass_name == "content_forward":
                content_forward(q, k, v, scale, config, need_lse=True)
            elif case.pass_name == "content_backward":
                content_backward(d_out, q, k, v, d_out, lse, scale, configs=(config_q, config_kv))
            else:
                raise ValueError(f"unknown pass {case.pass_name!r}")
    finally:
        torch.set_float32_matmul_precision(precision)
    return recorded


def trips(launch: Launch) -> Callable[[Loop], int]:
    """How often each loop of a launch's kernel runs."""
    values = launch.arguments
    if launch.name == "backward_position_kernel":
        blocks = triton.cdiv(values["span"], values["BLOCK_N"])
        # over key blocks, within it over images, and over the coordinates of each axis: the grids here are square
        axis = triton.cdiv(values["width"], AXIS_STEP.value)
        return lambda loop: blocks if loop.outer else axis if loop.special and not loop.matrix else values["group"]
    if launch.name == "backward_reduce_kernel":
        return lambda loop: triton.cdiv(values["size"], values["BLOCK"])
    # where a kernel treats the ragged tile apart, it stands beside the loop
    walked = values.get("BLOCK_M" if "_kv_" in launch.name else "BLOCK_N", 1)
    apart = "TAIL" in values or ("RAGGED" in values and not values.get("EXACT"))
    return lambda loop: values["num_tokens"] // walked if apart else triton.cdiv(values["num_tokens"], walked)


def measure(
    case: Case, only: Collection[str] | None = None, *, chosen: Mapping[str, Config] | None = None, counted: bool = True
) -> list[Row]:
    """Compiles the kernels of a case and reads their machine code.

    Args:
        only: the names of the kernels that are wanted; None for all.
        chosen: as for `launches`.
        counted: whether to count the issued instructions, which takes longer.
    """
    rows = []
    for launch in launches(case, chosen):
        if only is not None and launch.name not in only:
            continue
        values = launch.arguments
        report = read(compile_launch(launch, case.device), case.device, trips(launch) if counted else None)
        tensors = {tensor.data_ptr(): tensor for tensor in launch.tensors}
        rows.append(
            Row(
                tile=(values.get("BLOCK_M", 1), values.get("BLOCK_N", values.get("BLOCK", 1))),
                programs=math.prod(launch.grid),
                report=report,
                tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
                requested_bytes=requested_bytes(launch),
            )
        )
    return rows


def compared(device: str, pass_name: str) -> dict[str, Any]:
    """One entry of the paper's table: the kernels, and what all of them issue relative to content alone."""
    rows, content = (measure(Case(device, name)) for name in (pass_name, f"content_{pass_name}"))
    issued, baseline = (sum(row.warp_instructions for row in launch) / (BATCH * HEADS) for launch in (rows, content))
    counted = DEVICES[device].backend == "cuda"
    return {
        "kernels": [
            {
                "kernel": row.report.kernel,
                "tile": list(row.tile),
                "warps": row.report.warps,
                "stages": row.report.stages,
                "registers": row.report.registers,
                "spill_bytes": row.report.spill_bytes,
                "shared": row.report.shared,
                "occupancy": row.report.occupancy,
                "issued": row.report.instructions,
                "others": row.report.others,
                "macs": row.report.macs,
            }
            for row in rows
        ],
        "warp_instructions_per_head_and_image": round(issued) if counted else None,
        "content_only": round(baseline) if counted else None,
        "ratio": round(issued / baseline, 3) if counted else None,
    }


def used(case: Case) -> dict[str, list[int]]:
    """One entry of the matrix: kernel -> registers, spilled bytes, shared memory, warps an SM (0 where it cannot be
    launched), of the kernels that are `of_its_own`.
    """
    reports = [row.report for row in measure(case, of_its_own(case), counted=False)]
    return {
        report.kernel: [report.registers, report.spill_bytes, report.shared, report.occupancy if report.fits else 0]
        for report in reports
    }


def source(device: str) -> str:
    """A hash of what a device's entries follow from: the kernels' code and its family's launch configurations."""
    rows = sorted(item for item in TABLE.items() if item[0].startswith(f"{configs.FAMILIES[device]}/"))
    finer = (configs.FINER, configs.FINER_HEAD_DIM) if configs.FAMILIES[device] in configs.FINER_FAMILIES else ()
    return hashlib.sha256(f"{configs.source_hash()}{rows}{finer}".encode()).hexdigest()[:16]


def dtypes(device: str) -> list[str]:
    """The keys of `DTYPES` that the kernels take on a device, and whose code differs: TF32 is plain float32 on AMD and
    on Turing."""
    names = [name for name in DTYPES if not configs.why_not(configs.FAMILIES[device], DTYPES[name])]
    return [name for name in names if name != "tf32" or (DEVICES[device].backend == "cuda" and device != "sm_75")]


def paper_cases(devices: Iterable[str] = tuple(DEVICES)) -> list[Case]:
    """Both passes on every device that has bfloat16."""
    return [Case(device, pass_name) for device in devices if "bfloat16" in dtypes(device) for pass_name in PASSES]


def matrix_cases(devices: Iterable[str] = tuple(DEVICES)) -> list[Case]:
    """Every configuration that the tables can choose."""
    cases = (
        Case(device, pass_name, dtype, head_dim, regime, few)
        for device in devices
        for few in (False, True)
        for pass_name in PASSES
        for dtype in dtypes(device)
        for head_dim in configs.HEAD_DIM_BUCKETS
        for regime in GRIDS
    )
    taken = (
        case for case in cases if not configs.why_not(configs.FAMILIES[case.device], DTYPES[case.dtype], case.head_dim)
    )
    return [case for case in taken if of_its_own(case)]


def over_target(measured: dict[str, Any]) -> dict[str, float]:
    """Device and pass -> ratio of the issued instructions, where it is above `MAX_RATIO`."""
    ratios = {name: entry["ratio"] for name, entry in measured["paper"].items() if entry["ratio"] is not None}
    return {name: ratio for name, ratio in ratios.items() if ratio > MAX_RATIO[name.split("/")[1]]}


def problems(measured: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """Where ``measured``, a result of `collect`, exceeds the file's content ``kept``; for the targets see
    `over_target`."""
    slack = 1.0 if measured["triton"] == kept["triton"] else SLACK
    complaints = []

    def limit(where: str, what: str, value: float, allowed: float) -> None:
        if value > allowed:
            complaints.append(f"{where}: {what} {value}, at most {allowed:g} allowed")

    for name, entry in measured["paper"].items():
        cuda = DEVICES[name.split("/")[0]].backend == "cuda"
        before = kept["paper"].get(name)
        if before is None:
            complaints.append(f"{name}: not in the file")
            continue
        if cuda:
            what = "warp_instructions_per_head_and_image"
            limit(name, "warp instructions", entry[what], before[what] * slack)
        for kernel, was in zip(entry["kernels"], before["kernels"], strict=True):
            where = f"{name}/{kernel['kernel']}"
            limit(where, "registers", kernel["registers"], was["registers"] * slack)
            limit(where, "shared memory", kernel["shared"], was["shared"] * slack)
            limit(where, "spilled bytes", kernel["spill_bytes"], 0)
            if kernel["occupancy"] < was["occupancy"] / slack:
                complaints.append(f"{where}: {kernel['occupancy']} warps an SM, {was['occupancy']} before")
    for name, kernels in measured["matrix"].items():
        for kernel, (registers, spill_bytes, shared, warps) in kernels.items():
            where = f"{name}/{kernel}"
            was = kept["matrix"].get(name, {}).get(kernel)
            if was is None:
                complaints.append(f"{where}: not in the file")
                continue
            limit(where, "registers", registers, was[0] * slack)
            limit(where, "spilled bytes", spill_bytes, 0)
            limit(where, "shared memory", shared, was[2] * slack)
            if not warps:
                complaints.append(f"{where}: cannot be launched")
    return complaints


# ---- command line ----------------------------------------------------------------------------------------------------


def _paper_entry(case: Case) -> tuple[str, dict[str, Any]]:
    return f"{case.device}/{case.pass_name}", compared(case.device, case.pass_name)


def _matrix_entry(case: Case) -> tuple[str, dict[str, list[int]]]:
    return str(case), used(case)


def _shown(results: Iterator[Any], total: int, text: str) -> Iterator[Any]:
    """``results`` with a progress bar on stderr where rich is installed and someone is looking."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return results
    return iter(track(results, description=text, total=total, console=Console(stderr=True), transient=True))


def collect(paper: Sequence[Case], matrix: Sequence[Case], jobs: int = 1) -> dict[str, Any]:
    """Measures both tables; the result is what the file holds."""
    sources = {case.device: source(case.device) for case in (*paper, *matrix)}
    measured: dict[str, Any] = {"triton": triton.__version__, "sources": sources, "paper": {}, "matrix": {}}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for part, cases, entry in (("paper", paper, _paper_entry), ("matrix", matrix, _matrix_entry)):
            results = map(entry, cases) if jobs == 1 else pool.map(entry, cases)
            measured[part] = dict(_shown(results, len(cases), f"compiling, {part}"))
    return measured


def table(measured: dict[str, Any]) -> str:
    """The paper's part in Markdown."""
    lines = [
        "| target | pass | kernel | tile | warps | registers | spills | shared KiB | warps/SM "
        "| issued/warp | ratio to content only |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in measured["paper"].items():
        for index, kernel in enumerate(entry["kernels"]):
            lines.append(
                f"| {name.replace('/', ' | ')} | {kernel['kernel']} "
                f"| {kernel['tile'][0]} x {kernel['tile'][1]} | {kernel['warps']} "
                f"| {kernel['registers']} | {kernel['spill_bytes'] or 'none'} | {kernel['shared'] / 1024:.0f} "
                f"| {kernel['occupancy']} | {sum(kernel['issued'].values()) if kernel['issued'] else 'not counted'} "
                f"| {format(entry['ratio'], '.2f') if entry['ratio'] and not index else ''} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code.budget", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="rewrite the file")
    parser.add_argument("--check", action="store_true", help="compare with the file; exit code 1 where it is exceeded")
    parser.add_argument("--all", action="store_true", help="the whole matrix too, which takes an hour")
    parser.add_argument("--sample", type=int, metavar="N", help="every N-th case of the matrix too")
    parser.add_argument("--devices", nargs="+", choices=tuple(DEVICES), default=list(DEVICES))
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="compile in so many processes")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args(arguments)

    matrix = matrix_cases(options.devices)[:: options.sample or 1] if options.all or options.sample else []
    measured = collect(paper_cases(options.devices), matrix, options.jobs)
    print(json.dumps(measured, indent=1) if options.json else table(measured))
    if options.write:
        options.file.write_text(_compact(merged(measured, options.file)))
    if options.check:
        complaints = problems(measured, json.loads(options.file.read_text()))
        print(*complaints, sep="\n", file=sys.stderr)
        return int(bool(complaints))
    return 0


def merged(measured: dict[str, Any], file: Path) -> dict[str, Any]:
    """``measured`` and what the file has beside it, in the order of the cases; what follows from other code goes."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    current = {device for device, hashed in kept.get("sources", {}).items() if hashed == source(device)}
    names = {
        "paper": [f"{case.device}/{case.pass_name}" for case in paper_cases()],
        "matrix": [str(case) for case in matrix_cases()],
    }
    parts: dict[str, Any] = {}
    for part, order in names.items():
        before = {name: entry for name, entry in kept.get(part, {}).items() if name.split("/")[0] in current}
        entries = before | measured[part]
        parts[part] = {name: entries[name] for name in order if name in entries}
    sources = {device: source(device) for device in DEVICES if device in current or device in measured["sources"]}
    return {"triton": measured["triton"], "sources": sources} | parts


def _compact(measured: dict[str, Any]) -> str:
    """JSON with one line for each entry, so that a change of the file can be read."""
    parts = [f' "{key}": {json.dumps(measured[key])}' for key in ("triton", "sources")]
    for part in ("paper", "matrix"):
        entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in measured[part].items())
        parts.append(f' "{part}": {{\n{entries}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
