"""Gated positional self-attention (GPSA) of ConViT: fast, exact, a drop-in for the reference layer."""

import importlib
from types import ModuleType

from .attention import Backend, backends, gpsa_attention
from .gpsa import GPSA
from .relpos import dense_position_table, relative_position_tables
from .replace import replace_gpsa

__version__ = "0.2.0"

__all__ = [  # without the modules of _ON_DEMAND, so that `from convit_kernels import *` needs torch alone
    "GPSA",
    "Backend",
    "backends",
    "dense_position_table",
    "gpsa_attention",
    "relative_position_tables",
    "replace_gpsa",
]


_ON_DEMAND = ("locality", "models", "parallel")


def __getattr__(name: str) -> ModuleType:
    """They are imported when they are first asked for: `models` and `locality` need timm, `parallel` takes a second."""
    if name in _ON_DEMAND:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
