"""Gated positional self-attention (GPSA) of ConViT: fast, exact, a drop-in for the reference layer."""

import importlib
from types import ModuleType

from .attention import Backend, backends, gpsa_attention
from .gpsa import GPSA
from .relpos import dense_position_table, relative_position_tables
from .replace import replace_gpsa

__all__ = [
    "GPSA",
    "Backend",
    "backends",
    "dense_position_table",
    "gpsa_attention",
    "locality",
    "models",
    "relative_position_tables",
    "replace_gpsa",
]


def __getattr__(name: str) -> ModuleType:
    """`models` and `locality` are imported when they are first asked for: the layer needs torch alone."""
    if name in ("locality", "models"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
