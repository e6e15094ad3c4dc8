"""Loads the native libraries `_C` (CPU) and `_C_cuda`, and remembers why one of them is not there.

Loading a library registers its kernels with torch's dispatcher; nothing in Python calls them directly. A library
that is missing, broken or built for other op schemas never stops the import: its ops fall back to PyTorch, and `status`
says why.
"""

import importlib
import mmap
import warnings
from pathlib import Path

from .schemas import INTERFACE

BUILD_HINT = "build it with `pip install --no-build-isolation .` in the source tree"


def _load(name: str) -> str | None:
    """Loads one library; None when it is in use, else the reason why not."""
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        return (
            f"the native library {name} was not built on this machine ({BUILD_HINT}; its output says what was missing)"
        )
    try:
        # Read before it is loaded: loading registers kernels, and those of other schemas would get wrong arguments.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(f"convit_kernels interface {INTERFACE}".encode()) < 0:
                raise ImportError(f"{path.name} was built from other sources than this package")
        importlib.import_module(f".{name}", __package__)
    except (ImportError, OSError, ValueError) as error:
        reason = f"the native library {name} does not load: {error} ({BUILD_HINT})"
        warnings.warn(f"convit_kernels runs without a native library: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


# name -> None when loaded, else the reason why not
status: dict[str, str | None] = {name: _load(name) for name in ("_C", "_C_cuda")}


def instruction_sets() -> list[str]:
    """Those that the CPU's attention kernels are built for and this processor runs, the fastest first."""
    return list(importlib.import_module("._C", __package__).instruction_sets())


def instruction_set() -> str:
    """The one in use: the fastest, or the one that the environment variable CONVIT_KERNELS_ISA names.

    Raises:
        RuntimeError: that variable names none of `instruction_sets()`.
    """
    return str(importlib.import_module("._C", __package__).instruction_set())
