"""Adapters of peft on every linear layer, pos_proj among them."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small import images, replaced, same, timm_model, train
from torch import nn

import convit_kernels as ck

CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"]),
    "LoRA, biases too": lambda: LoraConfig(r=4, target_modules="all-linear", bias="all"),
    "DoRA": lambda: LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules="all-linear"),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["qk", "v", "proj"]),
}


def adapted(model: nn.Module, config: str) -> nn.Module:
    torch.manual_seed(7)
    return get_peft_model(model, CONFIGS[config]()).eval()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.situation(
    "Tools",
    'peft\'s adapters, LoRA with `target_modules="all-linear"` for example: trained, saved, loaded, merged',
    timm="works",
    ours="the same outputs; the map is built while `pos_proj` has an adapter, and no longer once it is merged",
)
def test_adapters(config, tmp_path):
    x, theirs, mine = images(), adapted(timm_model(), config), adapted(replaced(), config)
    same(mine(x), theirs(x))
    for model in (theirs, mine):
        before = model(x)
        train(model)
        assert (model(x) - before).abs().max() > 0.1
    expected = theirs(x)
    same(mine(x), expected)
    with mine.disable_adapter(), theirs.disable_adapter():
        same(mine(x), theirs(x))
    mine.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "timm")
    same(PeftModel.from_pretrained(timm_model(), tmp_path / "ours").eval()(x), expected)
    same(PeftModel.from_pretrained(replaced(), tmp_path / "timm").eval()(x), expected)
    merged = mine.merge_and_unload()
    assert merged.blocks[0].attn.why_dense() == ""
    same(merged(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_that_is_replaced_with_its_adapters(config):
    theirs = train(adapted(timm_model(), config))
    expected = theirs(images())
    assert ck.replace_gpsa(theirs) == 2
    same(theirs(images()), expected)
