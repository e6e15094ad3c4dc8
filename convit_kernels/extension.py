"""Loads the native libraries `_C` (CPU) and `_C_cuda`, and remembers why one of them is not there.

Loading a library registers its kernels with torch's dispatcher; nothing in Python calls them directly. A library
that is missing, broken or built for other op schemas never stops the import: its ops fall back to PyTorch, and `status`
says why. One warning says so too, unless the library was left out on purpose or has no GPU to serve.
"""

import importlib
import json
import mmap
import re
import sys
import warnings
from pathlib import Path

import torch

from .schemas import INTERFACE

_HERE = Path(__file__).resolve().parent


def _way_out(library: str) -> str:
    """What to do where a library is missing: within a source tree, that is imported instead of what was installed."""
    if not (_HERE.parent / "setup.py").exists():
        return "install the wheel, or `pip install --no-build-isolation .` in the source tree, where -v shows more"
    build = f"run `python setup.py build_ext --inplace` in {_HERE.parent}"
    folders = [Path(folder).resolve() / "convit_kernels" for folder in sys.path]
    installed = next((path for path in folders if path != _HERE and (path / library).exists()), None)
    if installed is None:
        return build
    return (
        f"Python imports the source tree {_HERE.parent} instead of {installed}, which has it: "
        f"start Python in another folder, or {build}"
    )


def _why_missing(name: str) -> tuple[str, bool]:
    """Why a library was not built, by what setup.py wrote down, and whether that was the wish."""
    report = _HERE / "_build.json"
    if not report.exists():
        return "it was never built here", False
    content = json.loads(report.read_text())
    skipped = content["skipped"].get(name)
    return skipped or content["failed"].get(name, "it was removed"), skipped is not None


def _load(name: str) -> tuple[str, bool] | None:
    """Loads one library; None when it is in use, else the reason why not, and whether that is worth a warning."""
    path = _HERE / f"{name}.abi3.so"
    if not path.exists():
        why, wished = _why_missing(name)
        served = name == "_C" or (torch.version.cuda is not None and torch.cuda.device_count() > 0)
        return f"was not built: {why}", served and not wished
    try:
        # Read before it is loaded: loading registers kernels, and those of other schemas would get wrong arguments.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(f"convit_kernels interface {INTERFACE}".encode()) < 0:
                raise ImportError(f"{path.name} was built from other sources than this package")
        importlib.import_module(f".{name}", __package__)
    except (ImportError, OSError, ValueError) as error:
        return f"does not load: {error}", True
    return None


# name -> None when loaded, else the reason why not
status: dict[str, str | None] = {}
for _name in ("_C", "_C_cuda"):
    status[_name] = None
    if _problem := _load(_name):
        status[_name] = _reason = f"the native library {_name} {_problem[0]} ({_way_out(f'{_name}.abi3.so')})"
        if _problem[1]:
            warnings.warn(f"convit_kernels runs without a native library: {_reason}", RuntimeWarning, stacklevel=2)


def _covers(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture as nvcc was given it ("8.0", "9.0a", "12.0+PTX") runs on a GPU."""
    major, minor, variant, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", built).groups()  # type: ignore[union-attr]
    oldest = int(major), int(minor)
    if variant == "a":
        return capability == oldest
    # machine code runs on later GPUs of its own generation, what is compiled when it is loaded on all later ones
    return capability >= oldest and (capability[0] == oldest[0] or (ptx is not None and not variant))


def lacks_code() -> bool:
    """Whether `_C_cuda` is loaded but has no code for one of this machine's GPUs. Initialises CUDA.

    `status` then has the reason, and one warning says it.
    """
    path = _HERE / "_C_cuda.abi3.so"
    if status["_C_cuda"] is not None:
        return False
    built = re.search(rb"convit_kernels architectures ([^\0]+)", path.read_bytes())
    if built is None:
        return False
    names = built[1].decode().split()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(_covers(name, capability) for name in names):
            status["_C_cuda"] = reason = (
                f"the native library _C_cuda has no code for {torch.cuda.get_device_name(index)} (sm_{capability[0]}"
                f"{capability[1]}), only for {', '.join(names)}; PyTorch makes the tables (build it with "
                f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]})"
            )
            warnings.warn(f"convit_kernels runs without a native library: {reason}", RuntimeWarning, stacklevel=2)
            return True
    return False


def instruction_sets() -> list[str]:
    """Those that the CPU's attention kernels are built for and this processor runs, the fastest first."""
    return list(importlib.import_module("._C", __package__).instruction_sets())


def instruction_set() -> str:
    """The one in use: the fastest, or the one that the environment variable CONVIT_KERNELS_ISA names.

    Raises:
        RuntimeError: that variable names none of `instruction_sets()`.
    """
    return str(importlib.import_module("._C", __package__).instruction_set())


def units_by_dtype() -> dict[str, str]:
    """The instruction set whose kernels serve each dtype: one with a few of its own leaves the rest to its base.

    Raises:
        RuntimeError: as `instruction_set`.
    """
    return dict(importlib.import_module("._C", __package__).units_by_dtype())
