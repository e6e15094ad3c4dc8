"""The paper's models: timm's parameters and logits, on any image, with the ablations as arguments."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from equivalence import assert_as_exact
from timm.models import convit
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import convit_kernels as ck
from convit_kernels import models
from convit_kernels.equivalence import expected

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "num_classes": 5}


def small(**options) -> models.ConViT:
    return models.ConViT(**(SMALL | {"embed_dim": 32} | options)).eval()


def timm_small(**options) -> nn.Module:
    return convit.ConVit(**(SMALL | {"embed_dim": 8} | options)).eval()  # timm's class takes the channels of a head


def perturb(model: nn.Module) -> nn.Module:
    """Gates, positions and content away from their nearly uniform initial values, so that every branch matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gating" in name or "pos_proj.weight" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            if ".qk." in name or ".qkv." in name:
                parameter.mul_(4)
    return model


# the paper's Table 1: channels, heads, GPSA layers, millions of parameters (without the classifier, as they come out)
TABLE = {
    "convit_tiny": (192, 4, 10, 6),
    "convit_tiny_plus": (256, 4, 10, 10),
    "convit_small": (432, 9, 10, 27),
    "convit_small_plus": (576, 9, 10, 48),
    "convit_base": (768, 16, 10, 86),
    "convit_base_plus": (1024, 16, 10, 152),
    "deit_tiny": (192, 3, 0, 6),
    "deit_tiny_plus": (256, 4, 0, 10),
    "deit_small": (384, 6, 0, 22),
    "deit_small_plus": (576, 9, 0, 48),
    "deit_base": (768, 12, 0, 86),
    "deit_base_plus": (1024, 16, 0, 152),
}


class TestSizes:
    @staticmethod
    def expected(dim: int, heads: int, gpsa_layers: int) -> int:
        """Parameters of a 12-layer model on 14 x 14 patches of 16 x 16 pixels, 1000 classes, part by part."""
        stem = 3 * 16 * 16 * dim + dim + 196 * dim + dim  # patches, positional embedding, class token
        attention = 12 * (4 * dim * dim + dim) + gpsa_layers * (3 * heads + heads + heads)  # pos_proj and the gate
        mlp = 12 * (2 * 4 * dim * dim + 4 * dim + dim)
        norms = (2 * 12 + 1) * 2 * dim
        return stem + attention + mlp + norms + 1000 * dim + 1000

    @pytest.mark.parametrize("name", TABLE)
    def test_parameters_to_the_last(self, name):
        dim, heads, gpsa_layers, millions = TABLE[name]
        with torch.device("meta"):
            model = getattr(models, name)()
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == self.expected(dim, heads, gpsa_layers)
        assert round((count - sum(parameter.numel() for parameter in model.head.parameters())) / 1e6) == millions
        assert sum(isinstance(module, ck.GPSA) for module in model.modules()) == gpsa_layers

    @pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
    def test_parameters_are_timm_s(self, name):
        with torch.device("meta"):
            ours, theirs = getattr(models, name)(), timm.create_model(name)
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert list(shapes[0]) == list(shapes[1])

    def test_the_list_of_sizes_is_the_table(self):
        assert list(models.SIZES) == list(TABLE)


class TestAgainstTimm:
    @pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
    @torch.no_grad()
    def test_logits_of_the_real_sizes(self, name):
        theirs = perturb(timm.create_model(name)).eval()
        with torch.device("meta"):
            ours = getattr(models, name)().eval()
        ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
        images = torch.randn(1, 3, 224, 224)
        found = {"logits": ours(images)}
        # the parameters are shared: float32 must come back whole
        eager = {torch.float32: {"logits": theirs(images)}}
        theirs = theirs.double()
        rule = expected(lambda d: eager.get(d) or {"logits": theirs(images.to(d))}, torch.float32, draws=1)
        assert_as_exact(found, rule)

    @pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"use_pos_embed": False}, {"global_pool": "avg"}])
    @pytest.mark.parametrize("gpsa_layers", [0, 1, 2])
    def test_state_dicts_load_strictly_both_ways(self, options, gpsa_layers):
        options = options | {"local_up_to_layer": gpsa_layers}
        ours, theirs = perturb(small(**options)), timm_small(**options)
        images = torch.randn(2, 3, 32, 32)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        again = small(**options)
        again.load_state_dict(theirs.state_dict(), strict=True)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
        assert torch.equal(again(images), ours(images))

    def test_keys_are_those_of_the_official_checkpoints(self):
        layer = ["qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "pos_proj.bias"]
        attention = [["gating_param", *layer]] * 2 + [["qkv.weight", "proj.weight", "proj.bias"]]
        keys = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
        for index, names in enumerate(attention):
            parts = ["norm1", *(f"attn.{name}" for name in names), "norm2", "mlp.fc1", "mlp.fc2"]
            for part in parts:
                ends = [""] if part.startswith("attn.") else [".weight", ".bias"]
                keys += [f"blocks.{index}.{part}{end}" for end in ends]
        keys += ["norm.weight", "norm.bias", "head.weight", "head.bias"]
        assert sorted(small().state_dict()) == sorted(keys)

    def test_every_gradient(self):
        ours, theirs = perturb(small()), timm_small()
        theirs.load_state_dict(ours.state_dict())
        ours, theirs = ours.double(), theirs.double()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        for model in (ours, theirs):
            model(images).square().sum().backward()
        expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            if not name.endswith("pos_proj.bias"):  # cancels in the softmax: zero here, rounding there
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
    @pytest.mark.parametrize("options", [{}, {"indices": 1}, {"indices": [0, -1], "norm": True}])
    def test_intermediates(self, fmt, options):
        ours, theirs = perturb(small()), timm_small()
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(2, 3, 32, 32)
        features, found = ours.forward_intermediates(images, output_fmt=fmt, **options)
        _, expected = theirs.forward_intermediates(images, output_fmt=fmt, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(features, ours.forward_features(images))

    def test_initial_values_are_a_convolution_s(self):
        model = small()
        gpsa = [module for module in model.modules() if isinstance(module, ck.GPSA)]
        for layer in gpsa:
            assert torch.equal(layer.v.weight, torch.eye(32))
            assert torch.equal(layer.pos_proj.weight, timm_small().blocks[0].attn.pos_proj.weight)
            assert torch.equal(layer.gating_param, torch.ones(4))
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


class TestImages:
    def test_224_by_320(self):
        model = models.convit_tiny().eval()
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 3, 224, 320))).all()

    @pytest.mark.situation(
        "timm",
        "images of another size or shape than the model was made for",
        timm="refused",
        ours="`convit_tiny_fused` takes any that divide into patches",
    )
    @pytest.mark.parametrize("made_for", [(32, 32), (16, 64)])
    @pytest.mark.parametrize("size", [(32, 56), (56, 32), (64, 16), (24, 24)])
    def test_other_sizes_equal_a_model_made_for_them(self, made_for, size):
        """Except for the positional embedding, interpolated here by hand, nothing depends on the size."""
        model = perturb(small(img_size=made_for))
        grid = (size[0] // 8, size[1] // 8)
        table = model.pos_embed.detach().unflatten(1, (made_for[0] // 8, made_for[1] // 8)).permute(0, 3, 1, 2)
        table = F.interpolate(table, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        made = small(img_size=size)
        made.load_state_dict(model.state_dict() | {"pos_embed": table})
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(model(images), made(images), rtol=1e-5, atol=1e-5)
        with pytest.raises(AssertionError, match="doesn't match model"):
            timm_small(img_size=made_for)(images)

    @pytest.mark.parametrize("size", [(16, 64), (64, 16)])
    def test_every_gpsa_layer_sees_the_image_s_grid(self, size):
        """Both have 16 patches, as a square has: the grid must not be guessed from their number."""
        model = perturb(small())
        seen = []
        for block in model.blocks[:2]:
            block.attn.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
        model(torch.randn(2, 3, *size))
        for layer, x, out in tuple(seen):
            layer.grid_size = (size[0] // 8, size[1] // 8)
            torch.testing.assert_close(out, layer(x))
        assert len(seen) == 4
        features = model.forward_intermediates(torch.ones(1, 3, *size), intermediates_only=True)
        assert [tuple(feature.shape[2:]) for feature in features] == [layer.grid_size] * 3

    def test_one_channel_and_no_classes(self):
        model = small(in_chans=1, num_classes=0, img_size=28, patch_size=4)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 32)

    def test_without_pooling_every_token_is_classified(self):
        assert small(global_pool="")(torch.randn(2, 3, 32, 32)).shape == (2, 17, 5)

    def test_gpsa_in_every_layer_has_no_class_token(self):
        model = small(local_up_to_layer=3, global_pool="avg")
        assert model.cls_token is None
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(images), model.head(model.forward_features(images).mean(1)))

    def test_empty_batch(self):
        assert small()(torch.randn(0, 3, 32, 32)).shape == (0, 5)


class TestConvolutionalStem:
    @pytest.mark.parametrize("patch_size", [4, 8])
    def test_halves_the_image_and_doubles_the_channels(self, patch_size):
        model = small(stem="conv", patch_size=patch_size)
        *steps, last = model.patch_embed.proj
        widths = [3, *(32 * 2 // patch_size * 2**step for step in range(len(steps)))]
        assert [(step.conv.in_channels, step.conv.out_channels) for step in steps] == list(pairwise(widths))
        assert widths[-1] == 32
        assert {(step.conv.kernel_size, step.conv.stride) for step in steps} == {((3, 3), (2, 2))}
        assert (last.kernel_size, last.bias is not None) == ((1, 1), True)
        assert model(torch.randn(2, 3, 32, 48)).shape == (2, 5)

    def test_tokens_are_in_row_major_order(self):
        model = small(stem="conv")
        images = torch.randn(2, 3, 16, 32)
        x, grid = model.embed(images)
        assert grid == (2, 4)
        pos_embed = F.interpolate(
            model.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True
        )
        expected = model.patch_embed.proj(images) + pos_embed
        torch.testing.assert_close(x.transpose(1, 2).unflatten(2, grid), expected)


class TestAblations:
    @staticmethod
    def gpsa(row: str) -> list[ck.GPSA]:
        return [layer for layer in small(**models.ABLATIONS[row]).modules() if isinstance(layer, ck.GPSA)]

    @pytest.mark.parametrize("row", "abdcfg")
    def test_gates(self, row):
        for layer in self.gpsa(row):
            frozen_at_zero = row in "bd"
            assert torch.equal(layer.gating_param, torch.zeros(4) if frozen_at_zero else torch.ones(4))
            assert layer.gating_param.requires_grad == (row in "ac")

    @pytest.mark.parametrize("row", "abdcfg")
    def test_convolutional_or_random_start(self, row):
        for layer in self.gpsa(row):
            local = torch.equal(layer.v.weight, torch.eye(32)) and bool((layer.pos_proj.weight[:, 2] == -1).all())
            assert local == (row in "abf")
            if not local:
                assert layer.v.weight.std().item() == pytest.approx(0.02, rel=0.2)
                assert layer.pos_proj.weight.abs().max() < 0.1

    @pytest.mark.parametrize("row", "abdcfg")
    def test_what_is_trained(self, row):
        for layer in self.gpsa(row):
            trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
            assert ("qk.weight" in trained) == (row in "abcd")
            assert not trained or row in "abcd"

    def test_deit_has_no_gpsa_and_the_class_token_from_the_start(self):
        model = small(**models.ABLATIONS["e"])
        assert self.gpsa("e") == []
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        model(torch.randn(2, 3, 32, 32))
        assert seen == [(2, 17, 32)]

    @pytest.mark.parametrize("row", models.ABLATIONS)
    def test_a_step_trains_what_is_to_be_trained_and_nothing_else(self, row):
        model = perturb(small(**models.ABLATIONS[row]))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (parameter.requires_grad and "pos_proj.bias" not in name), name


class TestTraining:
    @pytest.mark.situation(
        "timm",
        "`model.set_grad_checkpointing()`",
        timm="refused",
        ours="`convit_tiny_fused` does it, with the same gradients",
    )
    def test_checkpointed_gradients_are_the_same(self):
        with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
            timm_small().set_grad_checkpointing()
        model = perturb(small(pos_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)).train()
        images = torch.randn(2, 3, 32, 48)

        def gradients(enable: bool) -> dict[str, torch.Tensor]:
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            torch.manual_seed(3)
            model(images).square().sum().backward()
            return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        expected, found = gradients(False), gradients(True)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    def test_checkpointing_keeps_less(self):
        model = small(depth=8, local_up_to_layer=6).train()
        images = torch.randn(2, 3, 32, 32)

        def kept() -> int:
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
                model(images)
            return sum(sizes)

        everything = kept()
        model.set_grad_checkpointing()
        assert kept() < everything / 3

    def test_every_parameter_gets_a_gradient(self):
        model = small().train()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_stochastic_depth_grows_linearly(self):
        model = small(drop_path_rate=0.2)
        assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2])

    def test_compiles_in_one_graph(self):
        model = perturb(small())
        images = torch.randn(2, 3, 32, 48)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images))

    def test_new_head(self):
        model = small().double()
        model.reset_classifier(7, "avg")
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 7)

    def test_timm_s_layer_decay_groups_name_every_parameter(self):
        model = small()
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len({group["lr_scale"] for group in groups}) == SMALL["depth"] + 2  # the stem, the blocks, norm and head

    def test_weight_decay_leaves_gates_and_embeddings_alone(self):
        model = small()
        _, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        decayed = {id(parameter) for parameter in decayed["params"]}
        assert id(model.cls_token) not in decayed
        assert id(model.blocks[0].attn.gating_param) not in decayed
        assert id(model.blocks[0].attn.qk.weight) in decayed


class TestRegistry:
    def test_timm_s_own_models_stay_timm_s(self):
        assert type(timm.create_model("convit_tiny", img_size=32)) is convit.ConVit

    @pytest.mark.parametrize("size", models.SIZES)
    def test_every_size_is_there(self, size):
        with torch.device("meta"):
            model = timm.create_model(f"{size}_fused", num_classes=3)
        assert isinstance(model, models.ConViT)
        assert model.head.out_features == 3
        assert model.embed_dim == models.SIZES[size]["embed_dim"]

    @pytest.mark.parametrize("size", ["tiny", "small", "base"])
    def test_published_weights_are_timm_s(self, size):
        ours, theirs = (timm.models.get_pretrained_cfg(f"convit_{size}{end}") for end in ("_fused", ""))
        assert (ours.hf_hub_id, ours.mean, ours.crop_pct) == (theirs.hf_hub_id, theirs.mean, theirs.crop_pct)
        assert f"convit_{size}_fused.fb_in1k" in timm.list_models(pretrained=True)

    def test_pretrained_weights_fit_other_classes_and_grids(self, tmp_path):
        """What pretrained=True does after the download."""
        theirs = perturb(timm.create_model("convit_tiny")).eval()
        torch.save(theirs.state_dict(), tmp_path / "weights.pth")
        source = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
        ours = timm.create_model("convit_tiny_fused", pretrained=True, **source).eval()
        images = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        other = models.convit_tiny(pretrained=True, img_size=(64, 96), num_classes=3, in_chans=1, **source)
        assert torch.equal(other.blocks[0].attn.qk.weight, theirs.blocks[0].attn.qk.weight)
        assert other.pos_embed.shape == (1, 24, 192)
        assert other.head.out_features == 3

    @pytest.mark.parametrize("size", ["convit_small_plus", "deit_tiny"])
    def test_sizes_without_weights_say_so(self, size):
        with pytest.raises(ValueError, match=f"no weights are published for {size}: .* convit_tiny, convit_small"):
            getattr(models, size)(pretrained=True)

    def test_features_only(self):
        model = timm.create_model("convit_tiny_fused", features_only=True, out_indices=(1, 11), img_size=32)
        assert [tuple(features.shape) for features in model(torch.randn(1, 3, 32, 64))] == [(1, 192, 2, 4)] * 2
        assert model.feature_info.channels() == [192, 192]
        pruned = timm.create_model("convit_tiny_fused", features_only=True, out_indices=(1,), img_size=32)
        assert len(pruned.model.blocks) == 2
        assert [tuple(features.shape) for features in pruned(torch.randn(1, 3, 32, 64))] == [(1, 192, 2, 4)]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"img_size": 30}, "30 x 30 pixels does not divide into patches of 8 x 8"),
            ({"img_size": (32, 20)}, "32 x 20 pixels .* multiples of 8"),
            ({"local_up_to_layer": 4}, "from 0 to depth, but local_up_to_layer=4 and depth=3"),
            ({"local_up_to_layer": -1}, "local_up_to_layer=-1"),
            ({"local_up_to_layer": 3}, 'no class token: give global_pool="avg"'),
            ({"num_heads": 5}, "embed_dim=32 and num_heads=5"),
            ({"global_pool": "max"}, "global_pool must be one of .*'token', 'avg'.*'max'"),
            ({"stem": "resnet"}, "stem must be one of .*'resnet'"),
            ({"stem": "conv", "patch_size": 12, "img_size": 24}, "power of two.*patch_size=12"),
            ({"in_chans": 0}, "in_chans=0"),
            ({"backend": "fast"}, "unknown backend 'fast'"),
        ],
    )
    def test_arguments_that_do_not_fit(self, arguments, text):
        with pytest.raises(ValueError, match=text):
            small(**arguments)

    def test_unknown_arguments(self):
        with pytest.raises(
            TypeError, match=r"convit_tiny has no arguments hybrid_backbone: allowed are img_size, .*stem"
        ):
            models.convit_tiny(hybrid_backbone=None)

    @pytest.mark.parametrize(
        ("shape", "text"),
        [
            ((2, 3, 30, 32), "30 x 32 pixels does not divide into patches of 8 x 8"),
            ((2, 3, 0, 32), "0 x 32 pixels"),
            ((2, 1, 32, 32), r"\(batch, 3, height, width\), but have \(2, 1, 32, 32\)"),
            ((3, 32, 32), r"but have \(3, 32, 32\)"),
        ],
    )
    def test_images_that_do_not_fit(self, shape, text):
        with pytest.raises(ValueError, match=text):
            small()(torch.randn(shape))

    def test_intermediates_of_an_unknown_format(self):
        with pytest.raises(ValueError, match="NCHW or NLC, but is 'NHWC'"):
            small().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NHWC")

    def test_without_timm_the_layer_works_and_the_models_say_what_to_install(self):
        program = (
            "import sys; sys.modules['timm'] = None\n"
            "import torch, convit_kernels as ck\n"
            "ck.GPSA(8, 4)(torch.randn(1, 4, 8)); ck.locality\n"
            "try: ck.models\n"
            "except ImportError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert re.fullmatch(r"convit_kernels.models needs timm: pip install '?timm\S*\n", done.stdout)

    def test_the_package_does_not_import_timm(self):
        program = "import sys, convit_kernels; print([name for name in sys.modules if name.startswith('timm')])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
