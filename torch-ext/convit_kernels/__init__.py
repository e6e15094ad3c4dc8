"""Gated positional self-attention (GPSA) of ConViT, as a kernel of a hub: the layer, and what it is made of."""

from . import layers
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
    "layers",
    "relative_position_tables",
    "replace_gpsa",
]
