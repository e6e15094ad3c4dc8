"""`info`: what can run on this machine, and what cannot and why."""

import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .. import extension, linear
from ..attention import backends
from ..backends import cpu
from ..bench.machine import machine
from ..inputs import FLOATING
from .output import console


def native_libraries() -> dict[str, str]:
    """What became of each native library: in use, loaded but of no use here, or the reason why it is missing."""
    states = {}
    if torch.cuda.is_available():
        torch.cuda.init()  # which finds out whether there is code for this GPU
    for name, reason in extension.status.items():
        if reason is None and name == "_C_cuda" and not torch.cuda.is_available():
            build = "torch sees no GPU" if torch.version.cuda else "this torch has no CUDA"
            states[name] = f"loaded, but idle: {build}"
        else:
            states[name] = reason or "in use"
    return states


def cpu_kernels() -> dict[str, str]:
    """The instruction set that serves each dtype on the CPU, or why there is none; nothing without the library."""
    if extension.status["_C"] is not None:
        return {}
    try:
        return extension.units_by_dtype()
    except RuntimeError as error:
        return {"cannot run": str(error)}


def composite_from() -> dict[str, dict[str, Any]]:
    """The dtypes that backend=None leaves to the composite on the CPU, from which size on, and why."""
    if extension.status["_C"] is not None:
        return {}
    try:
        limits = {str(dtype).removeprefix("torch."): cpu.limit(dtype) for dtype in FLOATING}
    except RuntimeError:  # which cpu_kernels reports
        return {}
    return {dtype: {"key_bytes": size, "reason": why} for dtype, (size, why) in limits.items() if why}


def linear_layers() -> dict[str, Any]:
    """Which library multiplies the layer's float32 projections on the CPU, and why."""
    try:
        by_onednn, reason = linear.choice()
    except ValueError as error:
        return {"library": None, "reason": str(error)}
    return {"library": "oneDNN" if by_onednn else "PyTorch's own", "reason": reason}


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What can run on this machine, and what cannot and why."""
    report: dict[str, Any] = {
        "machine": machine(),
        "backends": [backend._asdict() for backend in backends()],
        "cpu_kernels": cpu_kernels(),
        "composite_from": composite_from(),
        "linear_layers": linear_layers(),
        "native_libraries": native_libraries(),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title="Machine", show_header=False)
    kernels = {f"CPU kernels, {dtype}": name for dtype, name in report["cpu_kernels"].items()}
    for dtype, limit in report["composite_from"].items():
        size = f"{limit['key_bytes'] / 1e3:g} kB"
        kernels[f"CPU kernels, {dtype}"] += f"; composite where a head's keys have {size} or more: {limit['reason']}"
    layers = {"linear layers, float32": ": ".join(filter(None, report["linear_layers"].values()))}
    for key, value in (report["machine"] | kernels | layers).items():
        table.add_row(key, "none" if value is None else str(value))
    console.print(table)
    table = Table("backend", "can run", "why not", title="Backends, fastest first")
    for backend in report["backends"]:
        table.add_row(backend["name"], "yes" if backend["available"] else "no", backend["reason"])
    console.print(table)
    table = Table("library", "state", title="Native libraries")
    for name, state in report["native_libraries"].items():
        table.add_row(name, state)
    console.print(table)
