"""The Triton kernels as users reach them: through gpsa_attention, the op and the layer."""

import pytest
import torch
from equivalence import Inputs, assert_as_exact, make_inputs, with_gradients
from torch.autograd import forward_ad

import convit_kernels as ck
from convit_kernels import ops
from convit_kernels.equivalence import expected_attention
from convit_kernels.triton import attention


def attend(inputs: Inputs, grid, **options) -> torch.Tensor:
    return ck.gpsa_attention(*inputs[:5], grid_size=grid, backend="triton", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 7), (5, 6)])
def test_output_and_every_gradient(grid, dtype):
    inputs = make_inputs(2, 3, grid, 24, dtype)
    # positions stay float32, as under autocast
    inputs = inputs._replace(pos_weight=inputs.pos_weight.float(), gate=inputs.gate.float())
    assert_as_exact(
        with_gradients(lambda i: attend(i, grid), inputs), expected_attention(*inputs, grid, recomputed=False)
    )


def test_both_regimes_behind_one_op(monkeypatch):
    monkeypatch.setattr(attention, "_l2_bytes", lambda index: attention.INTERPRETED_L2)
    small, large = make_inputs(1, 1, (3, 5), 16), make_inputs(1, 1, (20, 20), 16)
    assert attention.is_dense(small.q)
    assert not attention.is_dense(large.q)
    torch.testing.assert_close(
        attend(large, (20, 20)), ck.gpsa_attention(*large[:5], backend="reference"), rtol=1e-4, atol=1e-5
    )


def test_opcheck():
    inputs = make_inputs(2, 2, (3, 5), 16)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:5]]
    torch.library.opcheck(ops.gated_attention, (*leaves, 3, 5, 0.25, 0.0, None, True))
    philox = torch.tensor([5, 7])
    torch.library.opcheck(ops.gated_attention, (*leaves, 3, 5, 0.25, 0.3, philox, True))
    _, lse, content = ops.gated_attention(*inputs[:5], 3, 5, 0.25, 0.0, None, True)
    arguments = (inputs.grad, *inputs[:3], content, lse, *inputs[3:5], 3, 5, 0.25, 0.0, None)
    torch.library.opcheck(ops.gated_attention_backward, arguments)


def test_compiles_into_one_graph():
    inputs = make_inputs(1, 2, (3, 5), 16)
    compiled = torch.compile(lambda i: attend(i, (3, 5)), fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        with_gradients(compiled, inputs), with_gradients(lambda i: attend(i, (3, 5)), inputs), strict=True
    ):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize(("axis", "stride"), [(0, 2**30 + 16), (1, 2**31 + 16), (2, 2**29 + 16)])
def test_elements_more_than_2_to_the_31_apart(axis, stride, device):
    """The bits are those of contiguous copies. Most of the memory is never touched, and so never given out."""
    shape = (3, 2, 6, 16)
    size = 4 * 3 * 2 * 6 * 16 + stride * (shape[axis] - 1)
    storage = torch.tensor([], dtype=torch.float16).set_(torch.UntypedStorage(2 * size, device=device))
    strides = [0, 0, 0, 1]
    strides[axis] = stride
    step = 16
    for other in {0, 1, 2} - {axis}:
        strides[other] = step
        step *= shape[other]
    views = [storage.as_strided(shape, strides, storage_offset=step * index) for index in range(4)]
    assert views[3].storage_offset() + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 2**31
    plain = make_inputs(3, 2, (2, 3), 16, torch.float16)
    plain = plain._replace(pos_weight=plain.pos_weight.float(), gate=plain.gate.float())
    for view, tensor in zip(views, (plain.q, plain.k, plain.v, plain.grad), strict=True):
        view.copy_(tensor)
    far = plain._replace(q=views[0], k=views[1], v=views[2], grad=views[3])
    results = [with_gradients(lambda i: attend(i, (2, 3)), inputs) for inputs in (far, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ten_runs_give_the_same_bits():
    inputs = make_inputs(2, 2, (3, 5), 16)
    first = with_gradients(lambda i: attend(i, (3, 5)), inputs)
    for _ in range(9):
        again = with_gradients(lambda i: attend(i, (3, 5)), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_empty_batch_and_a_spread_gradient():
    inputs = make_inputs(0, 2, (3, 4), 16)
    out, *_, d_weight, d_gate = with_gradients(lambda i: attend(i, (3, 4)), inputs)
    assert out.shape == (0, 2, 12, 16)
    assert torch.equal(d_weight, torch.zeros(2, 3))
    assert torch.equal(d_gate, torch.zeros(2))
    q = make_inputs(1, 2, (3, 4), 16).q.requires_grad_()
    attend(make_inputs(1, 2, (3, 4), 16)._replace(q=q), (3, 4)).sum().backward()  # its gradient has stride 0
    assert torch.isfinite(q.grad).all()


def test_dropout_follows_torch_s_generator():
    inputs = make_inputs(1, 2, (3, 4), 16)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(with_gradients(lambda i: attend(i, (3, 4), dropout_p=0.4), inputs))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("trainable", [False, True])
def test_forward_mode_and_torch_func_are_refused_and_auto_goes_elsewhere(trainable):
    leaves = [tensor.clone().requires_grad_(trainable) for tensor in make_inputs(1, 2, (2, 3), 8)[:5]]
    tangents = [torch.randn_like(leaf) for leaf in leaves]

    def results(way, backend):
        return way(lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend=backend))

    def dual(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, leaves, tangents))).tangent

    for way in (
        dual,
        lambda f: torch.func.jvp(f, tuple(leaves), tuple(tangents)),
        lambda f: torch.func.grad(lambda *args: f(*args).sum(), (0, 3))(*leaves),
        lambda f: torch.func.vmap(torch.func.jacfwd(f, (3, 4)))(*(leaf[None] for leaf in leaves)),
    ):
        with pytest.raises(RuntimeError, match=r"'triton' cannot do this.*backend=None would take 'composite'"):
            results(way, "triton")
        torch.testing.assert_close(results(way, None), results(way, "reference"), rtol=1e-4, atol=1e-5)


def test_under_vmap_with_the_gradient_taken_outside():
    inputs = make_inputs(2, 2, (2, 3), 8)
    leaves = [torch.stack((tensor, tensor * 2)).requires_grad_() for tensor in inputs[:5]]
    out = torch.func.vmap(lambda *args: ck.gpsa_attention(*args, grid_size=(2, 3), backend="triton"))(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    for index in range(2):
        single = [leaf.detach()[index].requires_grad_() for leaf in leaves]
        each = ck.gpsa_attention(*single, grid_size=(2, 3), backend="triton")
        assert torch.equal(out[index], each)
        expected = torch.autograd.grad(each.square().sum(), single)
        assert all(torch.equal(grad[index], truth) for grad, truth in zip(grads, expected, strict=True))


def test_under_vmap_each_sample_has_its_own_dropout():
    inputs = make_inputs(1, 2, (2, 3), 8)
    tokens = inputs.q.expand(3, -1, -1, -1, -1)

    def dropped(q):
        return ck.gpsa_attention(q, *inputs[1:5], grid_size=(2, 3), dropout_p=0.5, backend="triton")

    first, second, third = torch.func.vmap(dropped, randomness="different")(tokens)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    with pytest.raises(NotImplementedError, match='give vmap randomness="different"'):
        torch.func.vmap(dropped, randomness="same")(tokens)


def test_a_second_backward_pass_through_plain_pytorch():
    leaves = [tensor.clone().requires_grad_() for tensor in make_inputs(2, 2, (2, 3), 8)[:5]]

    def second(backend, **options):
        out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend=backend, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    torch.testing.assert_close(second("triton"), second("reference"), rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match="dropout in the fused kernels has no second derivative"):
        second("triton", dropout_p=0.5)


def test_lazily_negated_inputs_and_gradients():
    inputs = make_inputs(1, 2, (2, 3), 8)
    views = Inputs(*(torch._neg_view(tensor) for tensor in inputs))
    results = [with_gradients(lambda i: attend(i, (2, 3)), i) for i in (views, Inputs(*(-t for t in inputs)))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_the_output_is_differentiable():
    leaves = [tensor.clone().requires_grad_() for tensor in make_inputs(1, 2, (2, 3), 16)[:5]]
    results = ops.gated_attention(*leaves, 2, 3, 0.25, 0.0, None, True)
    assert [result.requires_grad for result in results] == [True, False, False]


def test_the_layer_uses_it():
    layer = ck.GPSA(32, 2, grid_size=(3, 4), backend="triton")
    x = torch.randn(2, 12, 32)
    expected = layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(expected, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((1, 1, 4, 300), torch.float32, "head_dim is at most 256, not 300"),
        ((1, 1, 4, 8), torch.float64, "not torch.float64"),
        ((1, 1, 257 * 257, 1), torch.float32, "at most 65536 tokens"),
        ((1, 65536, 1, 1), torch.float32, "at most 65535 heads"),
    ],
)
def test_what_it_cannot_take_says_so_and_auto_goes_elsewhere(shape, dtype, text):
    q = torch.randn(shape, dtype=dtype)
    weights = torch.randn(shape[1], 3, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    with pytest.raises(RuntimeError, match=text):
        ck.gpsa_attention(q, q, q, *weights, backend="triton")
    if shape[2] < 100:
        assert torch.isfinite(ck.gpsa_attention(q, q, q, *weights)).all()


def test_more_samples_under_vmap_than_a_gpu_takes_heads():
    q = torch.randn(32768, 1, 2, 1, 1)
    attend = torch.vmap(lambda q: ck.gpsa_attention(q, q, q, torch.zeros(2, 3), torch.zeros(2), backend="triton"))
    with pytest.raises(RuntimeError, match=r"at most 65535 heads, not 65536.*chunk_size"):
        attend(q)


@pytest.fixture
def tables_made(monkeypatch):
    """How often tables are made."""
    made = []

    def counting(*arguments):
        made.append(arguments)
        return make(*arguments)

    make = attention.position_tables
    monkeypatch.setattr(attention, "position_tables", counting)
    return made


@pytest.mark.parametrize("l2", [1 << 20, 0], ids=["dense", "factored"])
def test_the_backward_reads_the_tables_of_its_forward(tables_made, monkeypatch, l2):
    monkeypatch.setattr(attention, "INTERPRETED_L2", l2)
    with_gradients(lambda i: attend(i, (2, 3)), make_inputs(1, 1, (2, 3), 8))
    assert len(tables_made) == 1


def test_a_weight_that_has_changed_since_is_an_error_in_the_backward():
    leaves = [tensor.clone().requires_grad_() for tensor in make_inputs(1, 2, (2, 3), 8)[:5]]
    out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend="triton")
    with torch.no_grad():
        leaves[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_changed_without_a_trace_counts_at_the_next_call():
    """No table outlives its call: of such changes neither the version nor the address of a weight tells."""
    q, k, v, pos_weight, gate = make_inputs(1, 2, (2, 3), 8)[:5]
    weight = torch.nn.Parameter(pos_weight.clone(), requires_grad=False)
    for _ in range(2):
        before = weight._version, weight.data_ptr()
        weight.data.mul_(-3)
        assert (weight._version, weight.data_ptr()) == before
        found, expected = (
            ck.gpsa_attention(q, k, v, weight, gate, grid_size=(2, 3), backend=name) for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_parameters_of_another_dtype_get_gradients_of_their_own():
    inputs = make_inputs(1, 2, (2, 3), 8, torch.float16)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    leaves += [inputs.pos_weight.half().requires_grad_(), inputs.gate.double().requires_grad_()]
    out = ck.gpsa_attention(*leaves, grid_size=(2, 3), backend="triton")
    grads = torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype), create_graph=True)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    plain = torch.autograd.grad(
        ck.gpsa_attention(*leaves, grid_size=(2, 3), backend="triton"), leaves, inputs.grad.to(out.dtype)
    )
    for grad, again in zip(grads, plain, strict=True):
        torch.testing.assert_close(again, grad.detach())
