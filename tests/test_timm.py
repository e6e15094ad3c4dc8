"""What works with timm's ConViT works with `convit_*_fused` and with a model after `replace_gpsa`."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import checkpoint_seq, convit
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, freeze, unfreeze
from timm_pairs import DIM, Kind, assert_same, create, each_kind, images, pair
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

import convit_kernels as ck
from convit_kernels import models


class TestBlocks:
    @pytest.mark.situation("timm", "takes the blocks into `nn.Sequential` or a loop", timm="runs", ours="the same")
    @each_kind
    @pytest.mark.parametrize("run", [nn.Sequential, lambda *blocks: lambda x: checkpoint_seq(blocks, x)])
    @pytest.mark.parametrize("tokens", [16, 25])
    def test_alone(self, kind: Kind, run: Callable[..., Any], tokens: int) -> None:
        theirs, ours = pair(kind)
        x = images(2, tokens, DIM)
        assert_same(run(*ours.blocks)(x), run(*theirs.blocks)(x))

    @pytest.mark.situation(
        "timm",
        "the same, of a model made for images of 16 x 64 pixels",
        timm="takes 2 x 8 patches for 4 x 4, and says nothing",
        ours="right with `convit_tiny_fused`: each block knows the grid it was made for",
    )
    def test_alone_on_the_grid_they_were_made_for(self) -> None:
        theirs, ours = pair("fused", img_size=(16, 64))
        x = images(2, 16, DIM)
        right = ours.blocks[0](x, (2, 8))
        assert_same(ours.blocks[0](x), right)
        assert_same(theirs.blocks[0](x), ours.blocks[0](x, grid_size=4))
        assert not torch.allclose(theirs.blocks[0](x), right)
        with pytest.raises(ValueError, match=r"grid_size \(2, 8\) has 16 tokens, but the input has 25"):
            ours.blocks[0](images(2, 25, DIM))

    def test_alone_on_a_number_of_tokens_that_is_no_square(self) -> None:
        with pytest.raises(ValueError, match="15 tokens form no square grid"):
            pair("fused")[1].blocks[0](images(2, 15, DIM))

    @pytest.mark.situation(
        "timm",
        "calls `patch_embed` and the blocks by hand, with images that are not square",
        timm="refused",
        ours="refused; `model.embed(images)` gives patches and grid",
    )
    @each_kind
    def test_patches_by_hand(self, kind: Kind) -> None:
        theirs, ours = pair(kind)
        assert_same(ours.patch_embed(images(2, 3, 32, 32)).shape, theirs.patch_embed(images(2, 3, 32, 32)).shape)
        wide = images(2, 3, 16, 64)  # 16 patches, as 4 x 4 are
        with pytest.raises(AssertionError, match="height"):
            theirs.patch_embed(wide)
        if kind == "replaced":
            with pytest.raises(AssertionError, match="height"):
                ours.patch_embed(wide)
            return
        with pytest.raises(ValueError, match=r"2 rows and 8 columns, but a block alone.* to be square: .*model\.embed"):
            ours.patch_embed(wide)
        made_for_wide = pair("fused", img_size=(16, 64))[1]
        assert made_for_wide.patch_embed(wide).shape == (2, 16, DIM)
        with pytest.raises(ValueError, match=r"4 rows and 4 columns, but a block alone .* to be of 2 x 8: .*"):
            made_for_wide.patch_embed(images())
        x, grid = ours.embed(wide)
        assert grid == (2, 8)
        for block in ours.blocks[:2]:
            x = block(x, grid)
        features = ours.forward_intermediates(wide, indices=[1], output_fmt="NLC", intermediates_only=True)
        assert torch.equal(x, features[0])


SURGERY: dict[str, Callable[[Any], Any]] = {
    "a block is nn.Identity": lambda model: model.blocks.__setitem__(0, nn.Identity()),
    "a block is deleted": lambda model: (model.blocks.__delitem__(0), setattr(model, "local_up_to_layer", 1)),
    "a block stands twice": lambda model: (
        model.blocks.insert(0, model.blocks[0]),
        setattr(model, "local_up_to_layer", 3),
    ),
    "the blocks are nn.Sequential": lambda model: setattr(model, "blocks", nn.Sequential(*model.blocks)),
    "a block within a block": lambda model: model.blocks.__setitem__(1, nn.Sequential(*model.blocks[:2])),
    "norms": lambda model: [setattr(block, "norm1", nn.RMSNorm(DIM).double()) for block in model.blocks],
    "attention is nn.Identity": lambda model: setattr(model.blocks[1], "attn", nn.Identity()),
    "attention of another block": lambda model: setattr(model.blocks[1], "attn", model.blocks[0].attn),
    "attention in nn.Sequential": lambda model: setattr(
        model.blocks[0], "attn", nn.Sequential(model.blocks[0].attn, nn.Tanh())
    ),
    "no MLP": lambda model: setattr(model.blocks[2], "mlp", nn.Identity()),
    "no norm": lambda model: setattr(model, "norm", nn.Identity()),
    "no positional embedding": lambda model: setattr(model, "use_pos_embed", False),
    "another head": lambda model: setattr(
        model, "head", nn.Sequential(nn.Linear(DIM, 3, dtype=torch.float64), nn.ReLU())
    ),
    "tokens instead of images": lambda model: setattr(model, "patch_embed", nn.Flatten(2)),
}


class TestSurgery:
    @pytest.mark.situation(
        "timm",
        "surgery: blocks and their parts deleted, repeated, wrapped or replaced, another norm, head or embedding",
        timm="runs",
        ours="the same",
    )
    @each_kind
    @pytest.mark.parametrize("operation", SURGERY)
    def test_same_results(self, kind: Kind, operation: str) -> None:
        theirs, ours = pair(kind)
        for model in (theirs, ours):
            torch.manual_seed(1)
            SURGERY[operation](model)
        x = images(2, 16, DIM) if operation == "tokens instead of images" else images()
        assert_same(ours(x), theirs(x))

    @pytest.mark.situation(
        "timm",
        "cuts off the blocks behind GPSA, so that no class token joins, and classifies",
        timm="takes the first patch for the class token; averages all but the first",
        ours='`convit_tiny_fused` refuses; with `"avg"` averages all patches',
    )
    def test_blocks_cut_off(self) -> None:
        theirs, ours = pair("fused")
        for model in (theirs, ours):
            model.blocks = model.blocks[:2]
        x = images()
        features = ours.forward_features(x)
        assert_same(features, theirs.forward_features(x))
        assert_same(theirs(x), theirs.head(features[:, 0]))
        theirs.global_pool = "avg"
        assert_same(theirs(x), theirs.head(features[:, 1:].mean(1)))
        with pytest.raises(
            ValueError, match=r'joins before block 2, and there are 2.*reset_classifier\(classes, "avg"\)'
        ):
            ours(x)
        ours.global_pool = "avg"
        assert_same(ours(x), ours.head(features.mean(1)))

    @pytest.mark.situation(
        "timm",
        'makes a model shallower than its GPSA layers, `create_model("convit_tiny", depth=4)`',
        timm="takes the first patch for the class token",
        ours="refused: give `local_up_to_layer` too",
    )
    def test_shallow(self) -> None:
        theirs = timm.create_model("convit_tiny", depth=4, img_size=32).eval()
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(theirs(x), theirs.head(theirs.forward_features(x)[:, 0]))
        assert theirs.forward_features(x).shape[1] == 4  # patches alone
        with pytest.raises(ValueError, match=r"from 0 to depth, but local_up_to_layer=10 and depth=4"):
            timm.create_model("convit_tiny_fused", depth=4, img_size=32)

    @pytest.mark.parametrize("wrap", [lambda part: torch.compile(part, backend="eager"), lambda part: PassesOn(part)])
    @pytest.mark.parametrize("where", ["block", "attention"])
    def test_wrapped_parts_get_the_grid(self, wrap: Callable[[Any], nn.Module], where: str) -> None:
        """16 patches in two rows: a wrapper that hides the layer must not make a square of them."""
        model = pair("fused")[1]
        wide = images(2, 3, 16, 64)
        right = model(wide)
        if where == "block":
            model.blocks[0] = wrap(model.blocks[0])
        else:
            model.blocks[0].attn = wrap(model.blocks[0].attn)
        assert_same(model(wide), right)

    def test_wrapped_parts_that_take_no_grid(self) -> None:
        """They do where the grid is that of the layer, as with timm's model, and elsewhere end in an error."""
        theirs, ours = pair("fused")
        for model in (theirs, ours):
            model.blocks[0] = nn.Sequential(model.blocks[0])
        x = images()
        assert_same(ours(x), theirs(x))
        with pytest.raises(TypeError, match="grid_size"):
            ours(images(2, 3, 16, 64))


class PassesOn(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def convolution(channels: int = 3, *arguments: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, DIM, *arguments, **options, dtype=torch.float64)


class TestEmbedding:
    @pytest.mark.situation(
        "timm",
        "replaces `patch_embed.proj`, for one channel or another stride, and `pos_embed` by one that fits",
        timm="runs",
        ours="the same",
    )
    @each_kind
    @pytest.mark.parametrize(
        ("proj", "tokens"),
        [
            (convolution(1, 8, 8), 16),
            (convolution(3, 3, 1, padding=1), 1024),
            (convolution(3, 3, 2, padding="valid"), 225),
            (nn.Sequential(convolution(3, 4, 4), nn.ReLU()), 64),
        ],
    )
    def test_another_convolution(self, kind: Kind, proj: nn.Module, tokens: int) -> None:
        theirs, ours = pair(kind)
        pos_embed = nn.Parameter(images(1, tokens, DIM))
        for model in (theirs, ours):
            model.patch_embed.proj = proj
            model.pos_embed = pos_embed
        x = images(1, 1 if tokens == 16 else 3, 32, 32)
        with torch.no_grad():
            assert_same(ours(x), theirs(x))

    @pytest.mark.situation(
        "timm",
        "the same, and leaves `pos_embed` as it is",
        timm="refused: other lengths",
        ours="`convit_tiny_fused` interpolates `pos_embed`",
    )
    def test_another_number_of_patches(self) -> None:
        theirs, ours = pair("fused")
        proj = convolution(3, 4, 4)
        for model in (theirs, ours):
            model.patch_embed.proj = proj
        with pytest.raises(RuntimeError, match="must match"):
            theirs(images())
        x = images()
        found = ours(x)
        resampled = timm.layers.resample_abs_pos_embed(ours.pos_embed, [8, 8], [4, 4], num_prefix_tokens=0)
        theirs.pos_embed = nn.Parameter(resampled)
        assert_same(found, theirs(x))

    @pytest.mark.situation(
        "timm",
        "the same with patches that are not square, so that the grid is not",
        timm="takes 8 x 2 patches for 4 x 4, and says nothing",
        ours="`convit_tiny_fused` follows the convolution",
    )
    @pytest.mark.parametrize(
        "proj",
        [
            convolution(3, (4, 16), (4, 16)),
            convolution(3, 3, (2, 4), padding=1),
            convolution(3, (5, 3), (8, 4), dilation=(2, 3)),
            convolution(3, (3, 5), 1, padding="same", dilation=2),
            convolution(3, (3, 5), (4, 5), padding="valid"),
            convolution(3, 8, 8),
        ],
    )
    @pytest.mark.parametrize("size", [(32, 32), (40, 24)])
    def test_the_grid_is_the_convolution_s(self, proj: nn.Conv2d, size: tuple[int, int]) -> None:
        theirs, model = pair("fused")
        theirs.patch_embed.proj = model.patch_embed.proj = proj
        x = images(1, 3, *size)
        expected = tuple(proj(x).shape[2:])
        assert model.embed(x)[1] == expected
        if expected == (8, 2):
            assert theirs(x).shape == (1, 5)  # as of 16 patches, whatever their grid
            with pytest.raises(ValueError, match="8 rows and 2 columns"):
                model.patch_embed(x)
        features = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert features[0].shape[2:] == expected

    def test_an_image_that_only_the_user_s_convolution_takes(self) -> None:
        model = pair("fused")[1]
        model.patch_embed.proj = convolution(1, 3, 3)
        assert model(images(1, 1, 28, 31)).shape == (1, 5)
        with pytest.raises(ValueError, match=r"\(batch, 1, height, width\), but have \(1, 3, 28, 28\)"):
            model(images(1, 3, 28, 28))

    def test_an_embedding_that_does_not_say_its_grid(self) -> None:
        """A square image may be taken for a square of tokens, another may not."""
        theirs, ours = pair("fused")
        stem = nn.Sequential(convolution(3, 8, 8), nn.Flatten(2), Transposed())
        for model in (theirs, ours):
            model.patch_embed = stem
        x = images()
        assert_same(ours(x), theirs(x))
        wide = images(2, 3, 16, 64)
        assert torch.isfinite(theirs(wide)).all()
        with pytest.raises(ValueError, match=r"16 tokens of images of shape \(2, 3, 16, 64\).*dynamic_feat_size"):
            ours(wide)
        ours.patch_embed = stem[0]  # (B, C, rows, columns) says it
        assert ours.embed(wide)[1] == (2, 8)

    def test_a_positional_embedding_that_fits_no_grid(self) -> None:
        model = pair("fused")[1]
        model.pos_embed = nn.Parameter(images(1, 17, DIM))
        with pytest.raises(ValueError, match="pos_embed has 17 positions, neither a square nor the 4 x 4 patches"):
            model(images())

    def test_timm_s_embeddings_in_its_place(self) -> None:
        theirs, ours = pair("fused")
        backbone = nn.Conv2d(3, 6, 4, 4, dtype=torch.float64)
        backbone.num_features = 6  # type: ignore[assignment]
        hybrid = timm.layers.HybridEmbed(
            backbone, img_size=32, patch_size=2, feature_size=8, feature_ratio=4, embed_dim=DIM, strict_img_size=False
        ).double()
        for model in (theirs, ours):
            model.patch_embed = hybrid
        x = images()
        assert_same(ours(x), theirs(x))
        assert ours.embed(images(1, 3, 16, 64))[1] == (2, 8)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class TestInitialValues:
    @pytest.mark.situation(
        "timm",
        "`model.apply(model._init_weights)`, `model.head.apply(model._init_weights)`",
        timm="new values",
        ours="the same values from the same seed",
    )
    @each_kind
    @pytest.mark.parametrize("part", ["", "head", "blocks.0", "blocks.0.attn", "norm"])
    def test_of_a_part(self, kind: Kind, part: str) -> None:
        theirs, ours = pair(kind)
        for model in (theirs, ours):
            torch.manual_seed(3)
            model.get_submodule(part).apply(model._init_weights)
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, expected[name]), name

    @each_kind
    def test_local_init_afterwards(self, kind: Kind) -> None:
        theirs, ours = pair(kind)
        for model in (theirs, ours):
            torch.manual_seed(3)
            model.apply(model._init_weights)
            for module in model.modules():
                if hasattr(module, "local_init"):
                    module.local_init()
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, expected[name]), name


# arguments of timm's ConVit that ConViT has not, or with another default, and why
OTHERWISE = {
    "embed_dim": "all heads together in the class; under timm's name that of a head, as timm's; the default is Ti's",
    "num_heads": "the default is Ti's",
    "local_up_to_layer": "the default is that of every published model",
    "hybrid_backbone": "model.patch_embed = timm.layers.HybridEmbed(...) does the same",
}


class TestArguments:
    def test_timm_s_are_all_there(self) -> None:
        theirs, ours = (inspect.signature(each).parameters for each in (convit.ConVit, models.ConViT))
        differ = {name for name, given in theirs.items() if name not in ours or ours[name].default != given.default}
        assert differ == set(OTHERWISE)

    @pytest.mark.situation(
        "timm",
        '`create_model("convit_tiny", embed_dim=16, num_heads=9)`, each or both',
        timm="channels of a head times heads",
        ours="the same under timm's name",
    )
    @pytest.mark.parametrize("widths", [{"embed_dim": 16}, {"num_heads": 9}, {"embed_dim": 16, "num_heads": 9}])
    @pytest.mark.parametrize("size", ["tiny", "small", "base"])
    def test_widths(self, widths: dict[str, int], size: str) -> None:
        rest = {"img_size": 32, "depth": 2, "local_up_to_layer": 1, "device": "meta"}
        theirs, ours = (timm.create_model(f"convit_{size}{end}", **widths, **rest) for end in ("", "_fused"))
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert ours.embed_dim == theirs.embed_dim

    def test_widths_of_the_functions_are_all_channels(self) -> None:
        assert models.convit_tiny(embed_dim=64, device="meta").embed_dim == 64
        assert timm.create_model("deit_tiny_fused", embed_dim=96, device="meta").embed_dim == 96  # as timm's DeiT

    @pytest.mark.situation("timm", '`device=` and `dtype=`, `"meta"` too', timm="as given", ours="the same")
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("stem", ["patch", "conv"])
    def test_device_and_dtype(self, device: str, dtype: torch.dtype | None, stem: str) -> None:
        model = create("convit_tiny_fused", device=device, dtype=dtype, stem=stem)
        tensors = [*model.parameters(), *(value for value in model.buffers() if value.is_floating_point())]
        assert {(value.device.type, value.dtype) for value in tensors} == {(device, dtype or torch.float32)}
        layer = create(device=device, dtype=dtype).blocks[0].attn.qk
        assert (layer.weight.device.type, layer.weight.dtype) == (device, dtype or torch.float32)
        if device == "cpu":
            assert torch.equal(model.blocks[0].attn.v.weight.float(), torch.eye(DIM))

    def test_device_inside_another(self) -> None:
        with torch.device("meta"):
            model = create("convit_tiny_fused", device="cpu")
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)

    def test_norm_layer(self) -> None:
        theirs, ours = (create(name, norm_layer=nn.RMSNorm) for name in ("convit_tiny", "convit_tiny_fused"))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("flag", ["exportable", "scriptable", "no_jit"])
    @pytest.mark.situation("timm", "`exportable=True`, `scriptable=True`", timm="runs", ours="runs, the same model")
    def test_flags_of_layers(self, flag: str) -> None:
        theirs, ours = (create(name, **{flag: True}).double() for name in ("convit_tiny", "convit_tiny_fused"))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = images()
        assert_same(ours(x), theirs(x))


class TestWhatTimmAsks:
    @pytest.mark.situation(
        "timm",
        "reads `num_features`, `feature_info`, `num_patches`, `default_cfg`, `no_weight_decay()`, `group_matcher()`…",
        timm="there",
        ours="all there, and the same",
    )
    @each_kind
    def test_attributes(self, kind: Kind) -> None:
        theirs, ours = pair(kind)
        assert [name for name in dir(theirs) if not hasattr(ours, name)] == []
        config = {"default_cfg", "pretrained_cfg"}
        for name, value in vars(theirs).items():
            if not name.startswith("_") and name not in config:
                assert getattr(ours, name) == value, name
        differ = {key for key, value in theirs.default_cfg.items() if ours.default_cfg[key] != value}
        assert differ == ({"architecture", "fixed_input_size"} if kind == "fused" else set())
        assert ours.no_weight_decay() == theirs.no_weight_decay()
        assert ours.group_matcher() == theirs.group_matcher()
        data = timm.data.resolve_model_data_config
        assert data(ours) == data(theirs)

    def test_names(self) -> None:
        assert timm.list_models("*_fused") == sorted(f"{size}_fused" for size in models.SIZES)

    @each_kind
    @pytest.mark.parametrize("pool", ["token", "avg", ""])
    @pytest.mark.situation(
        "timm",
        "`global_pool`, `reset_classifier`, `get_classifier`, `forward_head`, `forward_intermediates`",
        timm="runs",
        ours="the same",
    )
    def test_heads(self, kind: Kind, pool: Any) -> None:
        theirs, ours = pair(kind)
        x = images()
        for model in (theirs, ours):
            torch.manual_seed(2)
            model.reset_classifier(3, pool)
        assert_same(ours(x), theirs(x))
        assert_same(ours.get_classifier().weight, theirs.get_classifier().weight)
        found, expected = (model.forward_features(x) for model in (ours, theirs))
        assert_same(ours.forward_head(found, pre_logits=True), theirs.forward_head(expected, pre_logits=True))
        found, expected = (model.forward_intermediates(x, indices=[0, -1], norm=True) for model in (ours, theirs))
        assert_same(found, expected)
        for model in (theirs, ours):
            model.reset_classifier(0)
        assert_same(ours(x), theirs(x))

    @pytest.mark.parametrize("cls", ["getter", "hook", "fx"])
    @pytest.mark.situation("timm", "`features_only=True`, by getter, hooks or torch.fx", timm="runs", ours="the same")
    def test_features_only(self, cls: str) -> None:
        options = {"features_only": True, "out_indices": (0, 2), "feature_cls": cls}
        theirs = create(**options).double()
        ours = create("convit_tiny_fused", **options).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert ours.feature_info.channels() == theirs.feature_info.channels() == [DIM, DIM]
        assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [8, 8]
        x = images()
        assert_same(ours(x), theirs(x))

    @each_kind
    @pytest.mark.situation("timm", "traces features with torch.fx", timm="runs", ours="the same")
    def test_torch_fx(self, kind: Kind) -> None:
        theirs, ours = pair(kind)
        leaves = {"leaf_modules": timm.models.get_notrace_modules()}
        x = images()
        for node in ("blocks.1.mlp", "head"):
            found, expected = (
                create_feature_extractor(model, [node], tracer_kwargs=leaves)(x)[node] for model in (ours, theirs)
            )
            assert_same(found, expected)

    def test_torch_fx_of_images_of_another_size(self) -> None:
        model = pair("fused")[1]
        wide = images(2, 3, 16, 64)
        assert_same(symbolic_trace(model)(wide), model(wide))

    @pytest.mark.situation("timm", "`ModelEmaV3`", timm="averages", ours="the same")
    @each_kind
    def test_moving_average(self, kind: Kind) -> None:
        theirs, ours = pair(kind)
        averages = []
        for model in (theirs, ours):
            average = ModelEmaV3(model, decay=0.5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)
            average.update(model)
            averages.append(average.module)
        x = images()
        assert_same(averages[1](x), averages[0](x))

    @pytest.mark.situation("timm", "layer decay, `freeze` and `unfreeze`", timm="runs", ours="the same parameters")
    @each_kind
    def test_groups_of_parameters(self, kind: Kind) -> None:
        found = []
        for model in pair(kind):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
            found.append(
                [(each["lr_scale"], each["weight_decay"], [names[id(p)] for p in each["params"]]) for each in groups]
            )
            freeze(model)
            unfreeze(model, ["head", "blocks.1"])
            found[-1].append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        assert found[1] == found[0]

    def test_what_they_are_not(self) -> None:
        """docs/models.md says so."""
        ours = pair("fused")[1]
        replaced = pair("replaced")[1]
        assert not isinstance(ours, convit.ConVit)
        assert not isinstance(ours.blocks[0], convit.Block)
        assert isinstance(replaced.blocks[0], convit.Block)
        for model in (ours, replaced):
            assert isinstance(model.blocks[0].attn, ck.GPSA)
            assert not isinstance(model.blocks[0].attn, convit.GPSA)


class TestLocality:
    @pytest.mark.parametrize("gpsa_layers", [0, 2])
    def test_of_a_model_with_another_convolution(self, gpsa_layers: int) -> None:
        """8 x 2 patches and 1 class token, not the 4 x 4 of the convolution before."""
        model = pair("fused", local_up_to_layer=gpsa_layers)[1]
        model.patch_embed.proj = convolution(3, (4, 16), (4, 16))
        x = images()
        maps = ck.locality.attention_maps(model, x, (7, 1))
        assert {value.shape[-2:] for value in maps.values()} == {(8, 2)}

    def test_of_timm_s_model_whose_embedding_does_not_know_its_convolution(self) -> None:
        """timm still tells 4 x 4 patches, of which there are 64 and a class token: no grid is better than that one."""
        model = create(local_up_to_layer=0)
        model.patch_embed.proj = nn.Conv2d(3, DIM, 4, 4)
        model.pos_embed = nn.Parameter(torch.zeros(1, 64, DIM))
        x = images().float()
        with pytest.raises(ValueError, match="has 16 tokens, but the input has 65"):
            ck.locality.nonlocality(model, x)
        assert ck.locality.nonlocality(model, x, grid_size=(8, 8))
