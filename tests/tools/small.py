"""A small ConViT of timm's, the same with its GPSA layers replaced, and the package's own."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convit import ConVit
from torch import Tensor, nn

import convit_kernels as ck

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}


def timm_model() -> nn.Module:
    """Three blocks, the last without position, with random parameters."""
    torch.manual_seed(0)
    model = ConVit(embed_dim=8, num_classes=5, **SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def replaced(model: nn.Module | None = None) -> nn.Module:
    """A copy of timm's model with our layers."""
    model = timm_model() if model is None else copy.deepcopy(model)
    assert ck.replace_gpsa(model) == 2
    return model


def own_model() -> nn.Module:
    """The package's own model with timm's parameters."""
    model = ck.models.ConViT(embed_dim=32, num_classes=5, **SIZES).eval()
    model.load_state_dict(timm_model().state_dict())
    return model


MODELS = {"replaced": replaced, "ck.models": own_model}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """Some steps of what has a gradient, on three images of three classes."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(3)).backward()
        optimizer.step()
    return model


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
