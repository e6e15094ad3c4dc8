"""replace_gpsa: the same model, faster; or a clear refusal and the model untouched."""

import copy
import threading

import foreign
import forks
import pytest
import timm
import torch
from equivalence import assert_as_exact
from foreign import LAYERS, output, patch, perturbed, timm_layer
from timm.models import convit
from torch import nn
from torch.nn.modules import module
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import convit_kernels as ck
from convit_kernels import locality
from convit_kernels.equivalence import expected

pytestmark = pytest.mark.usefixtures("on_device")
EACH_LAYER = pytest.mark.parametrize("kind", LAYERS)


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = output(layer, x)
    layer.zero_grad()
    out.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


@EACH_LAYER
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}])
def test_outputs_and_gradients_stay_the_same(kind, options):
    dtype = torch.float64 if kind == "timm" else torch.float32  # the others' positional features are always float32
    layer = perturbed(LAYERS[kind](32, 4, **options)).to(dtype)
    x = torch.randn(2, 16, 32, dtype=dtype)
    expected = gradients(layer, x)
    found = gradients(ck.GPSA.from_module(layer), x)
    assert found.keys() == expected.keys()
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if x.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@EACH_LAYER
def test_parameters_are_the_same_objects_under_the_same_names(kind):
    layer = LAYERS[kind](32, 4)
    replaced = ck.GPSA.from_module(layer)
    assert list(replaced.state_dict()) == list(layer.state_dict())
    before, after = dict(layer.named_parameters()), dict(replaced.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


@EACH_LAYER
def test_converting_leaves_no_trace_in_the_original(kind):
    layer = LAYERS[kind](32, 4)
    before = set(vars(layer)), dict(layer._buffers), list(layer.state_dict())
    ck.GPSA.from_module(layer)
    assert (set(vars(layer)), dict(layer._buffers), list(layer.state_dict())) == before


def test_dytox_still_gets_a_tuple():
    layer = perturbed(foreign.DyToxGPSA(32, 4))
    x = torch.randn(2, 16, 32)
    out, attention, v = layer(x)
    replaced = ck.GPSA.from_module(layer)
    mine, none, values = replaced(x)
    torch.testing.assert_close(mine, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, v)
    assert none is None
    torch.testing.assert_close(replaced.get_attention(x), attention, rtol=1e-4, atol=1e-5)


def test_separate_projections_follow_the_grid_their_block_sets():
    layer = perturbed(foreign.ImagingGPSA(32, 4, grid_size=(2, 6)))
    replaced = ck.GPSA.from_module(layer)
    x = torch.randn(2, 12, 32)
    for grid in ((2, 6), (6, 2), (3, 4)):
        layer.current_grid_size = replaced.current_grid_size = grid
        torch.testing.assert_close(replaced(x), layer(x), rtol=1e-4, atol=1e-5)


@EACH_LAYER
def test_attention_maps_stay_the_same(kind):
    layer = perturbed(LAYERS[kind](32, 4))
    x = torch.randn(2, 16, 32)
    output(layer, x)
    replaced = ck.GPSA.from_module(layer)
    for mine, theirs in zip(replaced.get_attention_map(x, True), layer.get_attention_map(x, True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(replaced.get_attention_map(x), layer.get_attention_map(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(replaced.get_attention(x), layer.get_attention(x), rtol=1e-4, atol=1e-5)


class TestWholeModel:
    def model(self, **options) -> nn.Module:
        return perturbed(
            timm.create_model("convit_tiny", depth=4, local_up_to_layer=3, num_classes=7, **options)
        ).eval()

    def test_every_gpsa_layer_is_swapped_and_no_other(self):
        model = self.model()
        assert ck.replace_gpsa(model) == 3
        assert [type(block.attn).__name__ for block in model.blocks] == ["GPSA", "GPSA", "GPSA", "MHSA"]
        assert all(isinstance(block.attn, ck.GPSA) for block in model.blocks[:3])

    @pytest.mark.equivalence
    @torch.no_grad()
    def test_logits(self):
        model, images = self.model(), torch.randn(2, 3, 224, 224)
        rule = expected(lambda dtype: {"logits": copy.deepcopy(model).to(dtype)(images.to(dtype))}, torch.float32)
        ck.replace_gpsa(model)
        assert_as_exact({"logits": model(images)}, rule)

    def test_an_optimizer_made_before_goes_on_working(self):
        torch.manual_seed(1)
        models = [self.model(), None]
        models[1] = copy.deepcopy(models[0])
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
        ck.replace_gpsa(models[1])
        images, labels = torch.randn(2, 3, 224, 224), torch.tensor([1, 2])
        for _ in range(2):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
            # one AdamW step moves a parameter by lr however small its gradient: rounding decides the sign of none
            assert ours.grad is not None, name
            if "pos_proj.bias" not in name:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4)

    def test_state_dicts_cross_load(self):
        model, other = self.model(), self.model()
        ck.replace_gpsa(other)
        other.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(other.state_dict(), strict=True)

    def test_mode_dtype_and_frozen_parameters_are_kept(self):
        model = self.model().bfloat16()
        model.blocks[0].attn.train()
        model.blocks[1].attn.proj.weight.requires_grad_(False)
        ck.replace_gpsa(model)
        assert model.blocks[0].attn.training
        assert not model.blocks[1].attn.training
        assert not model.blocks[1].attn.proj.weight.requires_grad
        assert model.blocks[2].attn.gating_param.dtype == torch.bfloat16
        assert model(torch.randn(1, 3, 224, 224).bfloat16()).dtype == torch.bfloat16

    def test_hooks_fire_and_their_handles_remove_them(self):
        model, calls = self.model(), []
        layer = model.blocks[0].attn
        handle = layer.register_forward_hook(lambda *_: calls.append("outer"))
        layer.v.register_forward_hook(lambda *_: calls.append("inner"))
        ck.replace_gpsa(model)
        model(torch.randn(1, 3, 224, 224))
        assert sorted(calls) == ["inner", "outer"]
        handle.remove()
        model(torch.randn(1, 3, 224, 224))
        assert sorted(calls) == ["inner", "inner", "outer"]

    def test_a_layer_in_two_places_stays_one(self):
        layer = timm_layer()
        model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": layer})
        assert ck.replace_gpsa(model) == 1
        assert model["a"] is model["b"][0]
        assert model["a"] is model["c"]
        assert isinstance(model["a"], ck.GPSA)

    def test_backend_is_passed_on(self):
        model = self.model()
        ck.replace_gpsa(model, backend="reference")
        assert {block.attn.backend for block in model.blocks[:3]} == {"reference"}

    def test_twice_is_once(self):
        model = self.model()
        ck.replace_gpsa(model)
        with pytest.warns(UserWarning, match="3 already are"):
            assert ck.replace_gpsa(model) == 0

    def test_compiled_model_without_a_graph_break(self):
        model, images = self.model(), torch.randn(1, 3, 224, 224)
        ck.replace_gpsa(model)
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)


class Subclass(convit.GPSA):
    """Agrees with its base until somebody sets a mask."""

    mask = None

    def get_attention(self, x):
        attention = super().get_attention(x)
        return attention if self.mask is None else attention * self.mask


class WideGrid(convit.GPSA):
    def get_rel_indices(self, num_patches):
        return super().get_rel_indices(num_patches)


class OwnConstructor(convit.GPSA):
    """Other arguments and a method more: the same layer."""

    def __init__(self, dim=32):
        super().__init__(dim, 4)

    def freeze(self):
        self.requires_grad_(False)


def changed_layer(change):
    layer = timm_layer()
    change(layer)
    return layer


def by_hand(layer):
    layer.rel_indices = layer.get_rel_indices(16).flip(1)


def with_lock(layer):
    layer.lock = threading.Lock()


def own_method_as_hook(layer):
    layer.register_forward_hook(layer.get_attention_map)


FORKS = {
    "convolution": (forks.WithConvolution, "it has the child conv"),
    "smoothed": (forks.Smoothed, "gives other outputs or gradients in training mode"),
    "map while training": (forks.MapWhileTraining, "gives other outputs or gradients in training mode"),
    "dictionary": (forks.Dictionary, "gives other outputs or gradients"),
    "scaled": (forks.ScaledOutput, "gives other outputs or gradients"),
    "layer scale": (forks.LayerScale, "it has the parameter gamma"),
    "residual": (forks.Residual, "gives other outputs or gradients"),
    "noise": (forks.NoisyMap, "gives other outputs or gradients in training mode"),
    "mask": (forks.MaskedMap, "it has the buffer mask"),
    "DropKey": (forks.DropsLogits, "gives other outputs in training mode with dropout"),
    "qkv by heads": (foreign.InterleavedGPSA, "gives other outputs or gradients"),
    "a distance that is not squared": (foreign.PlainDistanceGPSA, r"features are not \(dx, dy, dx\^2 \+ dy\^2\)"),
    "coordinates of each call": (foreign.IrregularGPSA, "its forward takes coords, which is no key mask"),
    "another distance": (forks.OwnDistance, "its get_attention_map gives something else"),
    "argument": (forks.FurtherArgument, "its forward takes mask, which is no key mask on the mixed map"),
    "any arguments": (forks.AnyArguments, r"its forward takes \*args"),
    "loading": (forks.OwnLoading, "has its own _load_from_state_dict, on which PyTorch relies"),
    "property": (forks.ScheduledScale, "its scale is computed by a property"),
    "not ready": (
        forks.NeedsSetting,
        "on random tokens it fails to give outputs.*no attribute 'not_set_yet'",
    ),
    "detached position": (forks.DetachedPosition, "for the same tokens it gives other outputs or gradients"),
    "without gradient": (forks.WithoutGradient, "on random tokens it fails to give outputs or gradients"),
    "values of no layer": (
        lambda *_: forks.FunctionForValues(32, 4, use_local_init=False),
        "it has no qk and v",
    ),
    "subclass": (Subclass, "it overrides get_attention of timm.models.convit.GPSA.*subclass convit_kernels.GPSA"),
    "subclass with a grid": (WideGrid, "it overrides get_rel_indices of timm.models.convit.GPSA"),
    "patched forward": (
        lambda *_: changed_layer(lambda layer: patch(layer, lambda x: x)),
        "its forward has been set on the layer itself",
    ),
    "patched map": (
        lambda *_: changed_layer(lambda layer: setattr(layer, "get_attention", lambda x: 0)),
        "its get_attention has been set on the layer itself",
    ),
    "parametrized gate": (
        lambda *_: changed_layer(
            lambda layer: nn.utils.parametrize.register_parametrization(layer, "gating_param", nn.Tanh())
        ),
        "its gating_param is parametrized: replace the layer first",
    ),
    "pruned gate": (
        lambda *_: changed_layer(lambda layer: prune.l1_unstructured(layer, "gating_param", 0.5)),
        "its gating_param is pruned: replace the layer first",
    ),
    "positions set by hand": (
        lambda *_: changed_layer(by_hand),
        r"its rel_indices of 16 tokens are not those of a grid: .*grid_size=\(height, width\)",
    ),
    "hook of its own": (
        lambda *_: changed_layer(own_method_as_hook),
        "one of its forward_hooks is a method of the layer itself: remove it first",
    ),
    "what cannot be copied": (lambda *_: changed_layer(with_lock), "it cannot be copied for a trial .*lock"),
    "gate of another kind": (
        lambda *_: changed_layer(
            lambda layer: setattr(layer, "gating_param", nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4))))
        ),
        "its gating_param is a TwoTensor",
    ),
    "compiled alone": (lambda *_: torch.compile(timm_layer()), "it is compiled by itself: replace the layer first"),
}


class TestForks:
    @pytest.mark.parametrize("fork", FORKS)
    def test_what_a_fork_does_otherwise_is_said_before_anything_is_swapped(self, fork):
        make, text = FORKS[fork]
        good, other = timm_layer(), make(32, 4)
        model = nn.ModuleList([good, other])
        with pytest.raises(TypeError, match=f"nothing was: 1 .*{text}.*one by one"):
            ck.replace_gpsa(model)
        assert model[0] is good
        assert model[1] is other
        with pytest.raises(TypeError, match=f"cannot be replaced exactly: .*{text}"):
            ck.GPSA.from_module(other)

    @pytest.mark.parametrize("make", [OwnConstructor, forks.KeepsItsMaps, forks.PersistentPosition, forks.Checkpointed])
    def test_what_makes_no_difference_is_taken_over(self, make):
        layer, x = perturbed(make(32) if make is OwnConstructor else make(32, 4)), torch.randn(2, 16, 32)
        replaced = ck.GPSA.from_module(layer)
        torch.testing.assert_close(replaced(x), layer(x), rtol=1e-4, atol=1e-5)
        assert list(replaced.state_dict()) == list(layer.state_dict())
        kept = [name for name, _ in layer.named_buffers() if name in layer.state_dict()]
        assert [name for name, _ in replaced.named_buffers()] == kept

    @pytest.mark.parametrize("backend", [None, "composite", "reference"])
    @pytest.mark.parametrize("each_head", [True, False])
    def test_a_learnt_scale_goes_on_learning(self, each_head, backend):
        layer = perturbed(forks.LearntScale(32, 4, each_head))
        replaced = ck.GPSA.from_module(layer, backend=backend)
        assert list(replaced.state_dict()) == list(layer.state_dict())
        assert replaced.scale is layer.scale
        x = torch.randn(2, 16, 32)
        expected, found = (gradients(each, x) for each in (layer, replaced))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        model = nn.Sequential(replaced)
        (map_,) = locality.attention_maps(model, x, (1, 2)).values()
        torch.testing.assert_close(map_.flatten(2), layer.eval().get_attention(x)[:, :, 6], rtol=1e-4, atol=1e-5)
        distance = torch.einsum("bhnm,nm->h", layer.get_attention(x), layer.rel_indices[0, :, :, 2].sqrt()) / 32
        torch.testing.assert_close(
            locality.nonlocality(model, x)[0].nonlocality, distance.double(), rtol=1e-4, atol=1e-5
        )

    def test_a_scale_of_another_kind_is_refused(self):
        layer = forks.LearntScale(32, 4)
        layer.scale = nn.Parameter(torch.ones(5))
        with pytest.raises(TypeError, match="on random tokens it fails to give outputs"):
            ck.GPSA.from_module(layer)

    def test_nobody_notices_the_trial(self):
        layer, calls = forks.KeepsItsMaps(32, 4, attn_drop=0.2), []
        layer.attn_drop.register_forward_hook(lambda *_: calls.append("child"))
        layer.register_forward_hook(lambda *_: calls.append("layer"))
        handle = module.register_module_forward_hook(lambda *_: calls.append("any"))
        before = copy.deepcopy(vars(layer)), torch.get_rng_state(), layer.training, layer.attn_drop.p
        try:
            ck.GPSA.from_module(layer)
        finally:
            handle.remove()
        assert calls == []
        assert layer.maps == []
        assert vars(layer).keys() == before[0].keys()
        torch.testing.assert_close(
            dict(layer.named_parameters()),
            dict(before[0]["_parameters"]) | {name: value for name, value in layer.named_parameters() if "." in name},
            rtol=0,
            atol=0,
        )
        assert torch.equal(torch.get_rng_state(), before[1])
        assert (layer.training, layer.attn_drop.p) == before[2:]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_modules_of_every_dtype(self, dtype):
        model = nn.Sequential(perturbed(timm_layer())).to(dtype)
        model(torch.randn(2, 16, 32).to(dtype))  # its positions are kept in that dtype from here on
        assert ck.replace_gpsa(model) == 1

    def test_under_autocast_another_default_dtype_and_another_default_device(self):
        for kind, make in LAYERS.items():
            layer = make(32, 4)
            with torch.autocast("cpu", torch.bfloat16):
                ck.GPSA.from_module(layer)
            with torch.device("meta"):
                ck.GPSA.from_module(layer)
            with torch.inference_mode():
                ck.GPSA.from_module(layer)
            torch.set_default_dtype(torch.float64)
            try:
                ck.GPSA.from_module(layer)
                assert torch.get_default_dtype() == torch.float64, kind
            finally:
                torch.set_default_dtype(torch.float32)

    def test_nine_tokens_seen_before(self):
        layer, x = perturbed(timm_layer()), torch.randn(2, 9, 32)
        expected = layer(x)
        torch.testing.assert_close(ck.GPSA.from_module(layer)(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("scale", [1e-3, 1.0, -0.3, 50.0])
    def test_any_scale(self, scale):
        layer, x = foreign.OfficialGPSA(32, 4, qk_scale=scale), torch.randn(2, 16, 32)
        torch.testing.assert_close(ck.GPSA.from_module(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def called_on_meta():
    """timm's layer keeps the features of its last call."""
    layer = timm_layer()
    layer(torch.randn(1, 16, 32))
    return layer.to("meta")


class TestRefusals:
    def test_a_model_without_gpsa_warns_and_returns_zero(self):
        with pytest.warns(UserWarning, match="Linear contains no reference GPSA"):
            assert ck.replace_gpsa(nn.Linear(2, 2)) == 0

    def test_a_bare_layer_has_no_place_to_swap_in(self):
        with pytest.raises(TypeError, match=r"GPSA\.from_module"):
            ck.replace_gpsa(timm_layer())

    @pytest.mark.parametrize(
        ("layer", "text"),
        [
            (foreign.VformerGPSA, "GatedPositionalSelfAttention.*has no proj, pos_proj"),
            (called_on_meta, "on the meta device, where they cannot be read"),
        ],
    )
    def test_other_mathematics_is_refused_before_anything_is_swapped(self, layer, text):
        good, other = timm_layer(), layer()
        model = nn.ModuleList([good, other])
        with pytest.raises(TypeError, match=f"1 .*{text}"):
            ck.replace_gpsa(model)
        assert model[0] is good
        assert model[1] is other
        with pytest.raises(TypeError, match=text):
            ck.GPSA.from_module(other)

    def test_what_is_no_gpsa_cannot_be_converted(self):
        with pytest.raises(TypeError, match="Linear is not a reference GPSA"):
            ck.GPSA.from_module(nn.Linear(3, 3))

    def test_an_unknown_backend_is_refused_before_anything_is_swapped(self):
        model = nn.ModuleList([timm_layer()])
        with pytest.raises(ValueError, match="unknown backend 'fast'"):
            ck.replace_gpsa(model, backend="fast")
        assert isinstance(model[0], convit.GPSA)
