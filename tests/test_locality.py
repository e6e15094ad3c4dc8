"""Non-locality, gates and maps: the dense definition, computed without it."""

import copy
import json
import re
import sys
from pathlib import Path

import foreign
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.models import convit
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

import convit_kernels as ck
from convit_kernels import locality, models
from convit_kernels.cli import app, loading, locality_figure

SMALL = {"img_size": 32, "patch_size": 8, "depth": 4, "num_heads": 4, "local_up_to_layer": 2, "num_classes": 5}


def perturb(model: nn.Module) -> nn.Module:
    """Gates, positions and content away from their nearly uniform initial values, so that every part matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gating" in name or "pos_proj.weight" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            if ".qk." in name or ".qkv." in name:
                parameter.mul_(30)
    return model.eval()


def ours(**options) -> nn.Module:
    return perturb(models.ConViT(**(SMALL | {"embed_dim": 32} | options)))


def timm_s() -> nn.Module:
    return perturb(convit.ConVit(**(SMALL | {"embed_dim": 8})))


def replaced() -> nn.Module:
    model = timm_s()
    ck.replace_gpsa(model)
    return model


class OfficialMixer(nn.Module):
    """Two official layers in a row on patches, in a model that says nothing of patches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = foreign.OfficialGPSA(32, 4), foreign.OfficialGPSA(32, 4)

    def forward(self, x):
        return self.second(self.first(x))


def distances(grid: tuple[int, int]) -> torch.Tensor:
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double().reshape(-1, 2)
    return torch.cdist(place, place)


def dense(model: nn.Module, images: torch.Tensor, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Every layer's attention map in float64, (B, heads, N, N), by the layers' own `get_attention`, patches only."""
    maps = {}

    def hook(name, module, args, kwargs):
        x, patches = args[0], grid[0] * grid[1]
        if hasattr(module, "qkv"):
            q, k, _ = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = getattr(module, "q_norm", nn.Identity())(q), getattr(module, "k_norm", nn.Identity())(k)
            scores = q @ k.transpose(-2, -1) * module.scale
            attention = scores.softmax(-1)[:, :, -patches:, -patches:]
            maps[name] = attention / attention.sum(-1, keepdim=True)
        else:
            if isinstance(module, ck.GPSA):
                module.grid_size = grid
            else:
                module.rel_indices = module.get_rel_indices(patches).to(x.dtype)
            maps[name] = module.get_attention(x)

    model = copy.deepcopy(model).double().eval()
    for name, module in model.named_modules():
        if hasattr(module, "qkv") or hasattr(module, "gating_param"):
            module.register_forward_pre_hook(lambda m, a, kw, name=name: hook(name, m, a, kw), with_kwargs=True)
    with torch.no_grad():
        model(images.double())
    return maps


def mean_distance(attention: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Equation 8 as it stands, (heads,)."""
    return (attention * distances(grid)).sum((2, 3)).mean(0) / (grid[0] * grid[1])


MODELS = {"ours": ours, "timm": timm_s, "replaced": replaced, "deit": lambda: ours(local_up_to_layer=0)}
EACH_MODEL = pytest.mark.parametrize("kind", MODELS)


class TestNonlocality:
    @EACH_MODEL
    def test_is_the_dense_definition_in_float64(self, kind):
        model = MODELS[kind]().double()
        images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        expected = dense(model, images, (4, 4))
        found = locality.nonlocality(model, images)
        assert [layer.name for layer in found] == list(expected) == [f"blocks.{index}.attn" for index in range(4)]
        for layer in found:
            value = mean_distance(expected[layer.name], (4, 4))
            torch.testing.assert_close(layer.nonlocality, value, rtol=1e-12, atol=1e-12)

    @EACH_MODEL
    def test_is_it_in_float32_up_to_rounding(self, kind):
        model, images = MODELS[kind](), torch.randn(3, 3, 32, 32)
        expected = dense(model, images, (4, 4))
        for layer in locality.nonlocality(model, images):
            value = mean_distance(expected[layer.name], (4, 4))
            torch.testing.assert_close(layer.nonlocality, value, rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize("size", [(16, 64), (64, 16), (24, 40), (8, 8)])
    def test_any_grid(self, size):
        model, images = ours().double(), torch.randn(2, 3, *size, dtype=torch.float64)
        grid = (size[0] // 8, size[1] // 8)
        expected = dense(model, images, grid)
        for layer in locality.nonlocality(model, images):
            value = mean_distance(expected[layer.name], grid)
            torch.testing.assert_close(layer.nonlocality, value, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("entries", [1, 100, 1500])
    def test_blocks_of_any_size_give_the_same(self, entries, monkeypatch):
        """1: one query of one image at a time; 100: some queries; 1500: one image, and one left over."""
        model, images = ours().double(), torch.randn(3, 3, 32, 40, dtype=torch.float64)
        whole = locality.nonlocality(model, images)
        monkeypatch.setattr(locality, "_ENTRIES", entries)
        for layer, expected in zip(locality.nonlocality(model, images), whole, strict=True):
            torch.testing.assert_close(layer.nonlocality, expected.nonlocality, rtol=1e-13, atol=0)

    def test_no_map_is_held(self, monkeypatch):
        """The largest tensor that any operation makes is a block, not an N x N map of the batch."""
        monkeypatch.setattr(locality, "_ENTRIES", 1 << 14)
        model, images = ours(num_heads=2, depth=2, local_up_to_layer=1), torch.randn(4, 3, 128, 128)

        class Largest(torch.utils._python_dispatch.TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and function.is_view is False:
                    self.size = max(self.size, out.numel())
                return out

        with Largest() as plain, torch.no_grad():
            model(images)
        with Largest() as measured:
            locality.nonlocality(model, images)
        assert measured.size <= plain.size < 4 * 2 * 256 * 256

    def test_fresh_layers_of_nine_heads_look_2_9_patches_far_and_uniform_attention_7_3(self):
        """14 x 14 patches. The convolutional start of the paper's small model, and no start at all."""
        model = models.ConViT(img_size=56, patch_size=4, embed_dim=36, num_heads=9, depth=3, local_up_to_layer=2)
        with torch.no_grad():
            for block in model.blocks[:2]:
                block.attn.qk.weight.zero_()
            model.blocks[2].attn.qkv.weight.zero_()
        first, second, last = locality.nonlocality(model, torch.randn(1, 3, 56, 56))
        uniform = distances((14, 14)).mean().item()
        assert first.nonlocality.mean().item() == pytest.approx(2.88, abs=0.01)
        assert second.content.mean().item() == pytest.approx(7.28, abs=0.01)
        assert last.nonlocality.tolist() == pytest.approx([uniform] * 9, rel=1e-6)

    def test_parts_and_gates_make_the_whole(self):
        model = ours().double()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        for layer in locality.nonlocality(model, images)[:2]:
            module = model.get_submodule(layer.name)
            assert torch.equal(layer.gate, module.gating_param.sigmoid().detach())
            mixed = (1 - layer.gate) * layer.content + layer.gate * layer.position
            torch.testing.assert_close(layer.nonlocality, mixed)
            with torch.no_grad():
                module.gating_param.fill_(50)  # position alone
            alone = mean_distance(dense(model, images, (4, 4))[layer.name], (4, 4))
            torch.testing.assert_close(layer.position, alone)

    def test_is_the_layer_s_own_get_attention_map(self):
        layer = perturb(OfficialMixer())
        x = torch.randn(3, 25, 32)
        first, second = locality.nonlocality(layer, x)
        torch.testing.assert_close(first.nonlocality.float(), layer.first.get_attention_map(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            second.nonlocality.float(), layer.second.get_attention_map(layer.first(x)), rtol=1e-5, atol=1e-5
        )

    def test_batches_of_different_size_and_shape_are_means_over_images(self):
        model = ours()
        images = torch.randn(5, 3, 32, 32)
        whole = locality.nonlocality(model, images)
        parts = locality.nonlocality(model, iter([images[:3], images[3:4], images[4:]]))
        for layer, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(layer.nonlocality, expected.nonlocality, rtol=1e-6, atol=1e-6)

    def test_plain_vit_of_timm_with_normalised_queries(self):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, qk_norm=True).double()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.q_norm.weight.mul_(5)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected = dense(model, images, (4, 4))
        found = locality.nonlocality(model, images)
        assert [layer.name for layer in found] == ["blocks.0.attn", "blocks.1.attn"]
        for layer in found:
            assert layer.gate is None and layer.position is None
            torch.testing.assert_close(layer.nonlocality, mean_distance(expected[layer.name], (4, 4)))

    def test_the_class_token_has_no_part_in_it(self):
        """What the patches pay to it is left out, whatever it is; the rest counts as a whole."""
        model = ours(local_up_to_layer=0, depth=1, use_pos_embed=False).double()
        images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        before = locality.nonlocality(model, images)[0].nonlocality
        with torch.no_grad():
            model.cls_token.mul_(-50)
        torch.testing.assert_close(locality.nonlocality(model, images)[0].nonlocality, before)

    def test_leaves_the_model_as_it_was(self):
        model = ours(attn_drop_rate=0.5, drop_path_rate=0.5).train()
        model.blocks[1].eval()
        before = [module.training for module in model.modules()]
        images = torch.randn(2, 3, 32, 32)
        first, second = locality.nonlocality(model, images), locality.nonlocality(model, images)
        assert all(torch.equal(a.nonlocality, b.nonlocality) for a, b in zip(first, second, strict=True))
        assert [module.training for module in model.modules()] == before
        assert all(not module._forward_pre_hooks for module in model.modules())
        assert model(images).requires_grad

    def test_leaves_it_so_after_an_error(self):
        model = ours().train()
        with pytest.raises(ValueError, match="within the grid"):
            locality.attention_maps(model, torch.randn(2, 3, 32, 32), (4, 0))
        assert model.training
        assert all(not module._forward_pre_hooks for module in model.modules())

    def test_half_precision(self):
        found = locality.nonlocality(ours().bfloat16(), torch.randn(2, 3, 32, 32).bfloat16())
        assert all(torch.isfinite(layer.nonlocality).all() for layer in found)


class TestGates:
    @pytest.mark.parametrize("kind", ["ours", "timm", "replaced"])
    def test_are_sigmoids_of_the_gating_parameters(self, kind):
        model = MODELS[kind]()
        found = locality.gates(model)
        assert list(found) == ["blocks.0.attn", "blocks.1.attn"]
        for name, gate in found.items():
            assert torch.equal(gate, model.get_submodule(name).gating_param.detach().double().sigmoid())

    def test_none_in_plain_attention(self):
        assert locality.gates(ours(local_up_to_layer=0)) == {}


class TestMaps:
    @EACH_MODEL
    @pytest.mark.parametrize("query", [(0, 0), (1, 3), (3, 2)])
    def test_are_a_row_of_the_dense_map(self, kind, query):
        model = MODELS[kind]().double()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected = dense(model, images, (4, 4))
        found = locality.attention_maps(model, images, query)
        assert list(found) == list(expected)
        for name, attention in found.items():
            row = expected[name][:, :, query[0] * 4 + query[1]].unflatten(-1, (4, 4))
            torch.testing.assert_close(attention, row, rtol=1e-10, atol=1e-12)

    def test_rows_and_columns_of_a_wide_image(self):
        model = ours()
        images = torch.randn(1, 3, 16, 48)
        expected = dense(model, images, (2, 6))
        for name, attention in locality.attention_maps(model, images, (1, 5)).items():
            assert attention.shape == (1, 4, 2, 6)
            torch.testing.assert_close(attention.flatten(2).double(), expected[name][:, :, 11], rtol=1e-4, atol=1e-5)


class TestErrors:
    def test_a_model_without_attention(self):
        with pytest.raises(ValueError, match="ResNet has neither a GPSA layer nor plain attention"):
            locality.nonlocality(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))

    @pytest.mark.parametrize("addition", ["nothing", "parameter", "buffer", "module"])
    def test_attention_with_something_of_its_own_is_not_taken_for_plain(self, addition):
        """A relative position bias, a rotation: what changes the map without standing in the qkv projection."""

        class Attention(nn.Module):
            num_heads, scale = 4, 0.5

            def __init__(self):
                super().__init__()
                self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
                if addition == "parameter":
                    self.relative_position_bias = nn.Parameter(torch.zeros(4))
                if addition == "buffer":
                    self.register_buffer("k_bias", torch.zeros(16))
                if addition == "module":
                    self.rotation = nn.Linear(4, 4)

        model = nn.Sequential(Attention())
        if addition == "nothing":
            assert list(locality.attention_layers(model)) == ["0"]
        else:
            with pytest.raises(ValueError, match="neither a GPSA layer nor plain attention"):
                locality.attention_layers(model)

    def test_a_gpsa_of_other_mathematics(self):
        with pytest.raises(TypeError, match="cannot be replaced exactly: its positional features"):
            locality.gates(nn.Sequential(foreign.PlainDistanceGPSA(32, 4)))

    @pytest.mark.parametrize("layer", [ck.GPSA(32, 4), convit.GPSA(32, 4), convit.MHSA(32, 4)])
    def test_a_map_that_hooks_may_change(self, layer):
        model, images = nn.Sequential(layer), torch.randn(1, 16, 32)
        handle = layer.attn_drop.register_forward_hook(lambda module, inputs, attention: 0 * attention)
        for function in (locality.nonlocality, lambda *given: locality.attention_maps(*given, (0, 0))):
            with pytest.raises(TypeError, match=r"0: attn_drop has hooks, which may change the map.*undo that first"):
                function(model, images)
        handle.remove()
        locality.nonlocality(model, images)

    def test_positional_weights_that_cannot_be_read(self):
        layer = ck.GPSA(32, 4)
        prune.l1_unstructured(layer.pos_proj, "weight", 0.5)
        with pytest.raises(TypeError, match="0: pos_proj has hooks, which may change the map"):
            locality.nonlocality(nn.Sequential(layer), torch.randn(1, 16, 32))
        with pytest.raises(RuntimeError, match="positional weights cannot be read: pos_proj has hooks"):
            layer.position_weight()
        assert locality.gates(nn.Sequential(layer))["0"].shape == (4,)

    def test_no_images(self):
        for images in (torch.randn(0, 3, 32, 32), []):
            with pytest.raises(ValueError, match="at least one image"):
                locality.nonlocality(ours(), images)

    def test_tokens_that_form_no_grid_name_the_layer(self):
        with pytest.raises(ValueError, match=r"first: 12 tokens form no square grid: pass grid_size"):
            locality.nonlocality(OfficialMixer(), torch.randn(1, 12, 32))

    def test_a_grid_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"blocks.0.attn: grid_size \(2, 4\) has 8 tokens, but the input has 16"):
            locality.nonlocality(ours(), torch.randn(1, 3, 32, 32), grid_size=(2, 4))


class TestCommand:
    ARGUMENTS = '{"img_size": 28, "patch_size": 4, "in_chans": 1, "depth": 3, "local_up_to_layer": 2, "embed_dim": 16}'

    @pytest.fixture(autouse=True)
    def files(self, tmp_path, monkeypatch):
        """A checkpoint of a small model and two photographs."""
        monkeypatch.chdir(tmp_path)
        for name, array in zip(("temple.png", "flower.jpg"), load_sample_images().images, strict=True):
            Image.fromarray(array).save(name)
        self.model = perturb(models.convit_tiny(num_classes=10, **json.loads(self.ARGUMENTS)))
        save_file(self.model.state_dict(), "weights.safetensors")
        torch.save({"state_dict_ema": self.model.state_dict()}, "weights.pth")

    def run(self, *arguments: str, model_args: str = ARGUMENTS, out: str = "figure.png"):
        options = ("--model", "convit_tiny", "--model-args", model_args, "--out", out)
        return CliRunner().invoke(app, ["locality", *options, *arguments])

    @pytest.mark.parametrize("checkpoint", ["weights.safetensors", "weights.pth"])
    def test_writes_the_figure_and_the_numbers(self, checkpoint):
        result = self.run(
            "temple.png", "flower.jpg", "--checkpoint", checkpoint, "--query", "2", "3", "--json", "numbers.json"
        )
        assert result.exit_code == 0, result.output
        with Image.open("figure.png") as figure:
            assert min(figure.size) > 500
        numbers = json.loads(Path("numbers.json").read_text())
        assert (numbers["images"], numbers["query"]) == (2, [2, 3])
        assert [layer["name"] for layer in numbers["layers"]] == [f"blocks.{index}.attn" for index in range(3)]
        inputs, _ = loading.load_images([Path("temple.png"), Path("flower.jpg")], self.model, None)
        for layer, expected in zip(numbers["layers"], locality.nonlocality(self.model, inputs), strict=True):
            assert layer["nonlocality"] == pytest.approx(expected.nonlocality.tolist())
            assert layer["gate"] == (None if expected.gate is None else pytest.approx(expected.gate.tolist()))

    def test_the_query_is_the_centre_and_the_figure_may_be_svg(self):
        result = self.run("flower.jpg", "--size", "28", "56", "--json", "n.json", out="figure.svg")
        assert result.exit_code == 0, result.output
        assert json.loads(Path("n.json").read_text())["query"] == [3, 7]
        text = Path("figure.svg").read_text()
        for words in ("as initialised, untrained; 1 image of 28 x 56 pixels", "row 3, column 7", "Gates"):
            assert words in text

    def test_a_model_of_timm_without_gpsa(self):
        options = (
            "--model",
            "deit_tiny_patch16_224",
            "--model-args",
            '{"img_size": 32, "depth": 2}',
            "--size",
            "32",
            "32",
        )
        result = CliRunner().invoke(app, ["locality", "flower.jpg", *options, "--out", "figure.svg"])
        assert result.exit_code == 0, result.output
        assert "no GPSA layer" in Path("figure.svg").read_text()

    def test_pictures_are_the_inputs_before_normalising(self):
        model = models.convit_tiny(img_size=64)
        inputs, (picture,) = loading.load_images([Path("flower.jpg")], model, (64, 96))
        assert (inputs.shape, picture.shape) == ((1, 3, 64, 96), (64, 96, 3))
        mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
        torch.testing.assert_close((picture - mean) / std, inputs[0].permute(1, 2, 0), rtol=1e-5, atol=1e-5)
        with Image.open("flower.jpg") as image:
            wide = image.convert("RGB").resize((96, 64), Image.Resampling.BICUBIC)
        expected = torch.frombuffer(bytearray(wide.tobytes()), dtype=torch.uint8).reshape(64, 96, 3) / 255
        assert (picture - expected).abs().mean() < 0.02

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("flower.jpg", "--checkpoint", "cut.safetensors"), "cut.safetensors cannot be read as a checkpoint"),
            (("flower.jpg", "--checkpoint", "cut.pth"), "cut.pth cannot be read as a checkpoint"),
            (("flower.jpg", "--checkpoint", "missing.pth"), "missing.pth"),
            (("cut.jpg",), "cut.jpg cannot be read as an image"),
            (("weights.pth",), "weights.pth cannot be read as an image"),
            (("missing.jpg",), "missing.jpg"),
            (("flower.jpg", "--query", "7", "0"), "within the grid of 7 x 7, but is (7, 0)"),
            (("flower.jpg", "--size", "28", "30"), "28 x 30 pixels does not divide into patches of 4 x 4"),
            (("flower.jpg", "--out", "figure.txt"), "must end in one of .png, .svg, .pdf, but is figure.txt"),
            (("flower.jpg", "--json", "nowhere/n.json"), "--json nowhere/n.json cannot be written: there is no folder"),
            (("flower.jpg", "--model", "convit_huge"), "unknown model 'convit_huge': allowed are convit_tiny,"),
            (("flower.jpg", "--model", "resnet10t", "--model-args", "{}"), "neither a GPSA layer nor plain attention"),
            (("flower.jpg", "--model-args", "{"), "--model-args must be JSON"),
            (("flower.jpg", "--model-args", "[1]"), "must be a JSON object"),
            (("flower.jpg", "--model-args", '{"deep": 1}'), "convit_tiny has no arguments deep: allowed are"),
            (("flower.jpg", "--model-args", '{"local_up_to_layer": 13}'), "local_up_to_layer=13 and depth=12"),
            (("flower.jpg", "--device", "tpu"), "tpu"),
            ((), "images"),
        ],
    )
    def test_what_does_not_fit_is_named_and_nothing_is_written(self, arguments, text):
        for whole in ("weights.safetensors", "weights.pth", "flower.jpg"):
            data = Path(whole).read_bytes()
            Path(f"cut{Path(whole).suffix}").write_bytes(data[: len(data) // 2])
        before = set(Path().iterdir())
        result = self.run(*arguments)
        assert result.exit_code == 2, result.output
        assert text in result.output.replace("\n", " ")
        assert set(Path().iterdir()) == before

    def test_weights_of_another_model_are_told_in_short(self):
        arguments = json.dumps(json.loads(self.ARGUMENTS) | {"embed_dim": 32, "depth": 4})
        result = self.run("flower.jpg", "--checkpoint", "weights.safetensors", model_args=arguments)
        assert result.exit_code == 2
        assert "11 parameters are missing (blocks.3.norm1.weight)" in result.output
        assert "(cls_token (1, 1, 16), not (1, 1, 32))" in result.output

    def test_an_error_while_writing_leaves_the_older_file(self, monkeypatch):
        Path("figure.png").write_text("older")

        def fail(figure, path):
            path.write_text("half")
            raise OSError("disk full")

        monkeypatch.setattr(locality_figure.style, "save", fail)
        before = set(Path().iterdir())
        result = self.run("flower.jpg")
        assert (result.exit_code, result.stderr) == (2, "figure.png could not be written: disk full\n")
        assert Path("figure.png").read_text() == "older"
        assert set(Path().iterdir()) == before

    def test_without_what_it_needs_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.delitem(sys.modules, "convit_kernels.cli.locality_figure")
        monkeypatch.delattr("convit_kernels.cli.locality_figure")
        result = self.run("flower.jpg")
        assert result.exit_code == 1
        assert re.fullmatch(r"locality needs matplotlib: pip install '?matplotlib\S*\n", result.stderr)
