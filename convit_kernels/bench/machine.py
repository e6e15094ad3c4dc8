"""What a measurement was made on."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The package's git commit, with "-dirty" where files differ from it; None outside its own repository."""
    here = str(Path(__file__).parent)
    if _output("git", "-C", here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed somewhere inside another project's repository
    head = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and dirty else head


@lru_cache(maxsize=1)
def _gpu() -> dict[str, Any]:
    """The first GPU's name, driver and clocks in MHz; None where unknown."""
    if not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "gpu_clocks_mhz": None}
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    answer = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    driver, *clocks = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else [None]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "gpu_clocks_mhz": dict(zip(("sm", "sm_max", "memory"), clocks, strict=True)) if clocks else None,
    }


def machine() -> dict[str, Any]:
    """What a measurement was made on: processor, clocks, load, threads, GPU, versions, commit."""
    clock = _cpu("cpu MHz")
    return {
        "cpu": _cpu("model name") or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_clock_mhz": float(clock) if clock else None,
        "cores": os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        **_gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "convit_kernels": __version__,
        "commit": commit(),
    }


def describe(machine: Mapping[str, Any], loads: Sequence[float] = ()) -> str:
    """A machine in a line; `loads` are what was seen of its load while something was measured."""
    low, high = (f"{load:g}" for load in (min(loads), max(loads))) if loads else ("", "")
    parts = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}" if machine["gpu"] else None,
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads",
        f"{machine['cpu_clock_mhz']:.0f} MHz" if machine["cpu_clock_mhz"] else None,
        f"torch {machine['torch']}",
        f"commit {machine['commit']}" if machine["commit"] else None,
        f"load {low if low == high else f'{low} to {high}'} on {machine['cores']} cores" if loads else None,
    ]
    return ", ".join(part for part in parts if part)
