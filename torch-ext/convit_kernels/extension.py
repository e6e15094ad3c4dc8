"""Takes the place of the package's loader: `_ops` has loaded this build's one library, named as its ops' namespace."""

import importlib
from types import ModuleType

from ._ops import ops


def _library() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f".{ops.name}", __package__), "this build has no kernels for that device"
    except ImportError as error:
        return None, f"this build has no native library: {error}"


_native, _reason = _library()
_on_cpu = hasattr(_native, "instruction_sets")

# library -> None when loaded, else the reason why not
status: dict[str, str | None] = {
    "_C": None if _on_cpu else _reason,
    "_C_cuda": None if _native is not None and not _on_cpu else _reason,
}


def lacks_code() -> bool:
    """Whether the library has no code for one of this machine's GPUs: the hub gives a machine the build that has."""
    return False


def instruction_sets() -> list[str]:
    """Those that the CPU's attention kernels are built for and this processor runs, the fastest first."""
    return list(_native.instruction_sets()) if _on_cpu else []


def instruction_set() -> str:
    """The one in use."""
    if not _on_cpu:
        raise RuntimeError(status["_C"])
    return str(_native.instruction_set())


def units_by_dtype() -> dict[str, str]:
    """The instruction set whose kernels serve each dtype."""
    return dict(_native.units_by_dtype()) if _on_cpu else {}
