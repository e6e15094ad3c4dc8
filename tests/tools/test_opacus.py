"""Differentially private training by opacus, which needs a gradient of every parameter for each image."""

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from small import MODELS, images, same, timm_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def without_buffers(model: nn.Module) -> nn.Module:
    """The coordinates that timm's layer keeps for its next call as a plain attribute."""
    for layer in model.modules():
        if layer._buffers.pop("rel_indices", None) is not None:
            layer.rel_indices = layer.get_rel_indices(16)
    return model


def freeze(model: nn.Module, frozen: bool) -> nn.Module:
    """Without trainable parameters of its own, a model is no single layer to opacus: each of its layers is one."""
    for name in ("pos_embed", "cls_token"):
        getattr(model, name).requires_grad_(not frozen)
    return model.train()


def by_hand(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of each image alone, (images, ...)."""
    found: dict[str, list[Tensor]] = {}
    for x, y in zip(images(), torch.arange(3), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(name, []).append(parameter.grad)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "embeddings frozen"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.situation(
    "Tools",
    "opacus: `GradSampleModule`, by its hooks or all by `torch.func`",
    timm="refused, as its coordinates are a buffer; made a plain attribute, it works",
    ours="works at once, the same gradients for each image",
)
def test_gradients_for_each_image(make, frozen):
    expected = by_hand(freeze(timm_model(), frozen))
    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(freeze(timm_model(), frozen))
    for force_functorch in (False, True):
        model = freeze(MODELS[make](), frozen)
        wrapped = GradSampleModule(model, force_functorch=force_functorch)
        F.cross_entropy(wrapped(images()), torch.arange(3)).backward()
        same({name: model.get_parameter(name).grad_sample for name in expected}, expected)


def private_steps(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """The parameters after an epoch of clipped gradients, without noise, so that it can be compared."""
    loader = DataLoader(TensorDataset(images(6), torch.arange(6) % 5), batch_size=3)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model._module.named_parameters()}


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("make", MODELS)
def test_private_training(make, mode):
    expected = private_steps(freeze(without_buffers(timm_model()), True), mode)
    before = timm_model().head.weight
    assert (expected["head.weight"] - before).abs().max() > 1e-3
    same(private_steps(freeze(MODELS[make](), True), mode), expected)
