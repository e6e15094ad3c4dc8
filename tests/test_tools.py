"""What PyTorch's own tools do to a model, before and after its layers are replaced."""

import copy

import pytest
import torch
from timm.models.convit import ConVit
from torch import nn
from torch.ao.quantization import quantize_dynamic

import convit_kernels as ck


def timm_model() -> nn.Module:
    model = ConVit(
        img_size=32, patch_size=8, embed_dim=8, depth=3, num_heads=4, num_classes=5, local_up_to_layer=2
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("first", ["quantised", "replaced"])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.situation(
    "Tools",
    "`quantize_dynamic` over all linear layers, before or after replacing",
    timm="works on a model that was called before: the coordinates are made where a weight is",
    ours="the same outputs; the map is built, as `pos_proj` has to be called",
)
def test_dynamic_quantisation_of_every_linear_layer(first, dtype):
    theirs, x = timm_model(), torch.randn(2, 3, 32, 32)
    mine = copy.deepcopy(theirs)
    theirs(x)
    theirs = quantize_dynamic(theirs, {nn.Linear}, dtype=dtype)
    if first == "replaced":
        ck.replace_gpsa(mine)
    mine = quantize_dynamic(mine, {nn.Linear}, dtype=dtype)
    if first == "quantised":
        with pytest.raises(AttributeError):
            mine(x)
        assert ck.replace_gpsa(mine) == 2
    assert not any(isinstance(layer, nn.Linear) for layer in mine.modules())
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5 if dtype == torch.float16 else 0.02)
