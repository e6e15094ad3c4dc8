"""Weights from files and folders, as timm loads them: `pretrained_cfg`, `save_for_hf`, whole models."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm_pairs import DIM, TINY, Kind, assert_same, create, each_kind, images, pair
from torch import nn

from convit_kernels import models


def saved(model: nn.Module, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


class TestWeights:
    @pytest.mark.situation(
        "timm",
        "`pretrained=True` with a file in `pretrained_cfg` or `pretrained_cfg_overlay`",
        timm="loads",
        ours="the same, for every size, published or not",
    )
    @pytest.mark.parametrize("name", ["convit_tiny", "convit_tiny_fused", "convit_small_plus_fused", "deit_tiny_fused"])
    @pytest.mark.parametrize("source", ["pretrained_cfg", "pretrained_cfg_overlay"])
    def test_of_a_file(self, name: str, source: str, tmp_path: Path) -> None:
        sizes = {key: TINY[key] for key in ("img_size", "patch_size", "embed_dim", "num_heads", "depth")}
        sizes |= {"local_up_to_layer": 0 if "deit" in name else 2}
        sizes |= {"embed_dim": DIM} if "deit" in name else {}
        model = timm.create_model(name, num_classes=5, **sizes)
        file = saved(model, tmp_path)
        again = timm.create_model(name, pretrained=True, **{source: {"file": file, "num_classes": 5}}, **sizes)
        assert again.head.out_features == 5
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        head = {"classifier": "head", "num_classes": 5}
        other = timm.create_model(name, pretrained=True, num_classes=7, **{source: {"file": file, **head}}, **sizes)
        assert torch.equal(other.norm.weight, model.norm.weight)
        assert other.head.out_features == 7

    def test_of_a_convolutional_stem(self, tmp_path: Path) -> None:
        model = create("convit_tiny_fused", stem="conv")
        file = {"file": saved(model, tmp_path), "num_classes": 5}
        again = create("convit_tiny_fused", stem="conv", pretrained=True, pretrained_cfg_overlay=file)
        assert torch.equal(again.patch_embed.proj[0].conv.weight, model.patch_embed.proj[0].conv.weight)

    @pytest.mark.situation(
        "timm",
        '`save_for_hf`, then `create_model("local-dir:…", pretrained=True)`, with other classes or channels too',
        timm="loads",
        ours="the same",
    )
    @pytest.mark.parametrize("name", ["convit_tiny", "convit_tiny_fused", "convit_base_plus_fused"])
    def test_of_a_folder(self, name: str, tmp_path: Path) -> None:
        model = create(name)
        save_for_hf(model, str(tmp_path))
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert type(again) is type(model)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(x), model(x))
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7, in_chans=1).eval()
        assert torch.equal(other.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
        assert other(x[:, :1]).shape == (2, 7)

    @pytest.mark.situation(
        "timm",
        "loads weights for images of 16 x 64 pixels into a model for 32 x 32: both have 16 patches",
        timm="loads the positional embedding as it is: rows and columns are mixed up",
        ours="`convit_tiny_fused` interpolates it, where the folder says the size",
    )
    def test_positions_on_another_grid_of_as_many_patches(self, tmp_path: Path) -> None:
        for name in ("convit_tiny", "convit_tiny_fused"):
            model = create(name, img_size=(16, 64))
            save_for_hf(model, str(tmp_path))
            again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=32)
            assert torch.equal(again.pos_embed, model.pos_embed) == (name == "convit_tiny")
        expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
        torch.testing.assert_close(again.pos_embed, expected)

    def test_positions_of_a_file(self, tmp_path: Path) -> None:
        """A file does not say its grid: the model's own where the number fits, or what the caller says, or a square."""
        model = create("convit_tiny_fused", img_size=(16, 64))
        file = {"file": saved(model, tmp_path), "num_classes": 5}
        again = create("convit_tiny_fused", img_size=(16, 64), pretrained=True, pretrained_cfg_overlay=file)
        assert torch.equal(again.pos_embed, model.pos_embed)
        larger = create("convit_tiny_fused", img_size=64, pretrained=True, pretrained_cfg_overlay=file)
        square = timm.layers.resample_abs_pos_embed(model.pos_embed, [8, 8], [4, 4], num_prefix_tokens=0)
        torch.testing.assert_close(larger.pos_embed, square)
        told = file | {"input_size": (3, 16, 64)}
        larger = create("convit_tiny_fused", img_size=64, pretrained=True, pretrained_cfg_overlay=told)
        expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [8, 8], [2, 8], num_prefix_tokens=0)
        torch.testing.assert_close(larger.pos_embed, expected)
        wide = {"file": saved(create("convit_tiny_fused", img_size=(16, 24)), tmp_path), "num_classes": 5}
        with pytest.raises(ValueError, match=r"6 patches, neither a square nor the model's 4 x 4: .*input_size"):
            create("convit_tiny_fused", pretrained=True, pretrained_cfg_overlay=wide)

    def test_published_positions_are_those_of_a_square(self) -> None:
        """7 x 28 patches are as many as 14 x 14."""
        model = timm.create_model("convit_tiny_fused", img_size=(112, 448), depth=1, local_up_to_layer=0)
        state = {"pos_embed": torch.randn(1, 196, 192)}
        expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [7, 28], [14, 14], num_prefix_tokens=0)
        assert torch.equal(models.checkpoint_filter_fn(state, model)["pos_embed"], expected)

    @each_kind
    @pytest.mark.parametrize("way", ["state_dict", "pickle"])
    @pytest.mark.situation("timm", "`torch.save` of a whole model, and `deepcopy`", timm="loads", ours="the same")
    def test_whole_models(self, kind: Kind, way: str, tmp_path: Path) -> None:
        theirs, ours = pair(kind)
        x = images()
        if way == "pickle":
            torch.save(ours, tmp_path / "model.pt")
            again = torch.load(tmp_path / "model.pt", weights_only=False)
        else:
            again = copy.deepcopy(theirs)
            again.load_state_dict(ours.state_dict(), strict=True)
        assert_same(again(x), theirs(x))
        assert_same(copy.deepcopy(ours)(x), theirs(x))
