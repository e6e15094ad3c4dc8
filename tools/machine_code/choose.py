"""Chooses launch configurations by compiling candidates and reading their machine code.

It wrote `convit_kernels/triton/config_table.py`. A candidate is refused when it spills, does not fit the device or
leaves an SM fewer than eight warps of 32 lanes; of `convit_kernels.triton.candidates` the first that is not refused is
chosen. The order comes from the model of time (`cost`) at head_dims 16, 48, 128 and 256 on sm_80 and sm_90. The number
of stages is two, for counts cannot tell what overlapping the loads is worth, but in a few rows written by hand, where
two do not fit or spill. All this is a choice among tiles, no prediction of time.

    python -m tools.machine_code.choose --devices sm_90             what is chosen, and where every candidate is refused
    python -m tools.machine_code.choose --devices sm_90 --write     ... into config_table.py
    --repair: keep the table's configurations, and search on only where they are refused
    python -m tools.machine_code.choose --costs forward --devices sm_90 --head-dims 48 64    the candidates' costs
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from convit_kernels.triton import config_table, configs
from convit_kernels.triton.candidates import candidates

from . import budget, time_model
from .compiled import DEVICES

STAGES = (2,)

# The dtypes that a row of the table is judged by. float16 compiles as bfloat16 does; the budget's matrix has it too.
DTYPES = {2: ("bfloat16",), 4: ("float32", "tf32")}

# Whose specifications stand for an architecture; for the others it is the A100.
MODELS = {"sm_90": time_model.H100, "sm_100": time_model.H100}


def written(config: configs.Config) -> str:
    """As the table has it."""
    return "x".join(map(str, config))


def judged(
    pass_name: str, case: budget.Case, rows: Mapping[str, configs.Config], *, counted: bool = False
) -> budget.Row | str:
    """What the machine code of a pass's kernel says, or why it is refused.

    Args:
        rows: launch configurations by row of the table (`configs.table_key`); the table has the others.
        counted: whether to count the issued instructions, which takes longer.
    """
    itemsize = budget.DTYPES[case.dtype].itemsize
    keys = {name: configs.table_key(case.device, name, case.regime, itemsize) for name in configs.PASSES}
    chosen = {name: rows[key] for name, key in keys.items() if key in rows}
    (row,) = budget.measure(case, only={f"{pass_name}_kernel"}, chosen=chosen, counted=counted)
    if row.report.spill_bytes:
        return f"spills {row.report.spill_bytes} bytes"
    if not row.report.fits:
        return f"needs {row.report.shared} bytes of shared memory"
    if row.report.occupancy * DEVICES[case.device].warp_size < 8 * 32:
        return f"leaves {row.report.occupancy} warps an SM"
    return row


def cost(case: budget.Case, row: budget.Row) -> float:
    """Model, not measurement: a time in seconds that only ranks candidates.

    It is the cubic mean of the units' times, near the slowest unit's but growing with the others', since no run
    overlaps them wholly, times ``1 + 2 / (warps an SM)`` for the latency that few warps cannot hide.
    """
    times = time_model.model(MODELS.get(case.device, time_model.A100), row, case.dtype, checked=False).values()
    return float(sum(time**3 for time in times) ** (1 / 3) * (1 + 2 / row.report.occupancy))


def to_try(key: str, pass_name: str, itemsize: int, head_dim: int, *, repair: bool) -> list[configs.Config]:
    """The candidates for a row of the table; to ``repair`` it, what the row has and the candidates after that."""
    ordered = candidates(pass_name, itemsize, head_dim, STAGES)
    if not repair:
        return ordered
    entry = config_table.TABLE[key].split()[configs.HEAD_DIM_BUCKETS.index(head_dim)]
    present = configs.Config(*map(int, entry.split("x")))
    after = ordered[ordered.index(present) + 1 :] if present in ordered else ordered
    return [present, *after]


def choose(
    device: str, itemsize: int, head_dim: int, repair: bool = False
) -> tuple[dict[str, configs.Config], list[str]]:
    """The configuration of each row of the table, and a line for each row whose candidates are all refused: it gets the
    last."""
    chosen: dict[str, configs.Config] = {}
    failures = []
    # the queries of backward_kv follow those of backward_q, so the order of the passes matters
    for pass_name in configs.PASSES:
        for regime in configs.regimes(pass_name):
            key = configs.table_key(device, pass_name, regime, itemsize)
            for config in to_try(key, pass_name, itemsize, head_dim, repair=repair):
                chosen[key] = config
                cases = (
                    budget.Case(device, pass_name.split("_")[0], dtype, head_dim, regime)
                    for dtype in DTYPES[itemsize]
                    if dtype in budget.dtypes(device)
                )
                # the first that fails is enough
                judgements = ((case, judged(pass_name, case, chosen)) for case in cases)
                reason = next((f"{case}: {why}" for case, why in judgements if isinstance(why, str)), "")
                if not reason:
                    break
            else:
                failures.append(f"{key} {written(config)} {reason}")
    return chosen, failures


def write(rows: dict[str, str]) -> None:
    """Rewrites config_table.py with these rows changed."""
    path = Path(config_table.__file__)
    head = path.read_text().split("TABLE: dict", 1)[0]
    lines = "".join(f'    "{key}": "{row}",\n' for key, row in {**config_table.TABLE, **rows}.items())
    path.write_text(f"{head}TABLE: dict[str, str] = {{\n{lines}}}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code.choose", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--devices", choices=tuple(dict.fromkeys(configs.FAMILIES.values())), nargs="+", default=["sm_90"]
    )
    parser.add_argument(
        "--head-dims", type=int, nargs="+", choices=configs.HEAD_DIM_BUCKETS, default=list(configs.HEAD_DIM_BUCKETS)
    )
    parser.add_argument(
        "--sizes", type=int, choices=tuple(DTYPES), nargs="+", default=list(DTYPES), help="bytes of an element"
    )
    parser.add_argument("--costs", choices=configs.PASSES, metavar="PASS", help="only print the costs for one pass")
    parser.add_argument("--write", action="store_true", help="rewrite config_table.py")
    parser.add_argument("--repair", action="store_true", help="keep what is not refused")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    rows = [
        (device, size, head_dim)
        for device in options.devices
        for size in options.sizes
        for head_dim in options.head_dims
        if any(not configs.why_not(device, budget.DTYPES[dtype], head_dim) for dtype in DTYPES[size])
    ]
    if options.costs:
        for device, size, head_dim in rows:
            for regime in configs.regimes(options.costs):
                case = budget.Case(device, options.costs.split("_")[0], DTYPES[size][0], head_dim, regime)
                print(case)
                for config in candidates(options.costs, size, head_dim, STAGES):
                    key = configs.table_key(device, options.costs, regime, size)
                    row = judged(options.costs, case, {key: config}, counted=True)
                    text = row if isinstance(row, str) else f"{1e6 * cost(case, row):8.1f} {row.report}"
                    print(f"  {written(config):12} {text}", flush=True)
        return 0
    table = {key: row.split() for key, row in config_table.TABLE.items()}
    complaints: list[str] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for (device, size, head_dim), (chosen, failures) in zip(
            rows, pool.map(functools.partial(choose, repair=options.repair), *zip(*rows, strict=True)), strict=True
        ):
            complaints += failures
            print(device, size, head_dim, {key: written(config) for key, config in chosen.items()}, flush=True)
            for failure in failures:
                print(f"  ALL REFUSED: {failure}", flush=True)
            for key, config in chosen.items():
                table[key][configs.HEAD_DIM_BUCKETS.index(head_dim)] = written(config)
            if options.write:
                write({key: " ".join(row) for key, row in table.items()})
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
