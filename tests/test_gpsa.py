"""The GPSA layer: the reference's parameters and outputs, in every precision, on every grid."""

import copy
import math
from functools import partial

import foreign
import pytest
import torch
from equivalence import assert_as_exact
from timm.models import convit
from torch import nn

import convit_kernels as ck
from convit_kernels.equivalence import eager_attention, expected, relative_indices

KEYS = ["gating_param", "qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "pos_proj.bias"]
AVAILABLE = [backend.name for backend in ck.backends() if backend.available]
pytestmark = pytest.mark.usefixtures("on_device")


def perturbed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.gating_param.add_(torch.randn_like(layer.gating_param))
        layer.pos_proj.weight.add_(0.3 * torch.randn_like(layer.pos_proj.weight))
    return layer


def pair(dim=96, num_heads=4, **options) -> tuple[ck.GPSA, nn.Module]:
    """Our layer and timm's, with the same parameters."""
    ours = perturbed(ck.GPSA(dim, num_heads, **options))
    theirs = convit.GPSA(dim, num_heads, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def without_renormalisation(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """timm's layer by the mathematics alone: dividing by the rows' sums hides what rounding does to a single token."""
    batch, tokens, dim = x.shape
    q, k = layer.qk(x).reshape(batch, tokens, 2, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    v = layer.v(x).reshape(batch, tokens, layer.num_heads, -1).transpose(1, 2)
    pos_weight = layer.pos_proj.weight + 0 * layer.pos_proj.bias[:, None]
    side = math.isqrt(tokens)
    features = relative_indices((side, side), x)
    out = eager_attention(q, k, v, pos_weight, layer.gating_param, features, layer.scale, renormalise=False)
    return layer.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class TestParameters:
    @pytest.mark.parametrize("qkv_bias", [False, True])
    def test_state_dict_is_the_reference_s(self, qkv_bias):
        layer = ck.GPSA(32, 4, qkv_bias=qkv_bias)
        expected = set(KEYS) | ({"qk.bias", "v.bias"} if qkv_bias else set())
        assert set(layer.state_dict()) == expected
        assert list(layer.state_dict()) == list(convit.GPSA(32, 4, qkv_bias=qkv_bias).state_dict())

    @pytest.mark.parametrize("num_heads", [1, 2, 4, 8, 9, 12, 16])
    @pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"use_local_init": False}, {"locality_strength": 2.0}])
    def test_one_seed_gives_the_official_class_s_initial_values(self, num_heads, options):
        torch.manual_seed(5)
        theirs = foreign.OfficialGPSA(144, num_heads, **options)
        torch.manual_seed(5)
        ours = ck.GPSA(144, num_heads, **options)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name

    @pytest.mark.parametrize("num_heads", [4, 9, 12])
    def test_one_seed_gives_timm_s_initial_values(self, num_heads):
        """timm initialises from the model: it draws anew for every linear layer, then calls local_init()."""
        torch.manual_seed(5)
        theirs = convit.GPSA(144, num_heads, locality_strength=1.5)
        theirs.apply(lambda module: convit.ConVit._init_weights(None, module))
        theirs.local_init()
        torch.manual_seed(5)
        ours = ck.GPSA(144, num_heads, locality_strength=1.5)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name

    def test_twelve_heads_place_nine_as_the_reference_does(self):
        layer = ck.GPSA(24, 12)
        assert torch.equal(layer.pos_proj.weight[:9, 2], -torch.ones(9))
        assert (layer.pos_proj.weight[9:, 2].abs() < 0.2).all()
        assert torch.equal(layer.v.weight, torch.eye(24))

    def test_local_init_with_and_without_an_argument(self):
        layer = ck.GPSA(32, 4, locality_strength=3.0)
        layer.local_init()
        assert layer.pos_proj.weight[0].tolist() == [-3.0, -3.0, -3.0]
        layer.local_init(0.5)
        assert layer.pos_proj.weight[3].tolist() == [0.5, 0.5, -0.5]
        layer.local_init(locality_strength=2)
        assert layer.pos_proj.weight[1].tolist() == [-2.0, 2.0, -2.0]

    def test_device_and_dtype_of_the_constructor(self):
        assert {p.dtype for p in ck.GPSA(32, 4, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
        assert {p.device.type for p in ck.GPSA(32, 4, device="meta").parameters()} == {"meta"}


@pytest.mark.equivalence
class TestAgainstTimm:
    @pytest.mark.parametrize("backend", AVAILABLE)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [1, 16, 196])
    def test_output_and_every_gradient(self, backend, dtype, tokens):
        ours, theirs = pair(qkv_bias=True)
        ours.backend = backend
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        x, grad = torch.randn(2, tokens, 96).to(dtype), torch.randn(2, tokens, 96).to(dtype)

        def run(layer, x, grad):
            x = x.clone().requires_grad_()
            out = layer(x)
            layer.zero_grad()
            out.backward(grad)
            return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}

        def eager(dtype):
            return run(copy.deepcopy(theirs).to(dtype), x.to(dtype), grad.to(dtype))

        def formula():
            layer = copy.deepcopy(theirs).double()
            layer.forward = partial(without_renormalisation, layer)
            return run(layer, x.double(), grad.double())

        found = run(ours, x, grad)
        assert_as_exact(found, expected(eager, dtype, implementation=formula))
        assert torch.equal(found["pos_proj.bias"], torch.zeros(4, dtype=dtype))

    def test_float64_to_its_last_digits(self):
        ours, theirs = pair()
        x = torch.randn(2, 25, 96, dtype=torch.float64)
        torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-12, atol=1e-13)

    def test_qk_scale(self):
        ours, theirs = pair()
        ours.scale = ck.GPSA(96, 4, qk_scale=0.7).scale
        theirs.scale = 0.7
        x = torch.randn(2, 16, 96)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        ours, theirs = pair()
        x = torch.randn(2, 49, 96)

        def eager(wanted):
            if wanted == torch.float64:
                return {"out": copy.deepcopy(theirs).double()(x.double())}
            with torch.autocast(x.device.type, wanted):
                return {"out": theirs(x)}

        with torch.autocast(x.device.type, dtype):
            out, theirs_out = ours(x), theirs(x)
        assert out.dtype == theirs_out.dtype == dtype
        assert_as_exact({"out": out}, expected(eager, dtype))

    @pytest.mark.parametrize("train", [True, False])
    def test_dropout_draws_as_the_reference_does(self, train):
        ours, theirs = pair(attn_drop=0.3, proj_drop=0.2)
        ours.train(train)
        theirs.train(train)
        x = torch.randn(2, 16, 96)
        if x.is_cuda:
            ours.backend = "reference"  # the fused kernels draw a mask of their own
        torch.manual_seed(11)
        expected = theirs(x)
        torch.manual_seed(11)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)

    def test_attention_and_its_map(self):
        ours, theirs = pair()
        x = torch.randn(3, 25, 96)
        theirs(x)
        torch.testing.assert_close(ours.get_attention(x), theirs.get_attention(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.get_attention_map(x), theirs.get_attention_map(x), rtol=1e-5, atol=1e-5)
        for mine, other in zip(
            ours.get_attention_map(x, return_map=True), theirs.get_attention_map(x, True), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)

    def test_timm_s_own_model_may_build_it(self, monkeypatch):
        """timm's blocks construct the layer, apply their initialisation and call local_init()."""
        monkeypatch.setattr(convit, "GPSA", ck.GPSA)
        model = convit.ConVit(embed_dim=16, num_heads=4, depth=3, local_up_to_layer=2, img_size=64, num_classes=5)
        assert sum(isinstance(module, ck.GPSA) for module in model.modules()) == 2
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
        assert torch.equal(model.blocks[0].attn.v.weight, torch.eye(64))


class TestGrids:
    @pytest.mark.parametrize("grid", [(8, 18), (18, 8), (1, 144), (12, 12)])
    def test_output_is_the_explicit_attention_on_that_grid(self, grid):
        layer = perturbed(ck.GPSA(32, 4, grid_size=grid)).double()
        x = torch.randn(2, 144, 32, dtype=torch.float64)
        v = layer.v(x).reshape(2, 144, 4, 8).transpose(1, 2)
        expected = layer.proj((layer.get_attention(x) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-12)

    def test_grid_size_may_be_assigned_at_any_time(self):
        layer = perturbed(ck.GPSA(32, 4))
        x = torch.randn(1, 144, 32)
        square = layer(x)
        layer.grid_size = (8, 18)
        wide = layer(x)
        layer.grid_size = (18, 8)
        assert not torch.allclose(wide, square, atol=1e-4)
        assert not torch.allclose(wide, layer(x), atol=1e-4)

    def test_no_square_says_what_to_pass(self):
        with pytest.raises(ValueError, match="12 tokens form no square grid: pass grid_size"):
            ck.GPSA(32, 4)(torch.randn(1, 12, 32))

    @pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 2, 3)])
    @pytest.mark.parametrize("backend", [None, "composite", "reference"])
    def test_one_to_three_dimensions_are_the_explicit_attention(self, grid, backend):
        spacing = [0.5, 1.5, 2.0][: len(grid)]
        layer = perturbed(ck.GPSA(32, 4, grid_size=grid, spacing=spacing, backend=backend)).double()
        places = torch.cartesian_prod(*(torch.arange(side) * step for side, step in zip(grid, spacing, strict=True)))
        places = places.double().view(12, -1).flip(-1)  # the last axis first
        offsets = places[None] - places[:, None]
        features = torch.cat((offsets, offsets.square().sum(-1, keepdim=True)), dim=-1)
        assert layer.pos_proj.weight.shape == (4, len(grid) + 1)
        torch.testing.assert_close(layer.get_rel_indices(), features[None])
        x = torch.randn(2, 12, 32, dtype=torch.float64)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (*layer.qk(x).chunk(2, -1), layer.v(x)))
        g = layer.gating_param.sigmoid()[:, None, None]
        position = (features @ layer.pos_proj.weight.T).permute(2, 0, 1).softmax(-1)
        attention = (1 - g) * (q @ k.mT * layer.scale).softmax(-1) + g * position
        expected = layer.proj((attention @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(layer.get_attention(x), attention)
        distance = (attention * offsets.square().sum(-1).sqrt()).sum((-2, -1)).mean(0) / 12
        torch.testing.assert_close(layer.get_attention_map(x), distance)

    @pytest.mark.parametrize(("heads", "grid"), [(5, (9,)), (4, (3, 3)), (8, (3, 4, 5)), (27, (3, 4, 5))])
    def test_local_init_makes_each_head_attend_to_one_neighbour(self, heads, grid):
        layer = ck.GPSA(heads, heads, locality_strength=50.0, grid_size=grid, spacing=0.3)
        window = {5: 5, 4: 2, 8: 2, 27: 3}[heads]
        with torch.no_grad():
            layer.gating_param.fill_(50.0)
            layer.local_init(1000.0)
        middle = [side // 2 for side in grid]
        weights = layer.position_weight() / (2 * 0.3 * 1000)  # the offsets of the middles, in neighbours
        offsets = {tuple(round(value, 3) for value in row[:-1].tolist()) for row in weights}
        assert len(offsets) == heads == window ** len(grid)
        assert {abs(value) for offset in offsets for value in offset} <= {0.0, 0.5, 1.0, 2.0}
        if window % 2:  # then the middles are tokens
            attention = layer.get_attention(torch.randn(1, math.prod(grid), heads))[0]
            index = lambda place: sum(at * math.prod(grid[axis + 1 :]) for axis, at in enumerate(place))  # noqa: E731
            looked_at = attention[:, index(middle)].argmax(-1).tolist()
            places = [[at + int(d) for at, d in zip(middle, reversed(o), strict=True)] for o in sorted(offsets)]
            assert sorted(looked_at) == sorted(map(index, places))

    def test_a_symbolic_trace_keeps_the_layer_s_grid(self):
        layer, x = perturbed(ck.GPSA(32, 4, grid_size=(2, 8))), torch.randn(2, 16, 32)
        assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))

    def test_4096_tokens(self):
        assert torch.isfinite(ck.GPSA(8, 2)(torch.randn(1, 4096, 8))).all()


class TestHouse:
    def test_empty_batch(self):
        layer = ck.GPSA(32, 4)
        out = layer(torch.randn(0, 16, 32))
        assert out.shape == (0, 16, 32)
        out.sum().backward()
        assert torch.equal(layer.gating_param.grad, torch.zeros(4))

    def test_huge_locality_gives_no_nan(self):
        layer = ck.GPSA(32, 4, locality_strength=1e4)
        x = torch.randn(1, 196, 32)
        out = layer(x)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(layer.pos_proj.weight.grad).all()

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"dim": 30, "num_heads": 4}, "dim=30.*num_heads=4"),
            ({"dim": 32, "num_heads": 0}, "num_heads=0"),
            ({"dim": 32, "num_heads": 4, "grid_size": (0, 4)}, "sides of at least 1"),
            ({"dim": 32, "num_heads": 4, "spacing": (1, 2, 3)}, "one for each of the grid's 2 sides, but is .1, 2, 3."),
            ({"dim": 32, "num_heads": 4, "backend": "fast"}, "unknown backend 'fast'"),
            ({"dim": 32, "num_heads": 4, "attn_drop": 1.5}, "dropout"),
        ],
    )
    def test_bad_arguments(self, arguments, text):
        with pytest.raises(ValueError, match=text):
            ck.GPSA(**arguments)

    def test_symbolic_trace_keeps_the_attention_as_one_call(self):
        layer = perturbed(ck.GPSA(32, 4))
        traced = torch.fx.symbolic_trace(layer)
        x = torch.randn(2, 16, 32)
        assert "gpsa_attention" in {getattr(node.target, "__name__", "") for node in traced.graph.nodes}
        assert torch.equal(traced(x), layer(x))

    @pytest.mark.parametrize("strict", [True, False])
    def test_a_layer_in_two_places_is_exported_as_it_runs(self, strict):
        layer = perturbed(ck.GPSA(32, 4, backend="composite"))
        model, x = nn.Sequential(layer, nn.Sequential(layer)), torch.randn(2, 16, 32)
        torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))

    def test_deepcopy_and_repr(self):
        layer = ck.GPSA(32, 4, grid_size=(2, 8))
        assert torch.equal(copy.deepcopy(layer)(torch.ones(1, 16, 32)), layer(torch.ones(1, 16, 32)))
        assert "num_heads=4, grid_size=(2, 8)" in repr(layer)

    def test_data_parallel_sees_every_parameter_used(self):
        layer = ck.GPSA(32, 4, qkv_bias=True)
        layer(torch.randn(1, 16, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
