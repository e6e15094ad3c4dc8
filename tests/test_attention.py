"""gpsa_attention: exact on every backend, for every shape, and clear about what it cannot take."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from equivalence import Inputs, assert_as_exact, eager_attention, make_inputs, problem, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import convit_kernels as ck
from convit_kernels.equivalence import expected_attention

AVAILABLE = [backend.name for backend in ck.backends() if backend.available]
EACH_BACKEND = pytest.mark.parametrize("backend", AVAILABLE)
FAST = [name for name in AVAILABLE if name != "reference"]
EACH_FAST_BACKEND = pytest.mark.parametrize("backend", FAST)
GRIDS = [(1, 1), (1, 7), (3, 5), (14, 14), (8, 18), (18, 8)]


def attend(inputs: Inputs, grid, backend=None, scale=None, **options) -> torch.Tensor:
    return ck.gpsa_attention(*inputs[:5], grid_size=grid, scale=scale, backend=backend, **options)


def check(backend, grid, dtype=torch.float32, *, batch=2, heads=3, head_dim=24, **options) -> None:
    """Output and every gradient by the rule of convit_kernels.equivalence."""
    options |= {"batch": batch, "heads": heads, "grid": grid, "head_dim": head_dim, "dtype": dtype}
    inputs, expected = problem(recomputed=backend == "composite", **options)
    assert_as_exact(with_gradients(lambda i: attend(i, grid, backend), inputs), expected)


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_output_and_gradients(backend, grid, dtype):
    check(backend, grid, dtype)


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("head_dim", [1, 8, 40, 48, 64, 80])
def test_head_dims(backend, head_dim):
    check(backend, (5, 6), head_dim=head_dim)


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("gate", [-40.0, 0.0, 40.0])
def test_saturated_gates(backend, gate):
    check(backend, (4, 6), gate=gate)


@pytest.mark.equivalence
@EACH_BACKEND
def test_large_logits(backend):
    # A fused backward recomputes probabilities from logits near 1e4 and their log-sum-exp, each rounded once.
    check(backend, (4, 6), logits=1e4)


@EACH_BACKEND
@pytest.mark.parametrize("grid", [(3, 5), (8, 18)])
def test_float64_to_its_last_digits(backend, grid):
    inputs = make_inputs(2, 3, grid, 16, torch.float64)
    exact = with_gradients(lambda i: eager_attention(i, grid, 0.25), inputs)
    ours = with_gradients(lambda i: attend(i, grid, backend, scale=0.25), inputs)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-12)


@EACH_BACKEND
def test_gradcheck(backend):
    q, k, v, pos_weight, gate, _ = make_inputs(2, 2, (2, 3), 4, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, pos_weight, gate)]
    assert torch.autograd.gradcheck(lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend), leaves)


@EACH_BACKEND
def test_4096_tokens(backend):
    inputs, expected = problem(batch=1, heads=1, grid=(64, 64), head_dim=8, forward_only=True, draws=1)
    assert_as_exact([attend(inputs, (64, 64), backend)], expected)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 20),
    batch=st.integers(1, 3),
)
def test_composite_equals_reference_on_any_shape(height, width, heads, head_dim, batch):
    inputs = make_inputs(batch, heads, (height, width), head_dim, torch.float64)
    torch.testing.assert_close(
        attend(inputs, (height, width), "composite"),
        attend(inputs, (height, width), "reference"),
        rtol=1e-11,
        atol=1e-12,
    )


@EACH_BACKEND
def test_two_grids_of_one_size_differ(backend):
    inputs = make_inputs(1, 2, (8, 18), 8)
    assert not torch.allclose(attend(inputs, (8, 18), backend), attend(inputs, (18, 8), backend), atol=1e-3)
    assert not torch.allclose(attend(inputs, (8, 18), backend), attend(inputs, None, backend), atol=1e-3)


@EACH_BACKEND
def test_defaults_are_a_square_grid_and_the_usual_scale(backend):
    inputs = make_inputs(1, 2, (4, 4), 16)
    expected = attend(inputs, (4, 4), backend, scale=0.25)
    assert torch.equal(attend(inputs, None, backend), expected)
    assert torch.equal(attend(inputs, 4, backend), expected)


@EACH_BACKEND
def test_the_fast_path_is_deterministic(backend):
    inputs = make_inputs(2, 3, (5, 6), 16)
    first = with_gradients(lambda i: attend(i, (5, 6), backend), inputs)
    for _ in range(3):
        again = with_gradients(lambda i: attend(i, (5, 6), backend), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_spread_as_in_the_reference_layer(backend, which, value):
    inputs = make_inputs(2, 2, (3, 4), 8)
    spoiled = getattr(inputs, which).clone()
    spoiled[1, 0, 5, 3] = value
    inputs = inputs._replace(**{which: spoiled})
    expected = eager_attention(inputs, (3, 4), 0.5)
    found = attend(inputs, (3, 4), backend, scale=0.5)
    assert not torch.isfinite(expected).all()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


SPOILED = {
    "one entry": (0, 0, -1, 1),
    "a token": (0, 0, -1),
    "a channel of all tokens": (0, 0, slice(None), 1),
    "a head": (0, 0),
    "all tokens but one": (0, 0, slice(1, None), 1),
}


def spoil(tensor, where, value):
    """A copy with `value` there; "two signs" has it in one token and its opposite in another."""
    tensor = tensor.clone()
    if tensor.dim() < 4:
        tensor[0, ...] = value
    elif where == "two signs":
        tensor[0, 0, 0, 0], tensor[0, 0, -1, 1] = -value, value
    else:
        tensor[SPOILED[where]] = value
    return tensor


class TestNonFinite:
    @EACH_FAST_BACKEND
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 4), (4, 5), (10, 10)])
    @pytest.mark.parametrize("which", ["q", "k", "v", "pos_weight", "gate"])
    def test_values_spread_as_in_the_reference(self, backend, dtype, grid, which):
        """On every processor: 1 to 100 keys are fewer and more than its vectors have lanes."""
        inputs = make_inputs(1, 2, grid, 4, dtype)
        cases = itertools.product((*SPOILED, "two signs"), (math.nan, math.inf, -math.inf))
        for (where, value), scale in zip(cases, itertools.cycle((0.5, -0.5, 0.0, -0.5)), strict=False):
            spoiled = inputs._replace(**{which: spoil(getattr(inputs, which), where, value)})
            found, expected = (attend(spoiled, grid, name, scale=scale) for name in (backend, "reference"))
            case = f"{value} in {where} with scale {scale}"
            assert torch.equal(found.isfinite(), expected.isfinite()), case
            if which != "v":  # where one of the two maps is zero in its own dtype, an infinity of v is NaN there
                assert torch.equal(found.isnan(), expected.isnan()), case
            tolerance = {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(found[expected.isfinite()], expected[expected.isfinite()], **tolerance, msg=case)

    def test_compiled_code_does_not_simplify_them_away(self):
        inputs = make_inputs(1, 2, (3, 4), 4)
        compiled = torch.compile(lambda i: attend(i, (3, 4), "composite"), fullgraph=True)
        for which, where, value in (
            ("q", "one entry", math.nan),
            ("k", "a head", -math.inf),
            ("k", "a token", math.inf),
        ):
            spoiled = inputs._replace(**{which: spoil(getattr(inputs, which), where, value)})
            expected = attend(spoiled, (3, 4), "reference")
            assert expected.isnan().any()
            assert torch.equal(compiled(spoiled).isnan(), expected.isnan())

    @EACH_FAST_BACKEND
    @pytest.mark.parametrize("grid", [(1, 1), (3, 4), (4, 5)])
    @pytest.mark.parametrize("which", ["q", "k", "v"])
    def test_no_gradient_is_finite_where_the_reference_s_is_not(self, backend, grid, which):
        inputs = make_inputs(1, 2, grid, 4)
        for where, value in itertools.product(SPOILED, (math.nan, math.inf, -math.inf)):
            spoiled = inputs._replace(**{which: spoil(getattr(inputs, which), where, value)})
            found, expected = (
                with_gradients(lambda i, b=b: attend(i, grid, b), spoiled) for b in (backend, "reference")
            )
            for mine, truth in zip(found, expected, strict=True):
                assert not (mine.isfinite() & ~truth.isfinite()).any(), f"{value} in {where}"

    @EACH_FAST_BACKEND
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("which", ["q", "k"])
    def test_the_largest_finite_numbers_are_finite(self, backend, dtype, which):
        """Opposite ones in one token, whose products with small numbers cancel."""
        inputs = make_inputs(1, 2, (3, 4), 4, dtype)
        largest = getattr(inputs, which).clone()
        largest[..., 0], largest[..., 1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
        other = {"q": "k", "k": "q"}[which]
        small = getattr(inputs, other) * torch.finfo(dtype).smallest_normal
        small[..., 1] = small[..., 0]
        inputs = inputs._replace(**{which: largest, other: small})
        assert attend(inputs, (3, 4), backend).isfinite().all()


@EACH_BACKEND
def test_an_empty_batch_gives_an_empty_output(backend):
    inputs = make_inputs(0, 2, (3, 4), 8)
    out, dq, dk, dv, d_weight, d_gate = with_gradients(lambda i: attend(i, (3, 4), backend), inputs)
    assert out.shape == dq.shape == dk.shape == dv.shape == (0, 2, 12, 8)
    assert torch.equal(d_weight, torch.zeros(2, 3))
    assert torch.equal(d_gate, torch.zeros(2))


@pytest.mark.equivalence
@EACH_BACKEND
def test_mixed_precision_of_parameters(backend):
    """Under autocast q, k and v are bfloat16 and the positional parameters stay float32."""
    inputs = make_inputs(2, 3, (5, 6), 16)
    low = Inputs(*(t.bfloat16() for t in inputs[:3]), inputs.pos_weight, inputs.gate, inputs.grad.bfloat16())
    ours = with_gradients(lambda i: attend(i, (5, 6), backend, scale=0.25), low)
    assert ours[0].dtype == torch.bfloat16
    assert ours[4].dtype == torch.float32
    assert_as_exact(ours, expected_attention(*low, (5, 6), scale=0.25))


@EACH_BACKEND
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_q_s_dtype_within_autocast_too(backend, autocast, dtype):
    inputs = make_inputs(2, 2, (3, 4), 8, dtype)
    with torch.autocast("cpu", dtype=autocast):
        found = with_gradients(lambda i: attend(i, (3, 4), backend), inputs)
    assert {result.dtype for result in found} == {dtype}
    torch.testing.assert_close(
        found[0].double(), eager_attention(inputs.to(torch.float64), (3, 4), 8**-0.5), rtol=0.05, atol=0.05
    )


class TestDropout:
    WITH = pytest.mark.parametrize("backend", ["reference", None])
    WITHOUT = pytest.mark.parametrize("backend", [name for name in ("cpu", "composite") if name in AVAILABLE])

    @WITH
    def test_the_mask_is_that_of_the_reference_layer(self, backend):
        """Dropout acts on the mixed map, with torch's own generator: the same seed drops the same entries."""
        inputs = make_inputs(2, 3, (4, 5), 8)
        torch.manual_seed(7)
        ours = attend(inputs, (4, 5), backend, dropout_p=0.3)
        torch.manual_seed(7)
        identity = torch.eye(20).expand(2, 3, 20, 20)
        mixed = eager_attention(inputs._replace(v=identity), (4, 5), 8**-0.5)
        expected = torch.nn.functional.dropout(mixed, 0.3) @ inputs.v
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)

    @WITH
    def test_gradients_under_the_mask(self, backend):
        inputs = make_inputs(1, 2, (3, 4), 4, torch.float64)

        def dropped(*args):
            torch.manual_seed(3)
            return ck.gpsa_attention(*args, grid_size=(3, 4), dropout_p=0.4, backend=backend)

        assert torch.autograd.gradcheck(dropped, [tensor.clone().requires_grad_() for tensor in inputs[:5]])

    @WITHOUT
    def test_a_backend_without_it_says_so_and_which_one_has_it(self, backend):
        inputs = make_inputs(1, 2, (3, 4), 4)
        with pytest.raises(RuntimeError, match=rf"'{backend}' cannot.*dropout.*backend=None would take 'reference'"):
            attend(inputs, (3, 4), backend, dropout_p=0.4)

    @WITHOUT
    def test_a_layer_that_asks_for_such_a_backend_runs_in_evaluation_and_refuses_to_train(self, backend):
        layer, x = ck.GPSA(16, 2, attn_drop=0.5, backend=backend), torch.randn(1, 9, 16)
        assert layer.eval()(x).shape == (1, 9, 16)
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot.*dropout"):
            layer.train()(x)


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapped(torch.Tensor):
    """One that has no memory of its own, but another tensor inside."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.wrapped = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.wrapped, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


def leaves_and_tangents(dtype=torch.float64, requires_grad=False):
    inputs = make_inputs(2, 2, (2, 3), 4, dtype)
    return [t.clone().requires_grad_(requires_grad) for t in inputs[:5]], [torch.randn_like(t) for t in inputs[:5]]


def dual_tensors(function, leaves, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, leaves, tangents))).tangent


def dual_position(function, leaves, tangents):
    """Of one small parameter alone."""
    with forward_ad.dual_level():
        pos_weight = forward_ad.make_dual(leaves[3], tangents[3])
        return forward_ad.unpack_dual(function(*leaves[:3], pos_weight, leaves[4])).tangent


def energy(function):
    return lambda *leaves: function(*leaves).square().sum()


def outcome(function):
    """The result, or the text of the refusal."""
    try:
        return function()
    except RuntimeError as error:
        return str(error)


def twins(leaves):
    return [torch.stack((leaf, leaf + 0.5)) for leaf in leaves]


ALL = (0, 1, 2, 3, 4)
DERIVATIVES = {
    "dual tensors": dual_tensors,
    "a dual position": dual_position,
    "jvp": lambda f, leaves, tangents: func.jvp(f, tuple(leaves), tuple(tangents)),
    "jvp within no_grad": lambda f, leaves, tangents: torch.no_grad()(func.jvp)(f, tuple(leaves), tuple(tangents)),
    "jvp of the gate alone": lambda f, leaves, tangents: func.jvp(
        lambda gate: f(*leaves[:4], gate), (leaves[4],), (tangents[4],)
    ),
    "jacfwd": lambda f, leaves, _: func.jacfwd(f, ALL)(*leaves),
    "jacrev": lambda f, leaves, _: func.jacrev(f, ALL)(*leaves),
    "vjp": lambda f, leaves, tangents: func.vjp(f, *leaves)[1](tangents[0]),
    "linearize": lambda f, leaves, tangents: func.linearize(f, *(t.detach() for t in leaves))[1](*tangents),
    "grad": lambda f, leaves, _: func.grad(energy(f), ALL)(*leaves),
    "grad of grad": lambda f, leaves, _: func.grad(energy(func.grad(energy(f))), ALL)(*leaves),
    "jvp of grad": lambda f, leaves, tangents: func.jvp(func.grad(energy(f), ALL), tuple(leaves), tuple(tangents)),
    "jvp of jvp": lambda f, leaves, tangents: func.jvp(
        lambda *primals: func.jvp(f, primals, tuple(tangents))[1], tuple(leaves), tuple(tangents)
    ),
    "grad of jvp": lambda f, leaves, tangents: func.grad(
        lambda *primals: func.jvp(f, primals, tuple(tangents))[1].square().sum(), ALL
    )(*leaves),
    "hessian": lambda f, leaves, _: func.hessian(energy(f), (0, 3, 4))(*leaves),
    "a gradient a sample": lambda f, leaves, _: func.vmap(func.grad(energy(f), ALL))(*twins(leaves)),
    "jvp of a sample": lambda f, leaves, tangents: func.vmap(lambda *each: func.jvp(f, each, each))(*twins(leaves)),
    "forward-mode jacobian": lambda f, leaves, _: torch.autograd.functional.jacobian(
        f, tuple(leaves), vectorize=True, strategy="forward-mode"
    ),
}


class TestDerivatives:
    """Forward-mode differentiation and torch.func: right, or refused by a kernel that has been asked for by name."""

    @pytest.mark.parametrize("way", DERIVATIVES)
    @pytest.mark.parametrize("trainable", [False, True])
    @pytest.mark.parametrize("backend", [None, *FAST])
    def test_all_there_are(self, way, trainable, backend):
        leaves, tangents = leaves_and_tangents(requires_grad=trainable)

        def results(name):
            function = lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=name)  # noqa: E731
            return DERIVATIVES[way](function, leaves, tangents)

        if backend in ("cpu", "triton"):
            with pytest.raises(RuntimeError, match=rf"'{backend}' cannot.*backend=None would take 'composite'"):
                results(backend)
        else:
            torch.testing.assert_close(results(backend), results("reference"), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("backend", [None, "composite", "reference"])
    def test_forward_mode_agrees_with_finite_differences(self, backend):
        assert torch.autograd.gradcheck(
            lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend),
            leaves_and_tangents(requires_grad=True)[0],
            check_forward_ad=True,
            fast_mode=True,
        )

    @EACH_BACKEND
    def test_gradients_of_a_batch_of_gradients(self, backend):
        """torch.autograd's own vmap, over the backward pass alone."""
        leaves, tangents = leaves_and_tangents(requires_grad=True)
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        grads = torch.stack((tangents[0], tangents[1]))
        batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        for index in range(2):
            single = torch.autograd.grad(out, leaves, grads[index], retain_graph=True)
            torch.testing.assert_close([grad[index] for grad in batched], list(single), rtol=1e-9, atol=1e-9)

    @EACH_BACKEND
    @pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
    def test_vmap_over_any_argument(self, backend, index):
        """Several models on one input, for example. The gradient is taken outside of it."""
        leaves, _ = leaves_and_tangents()
        leaves[index] = twins([leaves[index]])[0]
        leaves = [leaf.requires_grad_() for leaf in leaves]

        def attend(*args):
            return ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend)

        dims = tuple(0 if at == index else None for at in range(5))
        out = func.vmap(attend, dims)(*leaves)
        each = [attend(*leaves[:index], one, *leaves[index + 1 :]) for one in leaves[index]]
        torch.testing.assert_close(out, torch.stack(each), rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(found.square().sum(), leaves) for found in (out, torch.stack(each))]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)

    @EACH_BACKEND
    @pytest.mark.parametrize("wrt", [0, 2, 3, 4])
    def test_a_tangent_that_arrives_with_the_gradient(self, backend, wrt):
        leaves, tangents = leaves_and_tangents(requires_grad=True)
        with forward_ad.dual_level():
            out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
            grad = forward_ad.make_dual(tangents[0], tangents[1])
            found = outcome(
                lambda: forward_ad.unpack_dual(torch.autograd.grad(out, leaves[wrt], grad)[0]).tangent,
            )
        if isinstance(found, str):
            assert backend != "reference" and "forward" in found
            return
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend="reference")
        (expected,) = torch.autograd.grad(out, leaves[wrt], tangents[1])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @EACH_BACKEND
    @pytest.mark.parametrize("wrt", [0, 1, 2, 3, 4])
    def test_a_second_backward_pass(self, backend, wrt):
        leaves, _ = leaves_and_tangents(requires_grad=True)

        def second(name):
            out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=name)
            (first,) = torch.autograd.grad(out.square().sum(), leaves[wrt], create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaves)

        found = outcome(lambda: second(backend))
        if isinstance(found, str):
            assert backend != "reference" and ("backend='reference'" in found or "is not implemented" in found)
        else:
            torch.testing.assert_close(found, second("reference"), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("backend", [None, "composite"])
    @pytest.mark.parametrize("way", ["jvp", "grad"])
    def test_compiled_in_one_graph(self, backend, way):
        leaves, tangents = leaves_and_tangents()

        def results(name):
            function = lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=name)  # noqa: E731
            return lambda *leaves: DERIVATIVES[way](function, leaves, tangents)

        compiled = torch.compile(results(backend), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves), results("reference")(*leaves), rtol=1e-9, atol=1e-9)

    def test_a_gradient_for_each_image_of_a_layer(self):
        layer, x = ck.GPSA(16, 2, dtype=torch.float64), torch.randn(3, 9, 16, dtype=torch.float64)
        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

        def loss(parameters, image):
            return func.functional_call(layer.eval(), parameters, (image[None],)).square().sum()

        found = func.vmap(func.grad(loss), (None, 0))(parameters, x)
        for index, image in enumerate(x):
            expected = torch.autograd.grad(layer(image[None]).square().sum(), list(layer.parameters()))
            for (name, _), truth in zip(layer.named_parameters(), expected, strict=True):
                torch.testing.assert_close(found[name][index], truth, rtol=1e-9, atol=1e-9)

    def test_a_frozen_layer_passes_tangents_on(self):
        layer = ck.GPSA(16, 2, dtype=torch.float64).requires_grad_(False)
        x, tangent = torch.randn(2, 1, 9, 16, dtype=torch.float64)
        _, found = func.jvp(layer, (x,), (tangent,))
        step = 1e-6
        torch.testing.assert_close(
            found, (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step), rtol=1e-7, atol=1e-7
        )


class TestUnusualTensors:
    """Each is used for what it means, whatever its memory holds."""

    @EACH_BACKEND
    @pytest.mark.parametrize(
        "make",
        [
            torch._neg_view,
            lambda t: torch.complex(t, t).conj().imag,
            lambda t: torch.complex(t, -t).imag,
            lambda t: -t.expand(2, *t.shape)[1],
        ],
    )
    def test_negated_in_several_ways(self, backend, make):
        """Lazily, in part: then a bit says so, and the memory holds the opposite."""
        leaves, tangents = leaves_and_tangents(requires_grad=True)

        def results(view):
            out = ck.gpsa_attention(*map(view, leaves), grid_size=(2, 3), backend=backend)
            return [out, *torch.autograd.grad(out, leaves, view(tangents[0]))]

        torch.testing.assert_close(results(make), results(torch.neg), rtol=1e-12, atol=1e-12)

    @EACH_BACKEND
    def test_a_gradient_that_is_only_known_to_be_zero(self, backend):
        leaves, _ = leaves_and_tangents(requires_grad=True)
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        zero = torch._efficientzerotensor(out.shape, dtype=out.dtype)
        assert all((grad == 0).all() for grad in torch.autograd.grad(out, leaves, zero))

    @EACH_BACKEND
    @pytest.mark.parametrize("which", [(0,), (3,), ALL])
    def test_subclasses(self, backend, which):
        leaves, _ = leaves_and_tangents(requires_grad=True)
        results = []
        for kind in (lambda t: t, lambda t: t.as_subclass(Tagged), Wrapped):
            marked = [kind(leaf) if index in which else leaf for index, leaf in enumerate(leaves)]
            out = ck.gpsa_attention(*marked, grid_size=(2, 3), backend=backend)
            assert type(out) is type(marked[which[0]])
            results.append(getattr(out, "wrapped", out).as_subclass(torch.Tensor).detach())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @EACH_BACKEND
    def test_inference_mode(self, backend):
        leaves, _ = leaves_and_tangents(requires_grad=True)
        with torch.inference_mode():
            out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        assert out.is_inference()
        torch.testing.assert_close(out.clone(), ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend).detach())

    @EACH_BACKEND
    def test_fake_tensors_tell_shape_dtype_and_layout(self, backend):
        leaves, _ = leaves_and_tangents()
        real = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        with FakeTensorMode() as mode:
            fake = ck.gpsa_attention(*map(mode.from_tensor, leaves), grid_size=(2, 3), backend=backend)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())

    def test_meta_tensors_go_to_plain_operators(self):
        leaves, _ = leaves_and_tangents()
        out = ck.gpsa_attention(*(leaf.to("meta") for leaf in leaves), grid_size=(2, 3))
        assert out.is_meta and out.shape == leaves[0].shape


class TestScale:
    SHAPES = pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1), (6, 1), (3, 2, 6, 1)])

    @EACH_BACKEND
    @SHAPES
    def test_a_tensor_multiplies_the_logits_and_gets_its_gradient(self, backend, shape):
        inputs = make_inputs(3, 2, (2, 3), 4, torch.float64)
        scale = torch.rand(shape, dtype=torch.float64) + 0.5
        results = []
        for function in (lambda i, s: attend(i, (2, 3), backend, scale=s), lambda i, s: eager_attention(i, (2, 3), s)):
            leaf = scale.clone().requires_grad_()
            results.append([*with_gradients(lambda i, f=function, leaf=leaf: f(i, leaf), inputs)])
            results[-1].append(torch.autograd.grad(function(inputs, leaf), leaf, inputs.grad)[0])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)

    @EACH_BACKEND
    @pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.float, torch.Tensor.double, torch.Tensor.item])
    def test_a_factor_in_any_form_is_that_number(self, backend, kind):
        inputs = make_inputs(1, 2, (2, 3), 4)
        found = attend(inputs, (2, 3), backend, scale=kind(torch.tensor(0.25)))
        torch.testing.assert_close(found, attend(inputs, (2, 3), "reference", scale=0.25))
        assert found.dtype == torch.float32

    @EACH_BACKEND
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_tensor_of_another_dtype_leaves_the_output_s(self, backend, dtype):
        inputs = make_inputs(2, 2, (2, 3), 8, dtype)
        scale = torch.tensor([0.25, 0.5]).view(2, 1, 1)
        found = attend(inputs, (2, 3), backend, scale=scale)
        assert found.dtype == dtype
        exact = eager_attention(inputs.to(torch.float64), (2, 3), scale.double())
        assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()

    @EACH_BACKEND
    @pytest.mark.parametrize("scale", [0, 1, -0.3, np.float32(0.5), np.float64(-0.5), 0.0])
    def test_any_finite_number(self, backend, scale):
        inputs = make_inputs(1, 2, (2, 3), 4)
        expected = eager_attention(inputs, (2, 3), float(scale))
        torch.testing.assert_close(attend(inputs, (2, 3), backend, scale=scale), expected)

    @EACH_BACKEND
    @pytest.mark.parametrize("way", ["jacrev", "jvp", "dual tensors"])
    def test_its_derivative_by_any_means(self, backend, way):
        """The tensor passes on to q what it carries."""
        leaves, _ = leaves_and_tangents()
        scale = torch.tensor(0.5, dtype=torch.float64)
        derivatives = DERIVATIVES | {"jacrev": lambda f, leaves, _: func.jacrev(f)(*leaves)}

        def results(name):
            def function(scale):
                return ck.gpsa_attention(*leaves, grid_size=(2, 3), scale=scale, backend=name)

            return derivatives[way](function, [scale], [torch.ones_like(scale)])

        if backend in ("cpu", "triton"):
            with pytest.raises(RuntimeError, match="backend=None would take"):
                results(backend)
        else:
            torch.testing.assert_close(results(backend), results("reference"), rtol=1e-9, atol=1e-10)

    @EACH_BACKEND
    def test_in_a_compiled_graph(self, backend):
        inputs, scale = make_inputs(1, 2, (2, 3), 4), torch.tensor([0.5, 0.25]).view(2, 1, 1)
        torch.compiler.reset()
        compiled = torch.compile(lambda i, s: attend(i, (2, 3), backend, scale=s), fullgraph=True, backend="aot_eager")
        for value in (scale, 0.3):
            torch.testing.assert_close(compiled(inputs, value), eager_attention(inputs, (2, 3), value))


class TestMemory:
    def test_composite_builds_no_map(self):
        """No tensor with as many elements as one N x N map, forward or backward, is ever allocated."""
        grid, tokens = (32, 32), 1024
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: sizes.append(t.numel()), out)
                return out

        inputs = make_inputs(1, 1, grid, 8)
        with Watch():
            with_gradients(lambda i: attend(i, grid, "composite"), inputs)
            largest_fast = max(sizes)
            sizes.clear()
            attend(inputs, grid, "reference")
        assert max(sizes) >= tokens**2, "the watch must see a map where there is one"
        assert largest_fast < tokens**2 / 8


class TestCompile:
    @EACH_BACKEND
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_one_graph_without_a_break(self, backend, dynamic):
        inputs = make_inputs(2, 2, (3, 4), 8)
        compiled = torch.compile(
            lambda i: attend(i, (3, 4), backend), fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        ours, expected = (with_gradients(f, inputs) for f in (compiled, lambda i: attend(i, (3, 4), backend)))
        for mine, truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, truth)

    def test_inductor(self):
        inputs = make_inputs(2, 2, (3, 4), 8)
        compiled = torch.compile(lambda i: attend(i, (3, 4)), fullgraph=True)
        for mine, truth in zip(
            with_gradients(compiled, inputs), with_gradients(lambda i: attend(i, (3, 4)), inputs), strict=True
        ):
            torch.testing.assert_close(mine, truth)

    def test_exported_programs_hold_only_torch_operators(self):
        class Module(torch.nn.Module):
            def forward(self, q, k, v, pos_weight, gate):
                return ck.gpsa_attention(q, k, v, pos_weight, gate, grid_size=(3, 4), backend="composite")

        inputs = make_inputs(2, 2, (3, 4), 8)
        program = torch.export.export(Module(), inputs[:5])
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert targets
        assert not [target for target in targets if "convit" in target]
        torch.testing.assert_close(program.module()(*inputs[:5]), attend(inputs, (3, 4)))


class TestBackends:
    def test_each_says_whether_it_can_run_or_why_not(self):
        listed = ck.backends()
        assert [backend.name for backend in listed] == ["triton", "cpu", "composite", "reference"]
        for backend in listed:
            assert backend.available == (backend.reason == "")
        assert {"composite", "reference"} <= {backend.name for backend in listed if backend.available}

    def test_one_that_cannot_run_raises_with_the_reason(self):
        inputs = make_inputs(1, 1, (2, 2), 4)
        for backend in ck.backends():
            if not backend.available:
                with pytest.raises(RuntimeError, match=re.escape(backend.reason)):
                    attend(inputs, None, backend.name)

    def test_an_unknown_one_raises_with_the_names(self):
        with pytest.raises(ValueError, match=r"'flash'.*composite"):
            attend(make_inputs(1, 1, (2, 2), 4), None, "flash")


class TestBadInput:
    """Each mistake has its own error, which names what was given and what is allowed."""

    def call(self, **changes):
        inputs = make_inputs(2, 3, (4, 4), 8)._asdict()
        del inputs["grad"]
        options = {name: changes.pop(name) for name in list(changes) if name not in inputs}
        inputs.update(changes)
        return ck.gpsa_attention(*inputs.values(), **options)

    @pytest.mark.parametrize(
        ("changes", "error", "text"),
        [
            (
                {"q": torch.randn(2, 16, 24)},
                ValueError,
                r"q must have shape \(batch, heads, tokens, head_dim\).*\(2, 16, 24\)",
            ),
            ({"k": torch.randn(1, 3, 16, 8)}, ValueError, r"k must have q's shape \(2, 3, 16, 8\).*\(1, 3, 16, 8\)"),
            ({"k": torch.randn(2, 4, 16, 8)}, ValueError, "k must have q's shape"),
            ({"v": torch.randn(2, 3, 15, 8)}, ValueError, "v must have q's shape"),
            ({"v": torch.randn(2, 3, 16, 9)}, ValueError, "v must have q's shape"),
            ({"v": torch.randn(2, 3, 16, 8).double()}, TypeError, "v must have q's dtype torch.float32.*torch.float64"),
            ({"q": torch.ones(2, 3, 16, 8, dtype=torch.int32)}, TypeError, "q must be float16.*torch.int32"),
            ({"gate": torch.ones(3, dtype=torch.int64)}, TypeError, "gate must be float16.*torch.int64"),
            ({"q": torch.ones(2, 3, 16, 8, dtype=torch.complex64)}, TypeError, "complex64"),
            ({"q": [1.0]}, TypeError, "q must be a tensor.*list"),
            ({"pos_weight": torch.randn(4, 3)}, ValueError, r"pos_weight must have shape \(3, 3\).*\(4, 3\)"),
            ({"pos_weight": torch.randn(3, 2)}, ValueError, r"pos_weight must have shape \(3, 3\).*\(3, 2\)"),
            ({"gate": torch.randn(1, 3, 1, 1)}, ValueError, r"gate must have shape \(3,\).*\(1, 3, 1, 1\)"),
            ({"gate": torch.randn(3, device="meta")}, ValueError, "gate is on meta.*cpu"),
            ({"grid_size": (4, 5)}, ValueError, r"\(4, 5\) has 20 tokens.*16"),
            ({"grid_size": (-4, -4)}, ValueError, "sides of at least 1"),
            ({"grid_size": (4.0, 4.0)}, TypeError, "pair of ints"),
            ({"dropout_p": 1.0}, ValueError, r"\[0, 1\).*1.0"),
            ({"dropout_p": -0.1}, ValueError, r"\[0, 1\).*-0.1"),
            ({"dropout_p": math.nan}, ValueError, "nan"),
            ({"dropout_p": None}, TypeError, "dropout_p must be a number.*None"),
            ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number.*'0.1'"),
            ({"dropout_p": False}, TypeError, "dropout_p must be a number.*False"),
            ({"scale": True}, TypeError, "scale must be a number.*True"),
            ({"scale": "0.5"}, TypeError, "scale must be a number.*'0.5'"),
            ({"scale": 1j}, TypeError, "scale must be a number.*1j"),
            ({"scale": math.nan}, ValueError, "scale must be finite.*nan"),
            ({"scale": -math.inf}, ValueError, "scale must be finite.*-inf"),
            ({"scale": torch.tensor(1)}, TypeError, "scale must be float16.*torch.int64"),
            ({"scale": torch.ones(3, 1, 1, dtype=torch.complex64)}, TypeError, "scale must be float16.*complex64"),
            ({"scale": torch.ones(3)}, ValueError, r"broadcasts to \(2, 3, 16, 1\).*\(3, 1, 1\).*has \(3,\)"),
            ({"scale": torch.ones(16, 16)}, ValueError, r"broadcasts to.*has \(16, 16\)"),
            ({"scale": torch.ones(2, 1, 1)}, ValueError, r"broadcasts to.*has \(2, 1, 1\)"),
            ({"scale": torch.ones(1, 2, 3, 1, 1)}, ValueError, r"broadcasts to.*has \(1, 2, 3, 1, 1\)"),
            ({"scale": torch.ones(3, 1, 1, device="meta")}, ValueError, "scale is on meta.*cpu"),
            ({"q": torch.randn(2, 3, 16, 8).to_sparse()}, TypeError, "q must be a dense tensor.*sparse_coo.*to_dense"),
            ({"q": torch.randn(2, 3, 16, 8).to_mkldnn()}, TypeError, "q must be a dense tensor.*mkldnn"),
            ({"pos_weight": torch.randn(3, 3).to_sparse_csr()}, TypeError, "pos_weight must be a dense.*sparse_csr"),
            ({"q": torch.nested.nested_tensor([torch.randn(3, 16, 8)])}, TypeError, "q must be a dense.*nested"),
            ({"grid_size": (16, True)}, TypeError, "pair of ints.*True"),
        ],
    )
    def test_error(self, changes, error, text):
        with pytest.raises(error, match=text):
            self.call(**changes)

    @pytest.mark.parametrize("tokens", [0, 2, 12])
    def test_tokens_that_fit_no_square(self, tokens):
        q = torch.randn(1, 1, tokens, 4)
        with pytest.raises(ValueError, match=f"{tokens} tokens form no square grid: pass grid_size"):
            ck.gpsa_attention(q, q, q, torch.randn(1, 3), torch.randn(1))

    @pytest.mark.parametrize("shape", [(2, 0, 16, 8), (2, 3, 16, 0)])
    def test_no_heads_or_no_channels(self, shape):
        q = torch.randn(shape)
        with pytest.raises(ValueError, match="at least one head"):
            ck.gpsa_attention(q, q, q, torch.randn(shape[1], 3), torch.randn(shape[1]))
