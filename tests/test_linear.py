"""Linear layers by oneDNN: results and gradients of F.linear, which is called wherever more is asked of the layer."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from equivalence import assert_as_exact
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
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


def times(**seconds):
    """A trial's (PyTorch, oneDNN) times: oneDNN twice as fast, but for these."""
    return {"forward": (1e-3, 5e-4), "x": (1e-3, 5e-4), "weight": (1e-3, 5e-4)} | seconds


@pytest.fixture
def undecided(monkeypatch):
    """Makes this process one that has decided nothing yet; a trial is what is passed."""

    def decide_by(trial):
        monkeypatch.delenv(linear.VARIABLE, raising=False)
        monkeypatch.setattr(linear, "_trial", trial)
        monkeypatch.setattr(linear, "_faster", linear._once_apart(linear._faster.__wrapped__))

    return decide_by


@contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


UNDER = {
    "autocast": lambda f: _within(torch.autocast("cpu", torch.bfloat16), f),
    "fake tensors": lambda f: _within(FakeTensorMode(), f),
    "another device": lambda f: _within(torch.device("meta"), f),
    "inference": lambda f: _within(torch.inference_mode(), f),
    "deterministic": lambda f: _within(_deterministic(), f),
    "vmap": lambda f: torch.func.vmap(lambda x: (f(), x)[1])(torch.ones(2)),
    "grad": lambda f: torch.func.grad(lambda x: (f(), x)[1])(torch.ones(())),
    "make_fx": lambda f: make_fx(lambda x: (f(), x)[1])(torch.ones(2)),
}


def _within(context, function):
    with context:
        function()


class TestChoice:
    @pytest.mark.parametrize("value", ["0", "1"])
    def test_the_environment_decides_without_a_trial(self, value, undecided, monkeypatch):
        undecided(lambda: pytest.fail("a trial"))
        monkeypatch.setenv(linear.VARIABLE, value)
        assert linear.choice() == (value == "1", f"CONVIT_KERNELS_ONEDNN={value}")

    @pytest.mark.parametrize(
        ("found", "faster"),
        [
            (times(), True),
            (times(forward=(1.1e-3, 1e-3)), False),
            (times(x=(1e-3, 1e-3)), False),
            (times(weight=(1e-3, 2e-3)), False),
            (times(forward=(20e-3, 5e-3)), False),  # threads waited for a processor
            (times(forward=(0.0, 0.0)), False),  # the clock is too coarse
        ],
    )
    def test_else_what_a_trial_finds_clearly_faster_in_each_product(self, found, faster, undecided):
        undecided(lambda: found)
        layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        assert runs_onednn(lambda: linear.project(layer, x)) == faster
        plain, onednn = (1e3 * one for one in found["forward"])
        assert f"{plain:.2f} and {onednn:.2f} ms forward" in linear.choice()[1]

    def test_one_trial_a_process_by_whichever_thread_comes_first(self, undecided):
        trials = []

        def trial():
            trials.append(times() if not trials else times(x=(1.0, 1.0)))
            time.sleep(0.01)
            return trials[-1]

        undecided(trial)
        with ThreadPoolExecutor(8) as pool:
            decisions = {each.result() for each in [pool.submit(linear.choice) for _ in range(8)]}
        assert len(trials) == len(decisions) == 1

    def test_a_layer_that_could_not_take_it_needs_no_trial(self, undecided):
        undecided(lambda: pytest.fail("a trial"))
        linear.project(nn.Linear(4, 3).double(), torch.randn(2, 4).double())
        linear.project(_hooked(nn.Linear(4, 3)), torch.randn(2, 4))
        torch.compile(lambda x: linear.project(nn.Linear(4, 3), x), backend="eager")(torch.randn(2, 4))

    @pytest.mark.parametrize("mode", UNDER)
    def test_a_trial_is_apart_from_what_the_caller_is_under(self, mode, undecided):
        undecided(linear._trial)
        state = torch.get_rng_state()
        UNDER[mode](linear.choice)
        assert torch.equal(torch.get_rng_state(), state)
        assert "a trial with" in linear.choice()[1]

    def test_a_trial_is_not_in_the_users_profile(self, undecided):
        undecided(linear._trial)
        assert not runs_onednn(linear.choice)

    def test_it_can_be_switched_off_in_pytorch(self):
        with torch.backends.mkldnn.flags(enabled=False):
            assert linear.choice() == (False, "torch.backends.mkldnn.enabled is False")

    def test_another_value_is_refused(self, monkeypatch):
        monkeypatch.setenv(linear.VARIABLE, "yes")
        with pytest.raises(ValueError, match="CONVIT_KERNELS_ONEDNN=yes: allowed are 0, 1"):
            linear.choice()


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
