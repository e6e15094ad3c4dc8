"""Models of which accelerate keeps the parameters elsewhere and brings them for a call."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from small import SIZES, images, replaced, same, timm_model
from torch import nn

import convit_kernels as ck


def offloaded(model: nn.Module, how: str, folder: str) -> nn.Module:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    parts = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    parts |= {"pos_embed": "cpu", "cls_token": "cpu", "blocks.0": "disk", "blocks.1": "disk", "blocks.2": "cpu"}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.situation(
    "Tools",
    "accelerate's `cpu_offload`, `disk_offload`, and `dispatch_model` with blocks on the disk",
    timm="an error, unless it was called before: its coordinates are made where the absent weights are",
    ours="the outputs of the model in memory; the map is built, as `pos_proj` has to be called",
)
def test_parameters_that_come_for_a_call(how, tmp_path):
    expected, model = timm_model()(images()), replaced()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        offloaded(timm_model(), how, str(tmp_path / "timm"))(images())
    offloaded(model, how, str(tmp_path / "ours"))
    assert model.blocks[0].attn.gating_param.is_meta
    with torch.no_grad():
        same(model(images()), expected)
    if how == "dispatch_model":
        return
    remove_hook_from_submodules(model)
    assert not model.blocks[0].attn.gating_param.is_meta
    assert model.blocks[0].attn.why_dense() == ""
    same(model(images()), expected)


def test_a_model_whose_parameters_are_away_is_replaced_after_they_are_back():
    model = timm_model()
    expected = model(images())
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(TypeError, match="forward has been set on the layer itself: undo that first"):
        ck.replace_gpsa(model)
    remove_hook_from_submodules(model)
    assert ck.replace_gpsa(model) == 2
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        same(model(images()), expected)


@pytest.mark.situation(
    "Tools",
    "accelerate's `load_checkpoint_and_dispatch` into a model without parameters",
    timm="an error: its coordinates are made where the absent weights are",
    ours="the checkpoint's outputs, with `ck.models`",
)
def test_a_checkpoint_that_is_loaded_block_by_block(tmp_path):
    theirs = timm_model()
    torch.save(theirs.state_dict(), tmp_path / "weights.bin")
    parts = {name: "cpu" for name, _ in theirs.named_children() if name != "blocks"}
    parts |= {"pos_embed": "cpu", "cls_token": "cpu", "blocks.0": "disk", "blocks.1": "disk", "blocks.2": "cpu"}
    with accelerate.init_empty_weights():
        model = ck.models.ConViT(embed_dim=32, num_classes=5, **SIZES).eval()
        absent = type(theirs)(embed_dim=8, num_classes=5, **SIZES).eval()
    for each in (model, absent):
        accelerate.load_checkpoint_and_dispatch(
            each,
            str(tmp_path / "weights.bin"),
            device_map=dict(parts),
            offload_folder=str(tmp_path / type(each).__name__),
        )
    with torch.no_grad():
        same(model(images()), theirs(images()))
        with pytest.raises(NotImplementedError, match="meta"):
            absent(images())
