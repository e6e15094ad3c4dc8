"""replace_gpsa on the GPSA of other projects: other parts and gates, grids, a key mask, the map on request."""

import copy
import pickle

import foreign
import forks
import pytest
import torch
from foreign import perturbed
from torch import nn

import convit_kernels as ck
from convit_kernels import locality

TOKENS = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


def leaves(result) -> list[torch.Tensor]:
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def learn(layer: nn.Module, x: torch.Tensor, *args, **kwargs) -> list[torch.Tensor]:
    """Outputs, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    results = leaves(layer(x, *args, **kwargs))
    inputs = [x, *(parameter for _, parameter in sorted(layer.named_parameters()))]
    return results + list(torch.autograd.grad(results[0].square().sum(), inputs))


def assert_same(layer: nn.Module, x: torch.Tensor, *args, **kwargs) -> ck.GPSA:
    """Replaces a layer within a model and holds it to what it was, in both modes and copied."""
    model = nn.ModuleList([copy.deepcopy(perturbed(layer))])
    theirs = model[0]
    assert ck.replace_gpsa(model) == 1
    ours = model[0]
    assert isinstance(ours, ck.GPSA)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mode in (True, False):
        expected = learn(theirs.train(mode), x, *args, **kwargs)
        for each in (ours.train(mode), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            torch.testing.assert_close(learn(each, x, *args, **kwargs), expected, rtol=1e-4, atol=1e-4)
    return ours


class TestParts:
    @pytest.mark.situation(
        "Variants",
        "q, k and v as three layers, or fused in one qkv",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("kind", [foreign.SeparateGPSA, foreign.FusedGPSA])
    @pytest.mark.parametrize("qkv_bias", [False, True])
    def test_projections(self, kind, qkv_bias):
        assert_same(kind(32, 4, qkv_bias=qkv_bias), TOKENS)

    @pytest.mark.situation(
        "Variants",
        "a gate that is 1 - sigmoid of its parameter (ConViTEnc)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    def test_an_inverted_gate(self):
        ours = assert_same(forks.InvertedGate(32, 4), TOKENS)
        torch.testing.assert_close(ours.gate(), -ours.gating_param)

    def test_a_gate_of_another_shape(self):
        assert_same(forks.BroadcastGate(32, 4), TOKENS)

    def test_initial_values_are_those_of_a_convolution_in_each(self):
        expected = ck.GPSA(32, 4)
        for kind in (foreign.FusedGPSA, foreign.VisslGPSA, foreign.MirroredGPSA, foreign.RowFirst):
            ours = ck.GPSA.from_module(kind(32, num_heads=4))
            ours.reset_parameters()
            step = 0.5 if kind is foreign.RowFirst else 1.0  # between neighbours
            unit = torch.tensor([step, step, 1.0])
            torch.testing.assert_close(ours.position_weight(), expected.position_weight() * unit)
            values = ours.qkv.weight[-32:] if kind is foreign.FusedGPSA else ours.v.weight
            assert torch.equal(values, torch.eye(32))


class TestGrids:
    @pytest.mark.situation(
        "Variants",
        "a sequence, features (d, d^2) (TorchSig)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("tokens", [5, 16, 30])
    def test_a_line(self, tokens):
        assert_same(foreign.OneDimensionalGPSA(32, 4), torch.randn(2, tokens, 32))

    @pytest.mark.situation(
        "Variants",
        "volumes, features (dx, dy, dz, d^2) in any order (DIRECT)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("grid", [(2, 2, 4), (4, 2, 2), (1, 4, 4)])
    def test_space(self, grid):
        assert_same(foreign.ThreeDimensionalGPSA(32, 4, grid_size=grid), TOKENS)

    def test_a_cube(self):
        ours = assert_same(foreign.CubeGPSA(32, 4), torch.randn(2, 27, 32))
        with pytest.raises(ValueError, match=r"16 tokens form no cube: pass grid_size=\(depth, height, width\)"):
            ours(TOKENS)
        assert ours(TOKENS, grid_size=(1, 4, 4)).shape == TOKENS.shape

    def test_the_grid_that_a_block_sets(self):
        layer = perturbed(foreign.ThreeDimensionalGPSA(32, 4, grid_size=(2, 2, 4)))
        ours = ck.GPSA.from_module(layer)
        for grid in ((4, 2, 2), (2, 4, 2)):
            layer.current_grid_size = ours.current_grid_size = grid
            torch.testing.assert_close(ours(TOKENS), layer(TOKENS), rtol=1e-4, atol=1e-5)

    @pytest.mark.situation(
        "Variants",
        "offsets of the query from the key, or in another order",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("kind", [foreign.MirroredGPSA, foreign.RowFirst])
    def test_order_and_sign(self, kind):
        ours = assert_same(kind(32, 4), TOKENS)
        layer = kind(32, 4)
        layer(TOKENS)
        assert torch.equal(ours.get_rel_indices(16), layer.rel_indices)

    @pytest.mark.situation(
        "Variants",
        "coordinates from -1 to 1, whatever the size",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("tokens", [9, 16, 49])
    def test_scaled_coordinates(self, tokens):
        assert_same(foreign.ScaledGPSA(32, 4), torch.randn(2, tokens, 32))

    @pytest.mark.situation(
        "Variants",
        "qkv, inverted gate, coordinates from -1 to 1 on 3 x 5 (ConViTEnc)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    def test_one_scale_for_each_side(self):
        ours = assert_same(foreign.EncoderGPSA(32, 4, grid_size=(3, 5)), torch.randn(2, 15, 32))
        assert ours.spacing == (1.0, 0.5)

    def test_positions_that_somebody_put_in_for_a_grid_that_is_not_square(self):
        layer = perturbed(foreign.OfficialGPSA(32, 4))
        layer.rel_indices = layer.features(2, 8)
        ours = ck.GPSA.from_module(layer)
        for tokens in (16, 25):  # for another number the layer makes its own
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(ours(x), layer(x), rtol=1e-4, atol=1e-5)

    def test_hooks_on_the_positions_see_the_layers_own_features(self):
        for make in (foreign.RowFirst, foreign.OneDimensionalGPSA, foreign.ScaledGPSA, foreign.MirroredGPSA):
            seen, outputs = [], []
            layer = perturbed(make(32, 4))
            layer.pos_proj.register_forward_hook(
                lambda module, inputs, output, seen=seen: (seen.append(inputs[0][0]), output * 0.5)[1]
            )
            for each in (layer, ck.GPSA.from_module(layer)):
                outputs.append(each(TOKENS))
            torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


class TestKeyMask:
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.6

    @pytest.mark.situation(
        "Variants",
        "a key mask on the mixed map, forward(x, mask)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    @pytest.mark.parametrize("mask", [None, mask, mask.float()])
    def test_of_tokens(self, mask):
        assert_same(foreign.MaskedGPSA(32, 4), TOKENS, mask)
        assert_same(foreign.MaskedGPSA(32, 4), TOKENS, mask=mask)

    @pytest.mark.situation(
        "Variants",
        "feature maps with a key mask (Lux-AI)",
        timm="has no such layer",
        ours="replaced; the same outputs, gradients and state_dict",
    )
    def test_of_feature_maps(self):
        x = TOKENS.transpose(1, 2).unflatten(2, (4, 4))
        ours = assert_same(foreign.LuxGPSA(32, 4, 4), x, self.mask.view(2, 1, 4, 4))
        assert "rel_indices" in ours.state_dict()

    @pytest.mark.parametrize("kind", [foreign.LuxGPSA, foreign.MaskedGPSA])
    def test_dropout_before_or_after_the_mask(self, kind):
        images = kind is foreign.LuxGPSA
        layer = kind(32, 4, 4, attn_drop=0.4) if images else kind(32, 4, attn_drop=0.4)
        x = TOKENS.transpose(1, 2).unflatten(2, (4, 4)) if images else TOKENS
        mask = self.mask.view(2, 1, 4, 4) if images else self.mask
        results = []
        for each in (layer, ck.GPSA.from_module(layer, backend="reference")):
            torch.manual_seed(4)
            results.append(each(x, mask))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)

    def test_a_wrong_shape_is_refused_where_the_map_is_built_too(self):
        layer = ck.GPSA(32, 4)
        for call in (lambda mask: layer(TOKENS, key_mask=mask), lambda mask: layer.get_attention(TOKENS, mask)):
            with pytest.raises(ValueError, match=r"key_mask must have shape \(batch, tokens\)"):
                call(self.mask[:, :1])

    @pytest.mark.parametrize("backend", [backend.name for backend in ck.backends() if backend.available])
    def test_of_our_own_layer(self, backend):
        layer = perturbed(ck.GPSA(32, 4, backend=backend)).eval()
        attention = layer.get_attention(TOKENS) * self.mask[:, None, None]
        attention = attention / attention.sum(-1, keepdim=True)
        torch.testing.assert_close(layer.get_attention(TOKENS, self.mask), attention)
        v = layer.v(TOKENS).unflatten(-1, (4, 8)).transpose(1, 2)
        expected = layer.proj((attention @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(TOKENS, key_mask=self.mask), expected, rtol=1e-4, atol=1e-5)
        layer.pos_proj.register_forward_hook(lambda *_: None)
        layer.backend = None
        torch.testing.assert_close(layer(TOKENS, key_mask=self.mask), expected, rtol=1e-4, atol=1e-5)


class TestMapOnRequest:
    @pytest.mark.situation(
        "Variants",
        "(x, attention, v) from every call (DyTox); `layer.return_attention = True`",
        timm="has no such layer",
        ours="the exact map at its cost; None in its place, and the fast path, by default",
    )
    def test_three_outputs(self):
        layer = perturbed(foreign.DyToxGPSA(32, 4))
        ours = ck.GPSA.from_module(layer)
        assert ours(TOKENS)[1] is None
        ours.return_attention = True
        torch.testing.assert_close(learn(ours, TOKENS), learn(layer, TOKENS), rtol=1e-4, atol=1e-4)
        assert len(ours(TOKENS)) == 3

    def test_two_outputs(self):
        layer = perturbed(forks.Pair(32, 4))
        ours = ck.GPSA.from_module(layer)
        out, attention = ours(TOKENS)
        assert attention is None
        torch.testing.assert_close(out, layer(TOKENS)[0], rtol=1e-4, atol=1e-5)
        ours.return_attention = True
        torch.testing.assert_close(ours(TOKENS), layer(TOKENS), rtol=1e-4, atol=1e-5)

    @pytest.mark.situation(
        "Variants",
        "the map when the call or an attribute asks for it (DyTox's descendants)",
        timm="has no such layer",
        ours="the exact map at its cost, the fast path else",
    )
    def test_on_request(self):
        ours = assert_same(foreign.MapOnRequest(32, 4), TOKENS)
        for arguments in ({"return_attention": True}, {"return_attention": False}):
            ours = assert_same(foreign.MapOnRequest(32, 4), TOKENS, **arguments)
            assert isinstance(ours(TOKENS, **arguments), tuple) == arguments["return_attention"]
        layer = foreign.MapByAttribute(32, 4)
        assert_same(layer, TOKENS)
        layer.return_attn = True
        ours = assert_same(layer, TOKENS)
        assert len(ours(TOKENS)) == 3
        ours.return_attn = False
        assert isinstance(ours(TOKENS), torch.Tensor)

    def test_the_map_is_the_one_that_dropout_has_passed(self):
        layer = foreign.DyToxGPSA(32, 4, attn_drop=0.3)
        ours = ck.GPSA.from_module(layer)
        ours.return_attention, results = True, []
        for each in (layer, ours):
            torch.manual_seed(5)
            results.append(each(TOKENS))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.situation(
    "Variants",
    "several of these in one layer",
    timm="has no such layer",
    ours="replaced; the same outputs, gradients and state_dict",
)
@pytest.mark.parametrize("mask", [None, TestKeyMask.mask])
@pytest.mark.parametrize("request_map", [False, True])
def test_variants_combine(mask, request_map):
    ours = assert_same(foreign.CombinedGPSA(32, 4), TOKENS, request_map, mask=mask)
    assert isinstance(ours(TOKENS, return_attention=request_map), tuple) == request_map


def test_feature_maps_that_are_not_square():
    x = torch.randn(2, 32, 3, 4)
    assert_same(foreign.LuxGPSA(32, 3, 4), x, torch.ones(2, 1, 3, 4, dtype=torch.bool))


@pytest.mark.situation(
    "Variants",
    "noise on the map (BiRT), coordinates given with each call (point clouds)",
    timm="has no such layer",
    ours="refused, with the reason, and nothing is replaced",
)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (forks.NoisyMap, "other outputs or gradients in training mode"),
        (foreign.IrregularGPSA, "forward takes coords"),
    ],
)
def test_other_mathematics_is_refused(make, reason):
    model = nn.Sequential(make(32, 4))
    with pytest.raises(TypeError, match=reason):
        ck.replace_gpsa(model)
    assert type(model[0]) is make


def test_locality_is_for_planes_of_unit_spacing():
    model = nn.Sequential(ck.GPSA(32, 4, grid_size=(16,)))
    with pytest.raises(TypeError, match="0: is not on the tokens of a plane with neighbours one apart"):
        locality.nonlocality(model, TOKENS)


@pytest.mark.parametrize(
    "make",
    [
        foreign.FusedGPSA,
        foreign.OneDimensionalGPSA,
        foreign.ScaledGPSA,
        foreign.EncoderGPSA,
        foreign.RowFirst,
        foreign.MaskedGPSA,
        foreign.DyToxGPSA,
        foreign.MapOnRequest,
    ],
)
def test_compiled_without_a_graph_break(make):
    layer = ck.GPSA.from_module(perturbed(make(32, 4)), backend="composite")
    x = torch.randn(2, 15, 32) if make is foreign.EncoderGPSA else TOKENS
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(leaves(compiled(x)), leaves(layer(x)))
    if make is foreign.MaskedGPSA:
        torch.testing.assert_close(compiled(x, TestKeyMask.mask), layer(x, TestKeyMask.mask))
