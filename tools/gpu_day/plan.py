"""What is run on a GPU, in the order of its worth, and what a summary shows of it. Standard library only.

A rehearsal on a CPU runs the same steps with less work, so that a mistake in one of them is found before a GPU waits.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .runner import Group, Step

# Files of tests/ that take --device, the most telling first. The first four hold the kernels themselves.
KERNEL_TESTS = ("triton_op", "triton_forward", "triton_backward", "triton_positions")
TESTS = ("attention", "gpsa", "positions", "relpos", "func", "attention_derivatives", "compile", "replace")
# Of a rehearsal, where the kernels are interpreted.
REHEARSED = "1-7 or 1x7 or test_a_line or saturated or spacing or grad or any_batch"
SANITIZED = "float32 3x5 D=16,bfloat16 3x5 D=16,bfloat16 14x14 D=48"  # of selfcheck's cases
# Of the benchmarks, by the name of the step: the dtype, which, and further options.
BENCHMARKS: dict[str, tuple[str, str, list[str]]] = {
    "benchmarks-bfloat16": ("bfloat16", "(small or base) and not plus", []),
    "benchmarks-batch-8": ("bfloat16", "small and (forward-8x14x14 or backward-8x14x14)", ["--sweep"]),
    "benchmarks-float32": ("float32", "(attention or layer) and small and not plus", []),
}


def machine(device: str, out: Path) -> Group:
    """What everything else needs to know, and what says at once that there is no GPU."""
    return Group([_ours("machine", device, out, 60)])


def plan(device: str, out: Path, here: Mapping[str, Any]) -> Iterator[Group]:
    """The steps after `machine`, which has found `here`: on "cuda", or of a rehearsal on "cpu"."""
    rehearsal = device == "cpu"
    cores = os.cpu_count() or 1
    # for this GPU alone: all of them take minutes
    build = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*(here.get("capability") or (9, 0)))}
    build["CONVIT_KERNELS_CUDA"] = "auto" if rehearsal else "1"
    yield Group([Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, build)])

    threads = {"OMP_NUM_THREADS": str(max(1, cores // 8))}
    interpreted = {"TRITON_INTERPRET": "1"} if rehearsal else {}
    right = [_ours("selfcheck", device, out, 200)._replace(environment=threads | interpreted)]
    right += [
        _tests(f"interpreted/test_{name}.py", device, 220, threads | interpreted, "not mutant") for name in KERNEL_TESTS
    ]
    # built for one architecture, the library has not the others
    right += [_tests(f"test_{name}.py", device, 200, threads, "not all_architectures") for name in TESTS]
    if tool := here.get("sanitizer"):
        right += [_sanitized(tool, name, device, out) for name in ("memcheck", "racecheck")]
    # what is found goes where no other step takes it for its own
    cache = {"CONVIT_KERNELS_CACHE_DIR": str(out / "running" / "cache")}
    shares = 1 if rehearsal else max(1, cores // 3)
    for share in range(1, shares + 1):
        step = _ours("tune", device, out, 200, "--share", f"{share}/{shares}", name=f"compile-{share}", json=False)
        right.append(step._replace(environment=threads | interpreted | cache))
    yield Group(right, at_once=cores)

    yield Group([_benchmarks("benchmarks-bfloat16", device, out, 130)])
    yield Group([_benchmarks("benchmarks-batch-8", device, out, 40)])
    yield Group([_ours("host_time", device, out, 60)])
    yield Group([_ours("profile", device, out, 60)])
    yield Group([_ours("tune", device, out, 90)._replace(environment=interpreted | cache)])
    yield Group([_benchmarks("benchmarks-float32", device, out, 60)])


def _ours(step: str, device: str, out: Path, limit: float, *more: str, name: str = "", json: bool = True) -> Step:
    command = [sys.executable, "-m", "tools.gpu_day.steps", step, "--device", device, *more]
    return Step(name or step, [*command, *(["--json", str(_found(out, step))] if json else [])], limit)


def _found(out: Path, name: str) -> Path:
    """Where a step writes what it finds."""
    return out / "running" / f"{name}.json"


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider", *arguments]


def _tests(file: str, device: str, limit: float, environment: dict[str, str], chosen: str) -> Step:
    chosen += f" and ({REHEARSED})" if device == "cpu" else ""
    name = f"tests-{Path(file).stem.removeprefix('test_')}"
    return Step(name, _pytest(f"tests/{file}", "--device", device, "-k", chosen), limit, environment)


def _sanitized(tool: str, name: str, device: str, out: Path) -> Step:
    checks = _ours("selfcheck", device, out, 150, "--cases", SANITIZED, name=name, json=False)
    command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *checks.command]
    # PyTorch's own allocator hides what lies beyond a tensor
    return checks._replace(command=command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _benchmarks(name: str, device: str, out: Path, limit: float) -> Step:
    dtype, chosen, more = BENCHMARKS[name]
    if device == "cpu":
        chosen, more = "attention and tiny and forward and not plus", []
    command = _pytest("benchmarks", "--benchmark-only", "--device", device, "--dtype", dtype, "-k", chosen, *more)
    command += ["--implementations", "eager,sdpa,composite,triton", "--minutes", f"{(limit - 20) / 60:.2f}"]
    command += ["--row-seconds", "0.2", "--rows", str(_found(out, name))]
    return Step(name, [*command, "--benchmark-json", str(out / f"{name}.json")], limit)


# ---- the summary -----------------------------------------------------------------------------------------------------


def highlights(found: Mapping[str, list[Any]]) -> Iterator[str]:
    """The figures that are looked for first, of what the steps have found so far."""
    for here in found.get("machine", []):
        yield "{gpu}, {cpu}, Python {python}, torch {torch}, triton {triton}, commit {commit}".format(**here)
        if not here["sanitizer"]:
            yield "there is no compute-sanitizer here"
    if checks := found.get("selfcheck"):
        shares = [share for check in checks for share in check["shares"].values()]
        passed = sum(bool(check["passed"]) for check in checks)
        yield f"selfcheck: {passed} of {len(checks)} right, the largest error {max(shares, default=0):.2f} of allowed"
    for name in BENCHMARKS:
        yield from map(_row, found.get(name, []))
    for row in (row for measured in found.get("host_time", []) for row in measured["rows"]):
        yield f"host time: {1e6 * statistics.median(row['seconds']):6.1f} us, {row['implementation']}, {row['what']}"
    for one in found.get("tune", []):
        times = " -> ".join(f"{1e6 * one[key]:.1f}" for key in ("seconds_before", "seconds"))
        tiles = " -> ".join("x".join(map(str, one[key])) for key in ("before", "config"))
        yield f"tune: {one['pass_name']:18} {one['dtype']:9} D={one['head_dim']}: {times} us, {tiles}"
    for profile in found.get("profile", []):
        yield "profile: {part} of {model}, batch {batch}, backward {backward}".format(**profile["task"])
        for one in profile["implementations"]:
            kernels = sorted(one["kernels"].items(), key=lambda item: -item[1]["seconds"])[:6]
            texts = [f"{name} {1e3 * share['seconds']:.3f} ms in {share['launches']}" for name, share in kernels]
            yield "; ".join([f"    {one['label']}: {1e3 * statistics.median(one['seconds']):.3f} ms", *texts])


def _row(row: Mapping[str, Any]) -> str:
    """A row of the benchmarks in a line."""
    ratio = statistics.median(row["eager_seconds"] or [math.nan]) / statistics.median(row["seconds"])
    share = f"{row['share_of_peak']:4.0%} of {row['bound']}"
    return f"{row['implementation']:10}{row['p50_ms']:9.3f} ms,{ratio:7.2f} times eager, {share}: {row['group']}"
