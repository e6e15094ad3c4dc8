"""replace_gpsa: the same model, faster; or a clear refusal and the model untouched."""

import copy
import gc
import io
import pickle
import threading

import foreign
import pytest
import timm
import torch
from equivalence import assert_as_exact
from timm.models import convit
from torch import nn
from torch.nn.modules import module
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import convit_kernels as ck
from convit_kernels import locality
from convit_kernels.equivalence import expected


def perturbed(layer: nn.Module) -> nn.Module:
    """Gates and positions away from their equal initial values, so that every branch matters."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "pos_proj" in name or "gating" in name or "alpha" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def timm_layer(dim=32, num_heads=4, **options):
    return convit.GPSA(dim, num_heads, **options)


LAYERS = {
    "timm": timm_layer,
    "official": foreign.OfficialGPSA,
    "dytox": foreign.DyToxGPSA,
    "imaging": lambda dim, num_heads, **options: foreign.ImagingGPSA(dim, num_heads, grid_size=(4, 4), **options),
    "vissl": foreign.VisslGPSA,
}
EACH_LAYER = pytest.mark.parametrize("kind", LAYERS)


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


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


class Recorder:
    """What hooks see: names, and the sums of the tensors that they are given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def note(self, name: str, value: object) -> None:
        value = value[0] if isinstance(value, tuple) else value
        self.seen.append((name, value.detach().abs().sum().item()))  # type: ignore[attr-defined]


class DropRows(nn.Module):
    """A dropout of its own kind: whole keys go, always the same."""

    def forward(self, attention):
        return attention * (torch.arange(attention.shape[-1]) % 3 != 0)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x) / 2


class Named(nn.Dropout):
    """A subclass may do anything."""

    def forward(self, x):
        return 0.5 * x


def knock_out(module, inputs, attention):
    keep = torch.ones(attention.shape[1], dtype=attention.dtype)
    keep[1] = 0
    return attention * keep[:, None, None]


def patch(module, function):
    module.forward = function


def exchange(layer, name, make):
    setattr(layer, name, make(getattr(layer, name)))


CHANGES = {
    "attn_drop: rollout": lambda layer, see: layer.attn_drop.register_forward_hook(
        lambda module, inputs, output: see("map", output)
    ),
    "attn_drop: knock-out": lambda layer, see: layer.attn_drop.register_forward_hook(knock_out),
    "attn_drop: pre-hook with keywords": lambda layer, see: layer.attn_drop.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 0.7,), kwargs), with_kwargs=True
    ),
    "attn_drop: full backward hook": lambda layer, see: layer.attn_drop.register_full_backward_hook(
        lambda module, d_in, d_out: see("d map", d_out)
    ),
    "attn_drop: full backward pre-hook": lambda layer, see: layer.attn_drop.register_full_backward_pre_hook(
        lambda module, d_out: (d_out[0] * 0.5,)
    ),
    "attn_drop: identity": lambda layer, see: exchange(layer, "attn_drop", lambda old: nn.Identity()),
    "attn_drop: hooked identity": lambda layer, see: (
        exchange(layer, "attn_drop", lambda old: nn.Identity()),
        layer.attn_drop.register_forward_hook(knock_out),
    ),
    "attn_drop: another class": lambda layer, see: exchange(layer, "attn_drop", lambda old: DropRows()),
    "attn_drop: a subclass": lambda layer, see: exchange(layer, "attn_drop", lambda old: Named()),
    "attn_drop: patched": lambda layer, see: patch(layer.attn_drop, lambda attention: 0.9 * attention),
    "pos_proj: LoRA": lambda layer, see: exchange(layer, "pos_proj", Lora),
    "pos_proj: pruned": lambda layer, see: prune.l1_unstructured(layer.pos_proj, "weight", 0.5),
    "pos_proj: randomly pruned bias": lambda layer, see: prune.random_unstructured(layer.pos_proj, "bias", 0.5),
    "pos_proj: weight norm by hook": lambda layer, see: nn.utils.weight_norm(layer.pos_proj),
    "pos_proj: spectral norm by hook": lambda layer, see: nn.utils.spectral_norm(layer.pos_proj),
    "pos_proj: weight norm": lambda layer, see: nn.utils.parametrizations.weight_norm(layer.pos_proj),
    "pos_proj: spectral norm": lambda layer, see: nn.utils.parametrizations.spectral_norm(layer.pos_proj),
    "pos_proj: hooked and parametrized": lambda layer, see: (
        nn.utils.parametrize.register_parametrization(layer.pos_proj, "weight", nn.Tanh()),
        layer.pos_proj.register_forward_hook(lambda module, inputs, output: see("position", output)),
    ),
    "pos_proj: hook": lambda layer, see: layer.pos_proj.register_forward_hook(
        lambda module, inputs, output: (see("features", inputs), output * 0.5)[1]
    ),
    "pos_proj: full backward hook": lambda layer, see: layer.pos_proj.register_full_backward_hook(
        lambda module, d_in, d_out: see("d position", d_out)
    ),
    "pos_proj: a subclass": lambda layer, see: setattr(layer.pos_proj, "__class__", Halved),
    "pos_proj: patched": lambda layer, see: patch(layer.pos_proj, Halved.forward.__get__(layer.pos_proj, Halved)),
    "pos_proj: a network of the coordinates": lambda layer, see: exchange(
        layer, "pos_proj", lambda old: nn.Sequential(nn.Linear(3, 5).double(), nn.GELU(), nn.Linear(5, 4).double())
    ),
    "pos_proj: without bias": lambda layer, see: exchange(
        layer, "pos_proj", lambda old: nn.Linear(3, 4, bias=False).double()
    ),
    "proj_drop: hook": lambda layer, see: layer.proj_drop.register_forward_hook(
        lambda module, inputs, output: (see("out", output), output * 2)[1]
    ),
    "qk: LoRA": lambda layer, see: exchange(layer, "qk", Lora),
    "qk: spectral norm by hook": lambda layer, see: nn.utils.spectral_norm(layer.qk),
    "v: pruned": lambda layer, see: prune.l1_unstructured(layer.v, "weight", 0.5),
    "proj: full backward hook": lambda layer, see: layer.proj.register_full_backward_hook(
        lambda module, d_in, d_out: see("d proj", d_out)
    ),
    "proj: weight norm": lambda layer, see: nn.utils.parametrizations.weight_norm(layer.proj),
}


class TestChildrenThatAreMore:
    """A child with hooks, a wrapper or a computed weight does in our layer what it does in timm's."""

    def train(self, model: nn.Module, recorder: Recorder) -> dict[str, torch.Tensor]:
        """Two steps: outputs, gradients and parameters of each."""
        torch.manual_seed(3)
        x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = {}
        for step in range(2):
            optimizer.zero_grad()
            out = model(x)
            out.square().sum().backward()
            found |= {f"{step} out": out.detach(), f"{step} x": x.grad.clone()}
            found |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters()}
            optimizer.step()
        found["map"] = model[0].get_attention(x).detach()
        found |= {name: p.detach().clone() for name, p in model.named_parameters()}
        return found | {"seen": torch.tensor([value for _, value in sorted(recorder.seen)], dtype=torch.float64)}

    @pytest.mark.parametrize("first", ["changed", "replaced"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_outputs_gradients_and_what_hooks_see(self, change, first):
        original = nn.Sequential(perturbed(timm_layer()), perturbed(timm_layer())).double()
        results = []
        for ours in (False, True):
            model, recorder = copy.deepcopy(original), Recorder()
            if ours and first == "replaced":
                ck.replace_gpsa(model)
            torch.manual_seed(1)
            CHANGES[change](model[0], recorder.note)
            if ours and first == "changed":
                ck.replace_gpsa(model)
            assert isinstance(model[0], ck.GPSA) == ours
            results.append(self.train(model, recorder))
        theirs, mine = results
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")

    @pytest.mark.parametrize("register", [module.register_module_forward_hook, module.register_module_forward_pre_hook])
    def test_hooks_on_every_module(self, register):
        original, results = nn.Sequential(perturbed(timm_layer())).double(), []
        for ours in (False, True):
            model, recorder = copy.deepcopy(original), Recorder()
            if ours:
                ck.replace_gpsa(model)
            handle = register(lambda module, value, *_, note=recorder.note: note(type(module).__name__, value))
            try:
                results.append((self.train(model, recorder), sorted(recorder.seen)))
            finally:
                handle.remove()
        (theirs, seen_by_theirs), (mine, seen_by_mine) = results
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
        assert [name for name, _ in seen_by_mine] == [name for name, _ in seen_by_theirs]

    def test_dropout_draws_as_the_reference_does(self):
        layer = perturbed(timm_layer(attn_drop=0.3, proj_drop=0.2)).double()
        layer.attn_drop.register_forward_hook(knock_out)
        x, results = torch.randn(2, 16, 32, dtype=torch.float64), []
        for each in (layer, ck.GPSA.from_module(layer)):
            torch.manual_seed(11)
            results.append(each(x))
        torch.testing.assert_close(results[1], results[0])

    def test_quantized_children(self):
        model = nn.Sequential(perturbed(timm_layer()).eval())
        x = torch.randn(2, 16, 32)
        model(x)  # timm's layer makes its coordinates where qk.weight is, which will be no tensor
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        expected = quantized(x)
        ck.replace_gpsa(quantized)
        torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-5)

    def test_a_weight_that_is_a_tensor_of_another_kind(self):
        layer = perturbed(timm_layer())
        layer.pos_proj.weight = nn.Parameter(TwoTensor(layer.pos_proj.weight.detach(), layer.pos_proj.weight.detach()))
        replaced, x = ck.GPSA.from_module(layer), torch.randn(2, 16, 32)
        with torch.no_grad():
            torch.testing.assert_close(replaced(x).a, layer(x).a, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("backend", [backend.name for backend in ck.backends() if backend.available])
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ("attn_drop: knock-out", "attn_drop has hooks"),
            ("attn_drop: another class", "attn_drop is a DropRows"),
            ("pos_proj: patched", "pos_proj has a forward of its own"),
            ("pos_proj: pruned", "pos_proj has hooks"),
        ],
    )
    def test_a_fast_backend_by_name_says_that_it_cannot(self, backend, change, text):
        layer = perturbed(timm_layer()).double()
        CHANGES[change](layer, None)
        replaced, x = ck.GPSA.from_module(layer, backend=backend), torch.randn(2, 16, 32, dtype=torch.float64)
        if backend == "reference":
            torch.testing.assert_close(replaced(x), layer(x))
        else:
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: {text}.*backend to None"):
                replaced(x)

    @pytest.mark.parametrize("kind", ["vissl", "imaging", "dytox"])
    def test_layers_of_other_projects(self, kind):
        layer = perturbed(LAYERS[kind](32, 4))
        layer.pos_proj.register_forward_hook(lambda module, inputs, output: 0.5 * output)
        x = torch.randn(2, 16, 32)
        torch.testing.assert_close(output(ck.GPSA.from_module(layer), x), output(layer, x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("change", ["attn_drop: another class", "pos_proj: pruned", "pos_proj: weight norm"])
    def test_compiled_without_a_graph_break(self, change):
        layer = ck.GPSA.from_module(perturbed(timm_layer()).double())
        CHANGES[change](layer, None)
        x = torch.randn(2, 16, 32, dtype=torch.float64)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))

    def test_initial_values_are_not_lost_in_a_computed_weight(self):
        for name, change in (("pos_proj", "pos_proj: pruned"), ("qk", "qk: LoRA"), ("proj", "proj: weight norm")):
            layer = ck.GPSA(32, 4, dtype=torch.float64)
            CHANGES[change](layer, None)
            before = copy.deepcopy(layer.state_dict())
            with pytest.raises(RuntimeError, match=f"{name}, a .*, has no parameter weight to set"):
                layer.reset_parameters()
            torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        layer = ck.GPSA(32, 4)
        prune.l1_unstructured(layer, "gating_param", 0.5)
        with pytest.raises(RuntimeError, match="the layer, a GPSA, has no parameter gating_param to set"):
            layer.reset_parameters()


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
    "convolution": (foreign.WithConvolution, "it has the child conv"),
    "smoothed": (foreign.Smoothed, "gives other outputs or gradients in training mode"),
    "map while training": (foreign.MapWhileTraining, "gives other outputs or gradients in training mode"),
    "pair": (foreign.Pair, "gives other outputs or gradients"),
    "dictionary": (foreign.Dictionary, "gives other outputs or gradients"),
    "scaled": (foreign.ScaledOutput, "gives other outputs or gradients"),
    "layer scale": (foreign.LayerScale, "it has the parameter gamma"),
    "residual": (foreign.Residual, "gives other outputs or gradients"),
    "noise": (foreign.NoisyMap, "gives other outputs or gradients in training mode"),
    "mask": (foreign.MaskedMap, "it has the buffer mask"),
    "DropKey": (foreign.DropsLogits, "gives other outputs in training mode with dropout"),
    "inverted gate": (foreign.InvertedGate, "gives other outputs or gradients"),
    "another distance": (foreign.OwnDistance, "its get_attention_map gives something else"),
    "argument": (foreign.FurtherArgument, "its forward takes mask=None"),
    "any arguments": (foreign.AnyArguments, r"its forward takes \*args"),
    "loading": (foreign.OwnLoading, "has its own _load_from_state_dict, on which PyTorch relies"),
    "property": (foreign.ScheduledScale, "its scale is computed by a property"),
    "not ready": (
        foreign.NeedsSetting,
        "on random tokens it fails to give outputs or gradients.*no attribute 'not_set_yet'",
    ),
    "detached position": (foreign.DetachedPosition, "for the same tokens it gives other outputs or gradients"),
    "without gradient": (foreign.WithoutGradient, "on random tokens it fails to give outputs or gradients"),
    "gate of another shape": (foreign.BroadcastGate, "its parameters do not fit the reference's: gate must have shape"),
    "values of no layer": (lambda *_: foreign.FunctionForValues(32, 4, use_local_init=False), "it has no v:"),
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
        r"its rel_indices of 16 tokens are not those of a square grid: .*grid_size=\(height, width\)",
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

    @pytest.mark.parametrize(
        "make", [OwnConstructor, foreign.KeepsItsMaps, foreign.PersistentPosition, foreign.Checkpointed]
    )
    def test_what_makes_no_difference_is_taken_over(self, make):
        layer, x = perturbed(make(32) if make is OwnConstructor else make(32, 4)), torch.randn(2, 16, 32)
        replaced = ck.GPSA.from_module(layer)
        torch.testing.assert_close(replaced(x), layer(x), rtol=1e-4, atol=1e-5)
        assert list(replaced.state_dict()) == list(layer.state_dict())
        assert [name for name, _ in replaced.named_buffers()] == [name for name, _ in layer.named_buffers()]

    @pytest.mark.parametrize("backend", [None, "composite", "reference"])
    @pytest.mark.parametrize("each_head", [True, False])
    def test_a_learnt_scale_goes_on_learning(self, each_head, backend):
        layer = perturbed(foreign.LearntScale(32, 4, each_head))
        replaced = ck.GPSA.from_module(layer, backend=backend)
        assert list(replaced.state_dict()) == list(layer.state_dict())
        assert replaced.scale is layer.scale
        expected, found = (
            gradients(each, torch.randn(2, 16, 32, generator=torch.Generator())) for each in (layer, replaced)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        model = nn.Sequential(replaced)
        (map_,) = locality.attention_maps(model, x := torch.randn(2, 16, 32), (1, 2)).values()
        torch.testing.assert_close(map_.flatten(2), layer.eval().get_attention(x)[:, :, 6], rtol=1e-4, atol=1e-5)
        distance = torch.einsum("bhnm,nm->h", layer.get_attention(x), layer.rel_indices[0, :, :, 2].sqrt()) / 32
        torch.testing.assert_close(
            locality.nonlocality(model, x)[0].nonlocality, distance.double(), rtol=1e-4, atol=1e-5
        )

    def test_a_scale_of_another_kind_is_refused(self):
        layer = foreign.LearntScale(32, 4)
        layer.scale = nn.Parameter(torch.ones(5))
        with pytest.raises(TypeError, match="on random tokens it fails to give outputs or gradients"):
            ck.GPSA.from_module(layer)

    def test_nobody_notices_the_trial(self):
        layer, calls = foreign.KeepsItsMaps(32, 4, attn_drop=0.2), []
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


HOOKS = {
    "forward": lambda layer, call: layer.register_forward_hook(lambda module, inputs, out: call(module, out * 2)),
    "forward with keywords": lambda layer, call: layer.register_forward_hook(
        lambda module, args, kwargs, out: call(module, out * 2), with_kwargs=True, prepend=True
    ),
    "forward pre": lambda layer, call: layer.register_forward_pre_hook(
        lambda module, args: call(module, (args[0] * 2,))
    ),
    "forward pre with keywords": lambda layer, call: layer.register_forward_pre_hook(
        lambda module, args, kwargs: call(module, ((args[0] * 2,), kwargs)), with_kwargs=True
    ),
    "backward": lambda layer, call: layer.register_full_backward_hook(
        lambda module, d_in, d_out: call(module, (d_in[0] * 2,))
    ),
    "backward pre": lambda layer, call: layer.register_full_backward_pre_hook(
        lambda module, d_out: call(module, (d_out[0] * 2,))
    ),
    "backward as it was": lambda layer, call: layer.register_backward_hook(
        lambda module, d_in, d_out: call(module, None)
    ),
    "state_dict": lambda layer, call: layer.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: call(module, state.update({prefix + "note": torch.ones(1)}))
    ),
    "state_dict pre": lambda layer, call: layer.register_state_dict_pre_hook(
        lambda module, prefix, keep_vars: call(module, None)
    ),
    "load_state_dict pre": lambda layer, call: layer.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: call(module, state.pop(prefix + "note", None) and None)
    ),
    "load_state_dict pre without module": lambda layer, call: layer._register_load_state_dict_pre_hook(
        lambda state, prefix, *_: call(None, state.pop(prefix + "note", None) and None)
    ),
    "load_state_dict post": lambda layer, call: layer.register_load_state_dict_post_hook(
        lambda module, keys: call(module, None)
    ),
}


class TestHooksOfTheLayer:
    def use(self, model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(4)
        x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
        out = model(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        state = model.state_dict()
        model.load_state_dict({**state, "0.note": torch.ones(1)}, strict=False)
        return [out, torch.tensor(len(state)), *gradients]

    @pytest.mark.parametrize("first", ["hooked", "replaced"])
    @pytest.mark.parametrize("kind", HOOKS)
    def test_every_kind_is_called_with_the_new_layer_until_its_handle_removes_it(self, kind, first):
        original, results, counts = nn.Sequential(perturbed(timm_layer())).double(), [], []
        for ours in (False, True):
            model, modules = copy.deepcopy(original), []

            def call(module, value, modules=modules):
                modules.append(module)
                return value

            if ours and first == "replaced":
                ck.replace_gpsa(model)
            handle = HOOKS[kind](model[0], call)
            if ours and first == "hooked":
                ck.replace_gpsa(model)
            gc.collect()
            results.append(self.use(model))
            counts.append(len(modules))
            assert {id(module) for module in modules} <= {id(model[0]), id(None)}
            handle.remove()
            results.append(self.use(model))
            assert len(modules) == counts[-1] > 0
        theirs, theirs_after, mine, mine_after = results
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(mine_after, theirs_after, rtol=1e-8, atol=1e-9)
        assert counts[0] == counts[1]

    def test_a_hook_that_is_called_whatever_happens(self):
        model, calls = nn.Sequential(timm_layer()), []
        model[0].register_forward_hook(lambda *_: calls.append("called"), always_call=True)
        ck.replace_gpsa(model)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 16, 31))
        assert calls == ["called"]

    def test_from_module_leaves_the_original_its_own(self):
        layer, modules = timm_layer(), []
        layer.register_load_state_dict_pre_hook(lambda module, *_: modules.append(module))
        replaced = ck.GPSA.from_module(layer)
        for each in (layer, replaced):
            each.load_state_dict(each.state_dict())
        assert modules == [layer, replaced]

    def test_dytox_s_tuple(self):
        layer, calls = perturbed(foreign.DyToxGPSA(32, 4)), []
        layer.register_full_backward_hook(lambda module, d_in, d_out: calls.append(len(d_out)))
        ck.GPSA.from_module(layer)(torch.randn(2, 16, 32, requires_grad=True))[0].sum().backward()
        assert calls == [3]


class TestOtherProtocols:
    """What else PyTorch does with a module, on one of ours that has taken timm's place."""

    def pair(self) -> tuple[nn.Module, nn.Module]:
        layer = perturbed(timm_layer()).double()
        model = nn.Sequential(copy.deepcopy(layer))
        ck.replace_gpsa(model)
        return layer, model[0]

    x = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def same(self, mine, theirs) -> None:
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("alone", ["frozen", "trained"])
    @pytest.mark.parametrize("part", [name for name, _ in timm_layer().named_parameters()])
    def test_one_part_frozen_or_trained_alone(self, part, alone):
        theirs, mine = self.pair()
        for layer in (theirs, mine):
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_((name == part) == (alone == "trained"))
            layer(self.x).square().sum().backward()
        for (name, ours), reference in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (ours.grad is None) == (reference.grad is None), name
            self.same(ours.grad, reference.grad)

    def test_copies_and_files(self):
        theirs, mine = self.pair()
        torch.save(mine, file := io.BytesIO())
        file.seek(0)
        for each in (
            copy.deepcopy(mine),
            pickle.loads(pickle.dumps(mine)),
            torch.load(file, weights_only=False),
            mine.share_memory(),
        ):
            self.same(each(self.x), theirs(self.x))

    def test_from_the_meta_device(self):
        theirs, mine = self.pair()
        for load in ({}, {"assign": True}):
            layer = ck.GPSA(32, 4, device="meta", dtype=torch.float64)
            if not load:
                layer.to_empty(device="cpu")
            layer.load_state_dict(theirs.state_dict(), **load)
            self.same(layer(self.x), theirs(self.x))
        emptied = mine.to("meta").to_empty(device="cpu")
        emptied.load_state_dict(theirs.state_dict())
        self.same(emptied(self.x), theirs(self.x))

    def test_other_parameters_for_one_call(self):
        theirs, mine = self.pair()
        parameters = {name: torch.randn_like(parameter) / 3 for name, parameter in mine.named_parameters()}
        found, expected = (torch.func.functional_call(layer, parameters, (self.x,)) for layer in (mine, theirs))
        self.same(found, expected)

    def test_an_ensemble(self):
        _, mine = self.pair()
        layers = [mine, copy.deepcopy(mine), copy.deepcopy(mine)]
        for layer in layers:
            perturbed(layer)
        state = torch.func.stack_module_state(layers)
        found = torch.func.vmap(lambda *each: torch.func.functional_call(mine, each, (self.x,)))(*state)
        self.same(found, torch.stack([layer(self.x) for layer in layers]))

    def test_a_replica_of_data_parallel(self):
        theirs, mine = self.pair()
        replica = mine._replicate_for_data_parallel()
        replicas = {name: child._replicate_for_data_parallel() for name, child in mine.named_children()}
        replica._modules = replicas
        for original, each in ((mine, replica), *((mine.get_submodule(name), each) for name, each in replicas.items())):
            for name, parameter in original._parameters.items():
                setattr(each, name, None if parameter is None else parameter * 1)
        self.same(replica(self.x), theirs(self.x))

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: nn.utils.parametrize.register_parametrization(layer, "gating_param", nn.Tanh()),
            lambda layer: prune.l1_unstructured(layer, "gating_param", 0.5),
            lambda layer: setattr(layer, "gating_param", nn.Parameter(torch.linspace(-2, 2, 4).double())),
            lambda layer: layer.register_parameter("gating_param", nn.Parameter(torch.linspace(-2, 2, 4).double())),
            lambda layer: setattr(layer, "pos_proj", copy.deepcopy(timm_layer().pos_proj).double()),
            lambda layer: setattr(layer, "scale", 0.7),
        ],
    )
    def test_changed_after_the_fact(self, change):
        results = []
        for layer in self.pair():
            torch.manual_seed(2)
            change(layer)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                layer(self.x).square().sum().backward()
                optimizer.step()
            results.append([layer(self.x), *(p.grad for p in layer.parameters())])
        self.same(results[1], results[0])

    def test_heads_that_do_not_fit_the_parameters(self):
        _, mine = self.pair()
        mine.num_heads = 8
        with pytest.raises(ValueError, match=r"\(8, 3\) for 8 heads"):
            mine(self.x)

    def test_tied_weights_stay_tied(self):
        model = nn.Sequential(perturbed(timm_layer()), perturbed(timm_layer())).double()
        model[1].pos_proj, model[1].gating_param = model[0].pos_proj, model[0].gating_param
        model[1].qk.weight = model[0].qk.weight
        expected, count = model(self.x), len(list(model.parameters()))
        ck.replace_gpsa(model)
        assert len(list(model.parameters())) == count
        self.same(model(self.x), expected)


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
            (lambda: foreign.PlainDistanceGPSA(32, 4), r"GPSA.*features are not \(dx, dy, dx\^2 \+ dy\^2\)"),
            (lambda: foreign.MirroredGPSA(32, 4), r"GPSA.*key minus query"),
            (lambda: foreign.OneDimensionalGPSA(32, 4), r"GPSA1D.*pos_proj.weight has shape \(4, 2\).*two-dimensional"),
            (lambda: foreign.ThreeDimensionalGPSA(32, 4, grid_size=(2, 2, 2)), "GPSA3D.*features cannot be read"),
            (foreign.VformerGPSA, "GatedPositionalSelfAttention.*has no v, proj, pos_proj"),
            (lambda: timm_layer(device="meta"), "meta device"),
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
