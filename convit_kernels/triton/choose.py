"""Chooses launch configurations by compiling candidates and reading their machine code: how the table of `configs` was
made.

A candidate is out when it spills, does not fit the device or leaves an SM fewer than eight warps; the first of the
ladder (see `candidates`) that is not out is taken. The ladder's order comes from the model of time (`price`) at
head_dims 16, 48, 128 and 256 on sm_80 and sm_90. Two stages are always taken, for counts cannot tell what overlapping
the loads is worth. All this is a choice among tiles, no prediction of time.

    python -m convit_kernels.triton.choose --devices sm_90             what the ladders give, with what fails everywhere
    python -m convit_kernels.triton.choose --devices sm_90 --write     ... into config_table.py
    --mend: start from the table as it is, and search on only where it fails
    python -m convit_kernels.triton.choose --prices forward --devices sm_90 --head-dims 48 64     the rungs, priced
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from . import budget, config_table, configs, time_model
from .candidates import ladder
from .machine_code import DEVICES

# The dtypes that a row of the table is judged by. float16 compiles as bfloat16 does; the budget's matrix has it too.
DTYPES = {2: ("bfloat16",), 4: ("float32", "tf32")}

# Whose specifications price an architecture; the others are priced as an A100.
MODELS = {"sm_90": time_model.H100, "sm_100": time_model.H100}


def written(config: configs.Config) -> str:
    """As the table has it."""
    return "x".join(map(str, config))


@contextlib.contextmanager
def _fixed(chosen: dict[str, configs.Config]) -> Iterator[None]:
    """Within this context `configs.lookup` has these answers, by row of the table, for every tensor."""
    count = len(configs.HEAD_DIM_BUCKETS)
    rows = {key: " ".join([written(config)] * count) for key, config in chosen.items()}
    with mock.patch.object(configs, "TABLE", {**config_table.TABLE, **rows}):
        yield


def judged(
    pass_name: str, case: budget.Case, chosen: dict[str, configs.Config], *, counted: bool = False
) -> budget.Row | str:
    """What the machine code of a pass's kernel says with these configurations, or why it is out."""
    with _fixed(chosen):
        (row,) = budget.measure(case, only=f"{pass_name}_kernel", counted=counted)
    if row.report.spill_bytes:
        return f"spills {row.report.spill_bytes} bytes"
    if not row.report.fits:
        return f"needs {row.report.shared} bytes of shared memory"
    # a warp of AMD has twice the lanes
    if row.report.occupancy < (8 if DEVICES[case.device].backend == "cuda" else 4):
        return f"leaves {row.report.occupancy} warps an SM"
    return row


def price(case: budget.Case, row: budget.Row) -> float:
    """Model, not measurement: the cubic mean of the units' times, near the slowest unit but with a price on the others,
    since no run overlaps them wholly, times ``1 + 2 / (warps an SM)`` for the latency that few warps cannot hide."""
    times = time_model.model(MODELS.get(case.device, time_model.A100), row, case.dtype, checked=False).values()
    return float(sum(time**3 for time in times) ** (1 / 3) * (1 + 2 / row.report.occupancy))


def rungs(key: str, pass_name: str, itemsize: int, head_dim: int, *, mend: bool) -> list[configs.Config]:
    """What to try for a row of the table: the ladder, or to ``mend`` it what the row has and the rungs below."""
    candidates = ladder(pass_name, itemsize, head_dim)
    if not mend:
        return candidates
    entry = config_table.TABLE[key].split()[configs.HEAD_DIM_BUCKETS.index(head_dim)]
    present = configs.Config(*map(int, entry.split("x")))
    below = candidates[candidates.index(present) + 1 :] if present in candidates else candidates
    return [present, *below]


def choose(
    device: str, itemsize: int, head_dim: int, mend: bool = False
) -> tuple[dict[str, configs.Config], list[str]]:
    """The configuration of each row of the table, and a line for each that fails on every rung (its last is taken)."""
    chosen: dict[str, configs.Config] = {}
    failures = []
    # the queries of backward_kv follow those of backward_q, so the order of the passes matters
    for pass_name in configs.PASSES:
        for regime in configs.regimes(pass_name):
            key = configs.table_key(device, pass_name, regime, itemsize)
            for config in rungs(key, pass_name, itemsize, head_dim, mend=mend):
                chosen[key] = config
                cases = (
                    budget.Case(device, pass_name.split("_")[0], dtype, head_dim, regime)
                    for dtype in DTYPES[itemsize]
                    if dtype in budget.dtypes(device)
                )
                # the first that fails is enough
                reason = next(
                    (f"{case}: {found}" for case in cases if isinstance(found := judged(pass_name, case, chosen), str)),
                    "",
                )
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
        prog="python -m convit_kernels.triton.choose", description=(__doc__ or "").split("\n")[0]
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
    parser.add_argument("--prices", choices=configs.PASSES, metavar="PASS", help="only print the rungs of one pass")
    parser.add_argument("--write", action="store_true", help="rewrite config_table.py")
    parser.add_argument("--mend", action="store_true", help="keep what does not fail")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    rows = [
        (device, size, head_dim)
        for device in options.devices
        for size in options.sizes
        for head_dim in options.head_dims
    ]
    if options.prices:
        for device, size, head_dim in rows:
            for regime in configs.regimes(options.prices):
                case = budget.Case(device, options.prices.split("_")[0], DTYPES[size][0], head_dim, regime)
                print(case)
                for config in ladder(options.prices, size, head_dim):
                    key = configs.table_key(device, options.prices, regime, size)
                    found = judged(options.prices, case, {key: config}, counted=True)
                    text = found if isinstance(found, str) else f"{1e6 * price(case, found):8.1f} {found.report}"
                    print(f"  {written(config):12} {text}", flush=True)
        return 0
    table = {key: row.split() for key, row in config_table.TABLE.items()}
    complaints: list[str] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for (device, size, head_dim), (chosen, failures) in zip(
            rows, pool.map(functools.partial(choose, mend=options.mend), *zip(*rows, strict=True)), strict=True
        ):
            complaints += failures
            print(device, size, head_dim, {key: written(config) for key, config in chosen.items()}, flush=True)
            for failure in failures:
                print(f"  TO MEND: {failure}", flush=True)
            for key, config in chosen.items():
                table[key][configs.HEAD_DIM_BUCKETS.index(head_dim)] = written(config)
            if options.write:
                write({key: " ".join(row) for key, row in table.items()})
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
