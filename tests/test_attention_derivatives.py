"""gpsa_attention under PyTorch's ways to derive, of tensors of every kind, and of a tensor as scale."""

import warnings

import numpy as np
import pytest
import torch
from backends import EACH_BACKEND, EACH_EXACT_BACKEND, FAST, attend
from equivalence import eager_attention, make_inputs, with_gradients
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import convit_kernels as ck

pytestmark = pytest.mark.usefixtures("on_device")


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapped(torch.Tensor):
    """One that has no memory of its own, but another tensor inside."""

    @staticmethod
    def __new__(cls, inner):
        settings = {"dtype": inner.dtype, "strides": inner.stride(), "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **settings)

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

    @EACH_EXACT_BACKEND
    def test_gradients_of_a_batch_of_gradients(self, backend):
        """torch.autograd's own vmap, over the backward pass alone."""
        leaves, tangents = leaves_and_tangents(requires_grad=True)
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        grads = torch.stack((tangents[0], tangents[1]))
        with warnings.catch_warnings():
            if backend != "composite":
                warnings.filterwarnings("error", "There is a performance drop")
            batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        for index in range(2):
            single = torch.autograd.grad(out, leaves, grads[index], retain_graph=True)
            torch.testing.assert_close([grad[index] for grad in batched], list(single), rtol=1e-9, atol=1e-9)

    @EACH_EXACT_BACKEND
    @pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
    def test_vmap_over_any_argument_in_one_call(self, backend, index):
        """Several models on one input, for example. The gradient is taken outside of it."""
        leaves, _ = leaves_and_tangents()
        leaves[index] = twins([leaves[index]])[0]
        leaves = [leaf.requires_grad_() for leaf in leaves]

        def attend(*args):
            return ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend)

        dims = tuple(0 if at == index else None for at in range(5))
        with warnings.catch_warnings():
            if backend != "composite":  # whose attention PyTorch itself calls once a sample
                warnings.filterwarnings("error", "There is a performance drop")
            out = func.vmap(attend, dims)(*leaves)
        each = [attend(*leaves[:index], one, *leaves[index + 1 :]) for one in leaves[index]]
        torch.testing.assert_close(out, torch.stack(each), rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(found.square().sum(), leaves) for found in (out, torch.stack(each))]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)

    @EACH_EXACT_BACKEND
    @pytest.mark.parametrize("dims", [(-1, 2, 1, 1, -1), (0, None, 3, None, 0), (None, 0, None, 2, None)])
    def test_vmap_within_vmap_over_any_dimension(self, backend, dims):
        leaves, _ = leaves_and_tangents()
        batches = [
            leaf if dim is None else torch.stack((leaf, leaf + 0.5), dim)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        outer = [*batches[:4], torch.stack((batches[4], batches[4] - 1))]

        def attend(*args):
            return ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend)

        found = func.vmap(func.vmap(attend, dims), (None, None, None, None, 0))(*outer)
        for gates, results in zip(outer[4], found, strict=True):
            for sample, result in enumerate(results):
                args = [*batches[:4], gates]
                each = [arg if dim is None else arg.select(dim, sample) for arg, dim in zip(args, dims, strict=True)]
                torch.testing.assert_close(result, attend(*each), rtol=1e-12, atol=1e-12)

    @EACH_EXACT_BACKEND
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

    @EACH_EXACT_BACKEND
    @pytest.mark.parametrize("wrt", [0, 1, 2, 3, 4])
    def test_a_second_backward_pass(self, backend, wrt):
        leaves, _ = leaves_and_tangents(requires_grad=True)

        def second(name):
            out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=name)
            (first,) = torch.autograd.grad(out.square().sum(), leaves[wrt], create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaves)

        torch.testing.assert_close(second(backend), second("reference"), rtol=1e-9, atol=1e-9)

    @EACH_EXACT_BACKEND
    def test_a_third_backward_pass_of_one_tensor_in_several_places(self, backend):
        """q also is v, and k comes from q: each of them has a gradient of its own on the way."""
        leaves, _ = leaves_and_tangents(requires_grad=True)

        def third(name):
            q, pos_weight, gate = leaves[0], *leaves[3:]
            value = ck.gpsa_attention(q, q.sin(), q, pos_weight, gate, grid_size=(2, 3), backend=name).square().sum()
            for _ in range(2):
                (grad,) = torch.autograd.grad(value, q, create_graph=True)
                value = grad.square().sum()
            return torch.autograd.grad(value, (q, pos_weight, gate))

        torch.testing.assert_close(third(backend), third("reference"), rtol=1e-8, atol=1e-8)

    @EACH_BACKEND
    def test_a_gradient_penalty_trains_every_parameter(self, backend):
        """As in critics of images: the norm of the gradient of the input is part of the loss. In float32, by layers."""
        layers = [ck.GPSA(16, 2, grid_size=(2, 3), backend=name) for name in (backend, "reference")]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(2, 6, 16)
        for layer in layers:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
            (grad.flatten(1).norm(dim=1) - 1).square().sum().backward()
        for (name, mine), truth in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-3, atol=1e-4, msg=name)

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

    @EACH_EXACT_BACKEND
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

    @EACH_EXACT_BACKEND
    def test_a_gradient_that_is_only_known_to_be_zero(self, backend):
        leaves, _ = leaves_and_tangents(requires_grad=True)
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        zero = torch._efficientzerotensor(out.shape, dtype=out.dtype, device=out.device)
        assert all((grad == 0).all() for grad in torch.autograd.grad(out, leaves, zero))

    @EACH_EXACT_BACKEND
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

    @EACH_EXACT_BACKEND
    def test_inference_mode(self, backend):
        leaves, _ = leaves_and_tangents(requires_grad=True)
        with torch.inference_mode():
            out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend)
        assert out.is_inference()
        torch.testing.assert_close(out.clone(), ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend).detach())

    @EACH_EXACT_BACKEND
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

    @EACH_EXACT_BACKEND
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
