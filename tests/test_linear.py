"""Linear layers by oneDNN: results and gradients of F.linear, which is called wherever more is asked of the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from equivalence import assert_as_exact
from torch import nn
from torch.profiler import ProfilerActivity, profile

import convit_kernels as ck
from convit_kernels import linear
from convit_kernels.equivalence import expected

pytestmark = pytest.mark.skipif(not linear.works(), reason="this build of PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    monkeypatch.setenv(linear.VARIABLE, "1")


def runs_onednn(function) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return "mkldnn::_linear_pointwise" in {event.key for event in recorded.key_averages()}


LAYOUTS = {
    "dense": lambda *shape: torch.randn(*shape),
    "every second row": lambda *shape: torch.randn(shape[0], 2 * shape[1], shape[2])[:, ::2],
    "transposed": lambda *shape: torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
    "channels apart": lambda *shape: torch.randn(*shape, 2)[..., 1],
    "expanded": lambda *shape: torch.randn(1, 1, shape[2]).expand(shape),
}


@pytest.mark.equivalence
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 49)])
def test_output_and_gradients_are_those_of_a_linear_layer(layout, bias, shape):
    layer, x, grad = nn.Linear(24, 40, bias=bias), LAYOUTS[layout](*shape, 24), LAYOUTS[layout](*shape, 40)

    def results(function, dtype=torch.float32):
        leaf, linear_layer = x.to(dtype).detach().requires_grad_(), copy.deepcopy(layer).to(dtype)
        out = function(linear_layer, leaf)
        grads = torch.autograd.grad(out, [leaf, *linear_layer.parameters()], grad.to(dtype))
        return dict(zip(("out", "x", "weight", "bias"), (out, *grads), strict=False))

    assert runs_onednn(lambda: linear.project(layer, x))
    rule = expected(lambda dtype: results(nn.Linear.__call__, dtype), torch.float32)
    assert_as_exact(results(linear.project), rule)


def test_no_tokens_at_all():
    layer = nn.Linear(4, 3)
    out = linear.project(layer, torch.randn(2, 0, 4))
    assert out.shape == (2, 0, 3)
    assert torch.equal(torch.autograd.grad(out.sum(), layer.weight)[0], torch.zeros(3, 4))


def test_second_derivatives():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    results = []
    for function in (linear.onednn_linear, F.linear):
        (d_x,) = torch.autograd.grad(function(x, weight, None).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(d_x.square().sum(), (x, weight)))
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "weight", "everything"])
def test_what_needs_no_gradient_gets_none(frozen):
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4, requires_grad=frozen == "weight")
    layer.weight.requires_grad_(frozen == "x")
    layer.bias.requires_grad_(frozen == "x")
    out = linear.project(layer, x)
    assert out.requires_grad == (frozen != "everything")
    if out.requires_grad:
        out.sum().backward()
    assert [t.grad is not None for t in (x, layer.weight)] == [frozen == "weight", frozen == "x"]


def test_a_changed_weight_is_seen_at_once():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with torch.no_grad():
        before = linear.project(layer, x)
        layer.weight.data.mul_(2)
        torch.testing.assert_close(linear.project(layer, x), 2 * (before - layer.bias) + layer.bias)


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _patched(layer):
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


def _hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def _parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


@pytest.mark.parametrize("change", [_hooked, _patched, _parametrized, lambda layer: _Doubled(4, 3), nn.Linear.double])
def test_a_layer_that_is_more_than_its_parameters_is_called(change):
    layer = change(nn.Linear(4, 3))
    x = torch.randn(2, 4, dtype=layer.weight.dtype)
    assert not runs_onednn(lambda: linear.project(layer, x))
    assert torch.equal(linear.project(layer, x), layer(x))


def test_autocast_and_transforms_take_the_layer():
    layer, x = nn.Linear(4, 3), torch.randn(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.project(layer, x).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: linear.project(layer, x), backend="eager", fullgraph=True)
    assert not runs_onednn(lambda: compiled(x))
    parameters = {name: 2 * value for name, value in layer.named_parameters()}
    wrapped = nn.Module()
    wrapped.layer, wrapped.forward = layer, lambda x: linear.project(layer, x)
    found = torch.func.functional_call(wrapped, {f"layer.{name}": value for name, value in parameters.items()}, (x,))
    torch.testing.assert_close(found, 2 * layer(x))


def test_torch_jit_traces_the_layer():
    layer, x = ck.GPSA(24, 3), torch.randn(2, 9, 24)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(2 * x), layer(2 * x))


class TestTransforms:
    layer = nn.Linear(4, 3)

    def check(self, transform):
        found = transform(lambda x: linear.project(self.layer, x).tanh())
        expected = transform(lambda x: self.layer(x).tanh())
        torch.testing.assert_close(found, expected)

    def test_vmap(self):
        x = torch.randn(5, 2, 4)
        self.check(lambda f: torch.func.vmap(f)(x))

    def test_gradient(self):
        x = torch.randn(2, 4)
        self.check(lambda f: torch.func.grad(lambda x: f(x).sum())(x))
        self.check(lambda f: torch.func.jacrev(f)(x))

    def test_forward_derivative(self):
        x, d_x = torch.randn(2, 4), torch.randn(2, 4)
        self.check(lambda f: torch.func.jvp(f, (x,), (d_x,)))

    def test_forward_derivative_of_the_parameters(self):
        arguments = tuple(torch.randn(*shape) for shape in ((2, 4), (3, 4), (3,)))
        tangents = tuple(torch.randn_like(t) for t in arguments)
        found, expected = (
            torch.func.jvp(function, arguments, tangents) for function in (linear.onednn_linear, F.linear)
        )
        torch.testing.assert_close(found, expected)


class TestChoice:
    @pytest.mark.parametrize("value", ["", "0", "1"])
    def test_the_environment_decides_else_the_processor(self, value, monkeypatch):
        monkeypatch.setenv(linear.VARIABLE, value)
        for faster in (False, True):
            monkeypatch.setattr(linear, "_known_to_be_faster", lambda faster=faster: faster)
            assert linear.wanted() == (value == "1" or (value == "" and faster))

    def test_it_can_be_switched_off_in_pytorch(self):
        with torch.backends.mkldnn.flags(enabled=False):
            assert not linear.wanted()

    def test_another_value_is_refused(self, monkeypatch):
        monkeypatch.setenv(linear.VARIABLE, "yes")
        with pytest.raises(ValueError, match="CONVIT_KERNELS_ONEDNN=yes: allowed are 0, 1"):
            linear.wanted()


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_whole_layer(qkv_bias, monkeypatch):
    layer = ck.GPSA(24, 3, qkv_bias=qkv_bias, grid_size=(3, 4))
    x = torch.randn(2, 12, 24)
    results = []
    for value in ("1", "0"):
        monkeypatch.setenv(linear.VARIABLE, value)
        assert runs_onednn(lambda: layer(x)) == (value == "1")
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])])
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)
