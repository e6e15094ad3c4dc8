"""timm's ConViT after replace_gpsa: what people do with the model around the layer goes on as before."""

import copy

import pytest
import timm
import torch
from foreign import perturbed, timm_layer
from timm.models import convit
from torch import nn

import convit_kernels as ck


def model(**options) -> nn.Module:
    """A small ConViT whose gates and positions matter."""
    sizes = {"img_size": 64, "embed_dim": 8, "num_heads": 4, "depth": 4, "local_up_to_layer": 3, "num_classes": 5}
    return perturbed(convit.ConVit(**{**sizes, **options})).eval()


def pair(**options) -> tuple[nn.Module, nn.Module]:
    theirs = model(**options)
    ours = copy.deepcopy(theirs)
    assert ck.replace_gpsa(ours) == 3
    return theirs, ours


def same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class TestPositionsThatAreRead:
    @pytest.mark.situation(
        "timm",
        "reading `layer.rel_indices` after a call",
        timm="a buffer (1, N, N, 3)",
        ours="the same values, made when they are read; not in the state_dict",
    )
    def test_rel_indices_are_the_reference_s(self):
        theirs, mine = timm_layer(), [ck.GPSA(32, 4), ck.GPSA.from_module(timm_layer())]
        for tokens in (16, 9):
            x = torch.randn(2, tokens, 32)
            theirs(x)
            for each in mine:
                each(x)
                assert torch.equal(each.rel_indices, theirs.rel_indices)
                assert torch.equal(each.get_rel_indices(25), theirs.get_rel_indices(25))
        assert list(mine[0].state_dict()) == list(theirs.state_dict())
        assert not list(mine[0].buffers())

    def test_before_the_first_call(self):
        assert torch.equal(ck.GPSA(32, 4).rel_indices, timm_layer().rel_indices)
        assert torch.equal(ck.GPSA.from_module(timm_layer()).rel_indices, timm_layer().rel_indices)
        assert ck.GPSA(32, 4, grid_size=(2, 3)).rel_indices.shape == (1, 6, 6, 3)

    def test_of_the_last_call_before_replacing(self):
        """timm's buffer itself is not taken over: N x N x 3 numbers for each layer, which nothing here needs."""
        layer = timm_layer()
        layer(torch.randn(2, 25, 32))
        mine = ck.GPSA.from_module(layer)
        assert torch.equal(mine.rel_indices, layer.rel_indices)
        assert not list(mine.buffers())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_the_layer_s_dtype(self, dtype):
        theirs = timm_layer().to(dtype)
        mine, x = ck.GPSA(32, 4).to(dtype), torch.randn(1, 400, 32).to(dtype)
        theirs(x)
        mine(x)
        assert mine.rel_indices.dtype == dtype
        assert torch.equal(mine.rel_indices, theirs.rel_indices)

    def test_on_the_grid_of_the_last_call(self):
        mine = ck.GPSA(32, 4)
        mine(torch.randn(1, 16, 32), grid_size=(2, 8))
        assert torch.equal(mine.rel_indices, ck.GPSA(32, 4, grid_size=(2, 8)).rel_indices)

    @pytest.mark.situation(
        "timm",
        "a model on the meta device, whose weights come later",
        timm="runs once they are there",
        ours="replaced there, it does the same",
    )
    def test_without_values(self):
        options = {"img_size": 64, "embed_dim": 8, "depth": 3, "local_up_to_layer": 2}
        whole, theirs, mine = (
            timm.create_model("convit_tiny", device=device, **options).eval() for device in ("cpu", "meta", "meta")
        )
        assert ck.replace_gpsa(mine) == 2
        assert all(parameter.is_meta for parameter in mine.parameters())
        for each in (theirs, mine):
            each.load_state_dict(whole.state_dict(), assign=True)
            torch.testing.assert_close(each(IMAGES), whole(IMAGES), rtol=1e-4, atol=1e-5)

    def test_in_a_model(self):
        theirs, ours = pair()
        for each in (theirs, ours):
            each(IMAGES)
        for before, after in zip(theirs.blocks[:3], ours.blocks[:3], strict=True):
            assert torch.equal(before.attn.rel_indices, after.attn.rel_indices)


class TestImageSizes:
    @pytest.mark.situation(
        "timm",
        "`img_size=(64, 32)`",
        timm="fails at the first call: it takes every number of tokens for a square",
        ours="runs after replace_gpsa, on the model's own grid",
    )
    def test_images_that_are_not_square(self):
        theirs, ours = pair(img_size=(64, 32))
        images = torch.randn(2, 3, 64, 32)
        with pytest.raises(RuntimeError, match="expanded size"):
            theirs(images)
        expected = copy.deepcopy(ours)
        for block in expected.blocks[:3]:
            block.attn.grid_size = (4, 2)
        same(ours(images), expected(images))
        assert torch.equal(copy.deepcopy(ours)(images), ours(images))

    def test_a_number_of_tokens_that_is_a_square_is_one_as_in_timm(self):
        theirs, ours = pair(img_size=(128, 32))
        images = torch.randn(2, 3, 128, 32)  # 8 x 2 patches, which timm's layer takes for 4 x 4
        same(ours(images), theirs(images))

    def test_the_grid_is_that_of_the_model_around_the_layer(self):
        both = nn.ModuleDict({"tall": model(img_size=(64, 32)), "wide": nn.Sequential(model(img_size=(32, 64)))})
        assert ck.replace_gpsa(both) == 6
        assert both["tall"].blocks[0].attn.expected_grid == (4, 2)
        assert both["wide"][0].blocks[0].attn.expected_grid == (2, 4)

    def test_a_patch_embedding_that_tells_its_sizes_as_the_official_one_does(self):
        made = model(img_size=(64, 32))
        del made.patch_embed.grid_size
        ck.replace_gpsa(made)
        assert made.blocks[0].attn.expected_grid == (4, 2)

    @pytest.mark.situation(
        "timm",
        "`patch_embed.proj` replaced by one of another stride, without positional embedding",
        timm="runs for square images",
        ours="the same",
    )
    @pytest.mark.parametrize("first", ["replaced", "changed"])
    def test_another_number_of_tokens(self, first):
        results = []
        for ours in (False, True):
            torch.manual_seed(1)
            made = model(use_pos_embed=False)
            if ours and first == "replaced":
                ck.replace_gpsa(made)
            made.patch_embed.proj = nn.Conv2d(3, 32, 8, 8)
            if ours and first == "changed":
                ck.replace_gpsa(made)
            results.append(made(IMAGES))
        same(results[1], results[0])

    def test_a_square_number_in_a_model_for_others(self):
        made = model(img_size=(64, 32), use_pos_embed=False)
        expected = copy.deepcopy(made)
        ck.replace_gpsa(made)
        for each in (made, expected):
            each.patch_embed.img_size = (64, 64)
        same(made(IMAGES), expected(IMAGES))


class TestSurgery:
    @pytest.mark.situation(
        "timm", "blocks taken into nn.Sequential or a loop of one's own", timm="runs", ours="the same"
    )
    def test_blocks_in_a_sequence_and_in_a_loop(self):
        theirs, ours = pair()
        x = theirs.patch_embed(IMAGES)
        expected = nn.Sequential(*theirs.blocks[:3])(x)
        same(nn.Sequential(*ours.blocks[:3])(x), expected)
        y = x
        for block in ours.blocks[:3]:
            y = y + block.attn(block.norm1(y))
            y = y + block.mlp(block.norm2(y))
        same(y, expected)

    @pytest.mark.situation("timm", "blocks deleted, moved and copied", timm="runs", ours="the same")
    @pytest.mark.parametrize("first", ["replaced", "changed"])
    def test_blocks_deleted_moved_and_copied(self, first):
        def change(made):
            made.blocks[0], made.blocks[1] = made.blocks[1], made.blocks[0]
            made.blocks[2] = copy.deepcopy(made.blocks[0])
            del made.blocks[1]
            made.local_up_to_layer = 2
            made.blocks[0].attn.v.weight.data *= 2

        theirs = model()
        ours = copy.deepcopy(theirs)
        if first == "replaced":
            ck.replace_gpsa(ours)
        change(theirs)
        change(ours)
        if first == "changed":
            assert ck.replace_gpsa(ours) == 2
        same(ours(IMAGES), theirs(IMAGES))

    @pytest.mark.situation(
        "timm",
        "`model.apply(model._init_weights)`, `model.head.apply(...)`, `local_init()` of each layer",
        timm="sets linear layers and norms, then the layers as convolutions",
        ours="the same values from the same seed",
    )
    def test_initialised_anew(self):
        theirs, ours = pair()
        for each in (theirs, ours):
            torch.manual_seed(2)
            each.apply(each._init_weights)
            each.head.apply(each._init_weights)
            for module in each.modules():
                if hasattr(module, "local_init"):
                    module.local_init()
        for (name, before), after in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
            assert torch.equal(before, after), name

    @pytest.mark.situation(
        "timm", "`forward_intermediates`, `reset_classifier`, `prune_intermediate_layers`", timm="run", ours="the same"
    )
    def test_the_model_s_own_methods(self):
        theirs, ours = pair()
        (last, between), (our_last, our_between) = (
            each.forward_intermediates(IMAGES, indices=[0, 2]) for each in (theirs, ours)
        )
        same(our_last, last)
        for mine, expected in zip(our_between, between, strict=True):
            same(mine, expected)
        for each in (theirs, ours):
            torch.manual_seed(3)
            each.reset_classifier(3, "avg")
        same(ours(IMAGES), theirs(IMAGES))
        for each in (theirs, ours):
            each.prune_intermediate_layers([1], prune_head=True)
        same(ours.forward_features(IMAGES), theirs.forward_features(IMAGES))

    @pytest.mark.situation("timm", "`create_model(..., features_only=True)`", timm="runs", ours="the same")
    def test_features_only(self):
        options = {"img_size": 64, "embed_dim": 8, "depth": 4, "local_up_to_layer": 3}
        theirs = timm.create_model("convit_tiny", features_only=True, out_indices=(1, 2), **options).eval()
        ours = copy.deepcopy(theirs)
        assert ck.replace_gpsa(ours) == 3
        for mine, expected in zip(ours(IMAGES), theirs(IMAGES), strict=True):
            same(mine, expected)
