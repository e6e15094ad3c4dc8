"""Linear layers quantised by torchao, before and after replacing."""

import copy

import pytest
import torch
import torchao
from small import images, replaced, same, timm_model
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import convit_kernels as ck

CONFIGS = {"weights": Int8WeightOnlyConfig, "weights and activations": Int8DynamicActivationInt8WeightConfig}


@pytest.mark.parametrize("first", ["quantised", "replaced"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.situation(
    "Tools",
    "torchao's `quantize_` to int8, before or after replacing",
    timm="every linear layer is quantised",
    ours="the same outputs; the map is built, as `pos_proj` has to be called",
)
def test_torchao(first, config):
    theirs = timm_model()
    mine = copy.deepcopy(theirs) if first == "quantised" else replaced(theirs)
    for model in (theirs, mine):
        quantize_(model, CONFIGS[config]())
    if first == "quantised":
        assert ck.replace_gpsa(mine) == 2
    weights = [getattr(mine.blocks[0].attn, name).weight for name in ("qk", "v", "proj", "pos_proj")]
    assert all(isinstance(weight, torchao.utils.TorchAOBaseTensor) for weight in weights)
    # activations are rounded to 255 values, so that rounding in their last bit may show
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if config == "weights" else {"rtol": 0, "atol": 0.05}
    with torch.no_grad():
        torch.testing.assert_close(mine(images()), theirs(images()), **tolerance)


def test_a_quantised_state_dict_loads():
    theirs, mine = timm_model(), replaced()
    for parameter in mine.parameters():
        torch.nn.init.ones_(parameter)
    for model in (theirs, mine):
        quantize_(model, Int8WeightOnlyConfig())
    mine.load_state_dict(theirs.state_dict(), assign=True)
    with torch.no_grad():
        same(mine(images()), theirs(images()))
