"""replace_gpsa on layers that are more than their class: hooks, wrappers, computed weights, PyTorch's protocols."""

import copy
import gc
import io
import pickle

import foreign
import pytest
import torch
from foreign import LAYERS, output, patch, perturbed, timm_layer
from torch import nn
from torch.nn.modules import module
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import convit_kernels as ck


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

    @pytest.mark.situation(
        "timm",
        "`quantize_dynamic` of all linear layers, `pos_proj` too, before or after replacing",
        timm="runs if it was called before, else fails: it asks for qk.weight.device",
        ours="runs, called before or not, replaced first or last",
    )
    @pytest.mark.parametrize("first", ["quantized", "replaced"])
    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
    def test_quantized_before_and_after(self, first, dtype):
        theirs, x = nn.Sequential(perturbed(timm_layer())).eval(), torch.randn(2, 16, 32)
        with pytest.raises(AttributeError, match="no attribute 'device'"):
            torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear}, dtype=dtype)(x)
        ours = copy.deepcopy(theirs)
        theirs(x)
        theirs, ours = (
            torch.ao.quantization.quantize_dynamic(each, {nn.Linear}, dtype=dtype)
            for each in (theirs, ours if first == "quantized" else nn.Sequential(ck.GPSA.from_module(ours[0])))
        )
        if first == "quantized":
            assert ck.replace_gpsa(ours) == 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[0].get_attention(x), theirs[0].get_attention(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["qk", "v", "proj", "pos_proj", "attn_drop", "proj_drop"])
    def test_a_child_that_torchscript_has_compiled(self, name):
        layer, x = perturbed(timm_layer()), torch.randn(2, 16, 32)
        layer(x)
        setattr(layer, name, torch.jit.script(getattr(layer, name)))
        torch.testing.assert_close(ck.GPSA.from_module(layer)(x), layer(x), rtol=1e-4, atol=1e-5)

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
