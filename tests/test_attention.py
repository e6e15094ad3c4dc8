"""gpsa_attention: exact on every backend, for every shape, and clear about what it cannot take."""

import itertools
import math
import random
import re

import pytest
import torch
from backends import AVAILABLE, EACH_BACKEND, EACH_EXACT_BACKEND, EACH_FAST_BACKEND, attend
from equivalence import Inputs, assert_as_exact, eager_attention, make_inputs, problem, with_gradients

import convit_kernels as ck
from convit_kernels.equivalence import expected_attention

pytestmark = pytest.mark.usefixtures("on_device")
GRIDS = [(1, 1), (1, 7), (3, 5), (14, 14), (8, 18), (18, 8)]


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


@EACH_EXACT_BACKEND
@pytest.mark.parametrize("grid", [(3, 5), (8, 18)])
def test_float64_to_its_last_digits(backend, grid):
    inputs = make_inputs(2, 3, grid, 16, torch.float64)
    exact = with_gradients(lambda i: eager_attention(i, grid, 0.25), inputs)
    ours = with_gradients(lambda i: attend(i, grid, backend, scale=0.25), inputs)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-12)


@EACH_EXACT_BACKEND
def test_gradcheck(backend):
    q, k, v, pos_weight, gate, _ = make_inputs(2, 2, (2, 3), 4, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, pos_weight, gate)]
    assert torch.autograd.gradcheck(lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend), leaves)


@EACH_BACKEND
def test_1024_tokens(backend):
    inputs, expected = problem(batch=1, heads=1, grid=(32, 32), head_dim=8, forward_only=True, draws=1)
    assert_as_exact([attend(inputs, (32, 32), backend)], expected)


def test_composite_equals_reference_on_any_shape():
    draw = random.Random(0)
    for _ in range(30):
        batch, heads, head_dim = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 20)
        grid = draw.randint(1, 6), draw.randint(1, 6)
        inputs = make_inputs(batch, heads, grid, head_dim, torch.float64)
        found, truth = (attend(inputs, grid, backend) for backend in ("composite", "reference"))
        shape = f"batch {batch}, {heads} heads of {head_dim} on {grid}"
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12, msg=lambda text, s=shape: f"{s}: {text}")


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
    with torch.autocast(inputs.q.device.type, dtype=autocast):
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
        if backend is None and inputs.q.is_cuda:
            pytest.skip("the fused kernels draw a mask of their own")
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
        with pytest.raises(
            RuntimeError, match=rf"'{backend}' cannot.*dropout.*backend=None would take '(reference|triton)'"
        ):
            attend(inputs, (3, 4), backend, dropout_p=0.4)

    @WITHOUT
    def test_a_layer_that_asks_for_such_a_backend_runs_in_evaluation_and_refuses_to_train(self, backend):
        layer, x = ck.GPSA(16, 2, attn_drop=0.5, backend=backend), torch.randn(1, 9, 16)
        assert layer.eval()(x).shape == (1, 9, 16)
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot.*dropout"):
            layer.train()(x)


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


@pytest.mark.on_cpu
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
            ({"grid_size": (4.0, 4.0)}, TypeError, "int for a square"),
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
            ({"grid_size": (16, True)}, TypeError, "int for a square.*True"),
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
