"""timm's small ConViT and the same with our layers, for tests of one beside the other."""

import copy
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import convit_kernels as ck

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 8,  # a head
    "num_heads": 4,
    "depth": 3,
    "local_up_to_layer": 2,
    "num_classes": 5,
}
DIM = 32
Kind = str
each_kind = pytest.mark.parametrize("kind", ["fused", "replaced"])


def create(name: str = "convit_tiny", **options: Any) -> Any:
    return timm.create_model(name, **(TINY | options)).eval()


@cache
def _pair(kind: Kind, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    theirs = create(**dict(options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # away from the nearly uniform maps of the start
            if "gating" in name or "pos_proj.weight" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            if ".qk." in name or ".qkv." in name:
                parameter.mul_(4)
    theirs.double()
    if kind == "replaced":
        ours = copy.deepcopy(theirs)
        assert ck.replace_gpsa(ours) == 2
    else:
        ours = create("convit_tiny_fused", **dict(options)).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def pair(kind: Kind, **options: Any) -> tuple[Any, Any]:
    """timm's model and ours with the same weights, float64."""
    return copy.deepcopy(_pair(kind, tuple(options.items())))


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 32, 32)), dtype=torch.float64)


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
