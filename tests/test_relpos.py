"""The relative-position tables: exact factors of the positional attention, natively and in plain PyTorch.

On CPU tensors, by the CPU's kernels and by those of CUDA, compiled for the CPU (tests/cuda_on_cpu).
Needs neither timm nor the rest of the test dependencies: it also runs against other versions of torch.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda_on_cpu
import pytest
import torch
from equivalence import assert_as_exact
from torch.autograd import forward_ad

import convit_kernels as ck
from convit_kernels import eager_tables, extension, ops
from convit_kernels.equivalence import expected

GRIDS = [(1, 1), (1, 7), (3, 5), (14, 14), (8, 18), (18, 8)]
KERNELS = ["cpu.cpp", "cuda.cu"]
EACH_KERNEL = pytest.mark.parametrize("kernels", KERNELS, indirect=True)
EACH_WAY = pytest.mark.parametrize(
    ("kernels", "tables"),
    [
        *((kernels, ops.relative_position_tables) for kernels in KERNELS),
        ("cpu.cpp", eager_tables.relative_position_tables),
    ],
    ids=[*KERNELS, "eager"],
    indirect=["kernels"],
)


@pytest.fixture(scope="session")
def cuda_ops() -> ModuleType:
    """The native ops of CUDA, on CPU tensors."""
    if reason := cuda_on_cpu.why_not():
        pytest.skip(f"the CUDA kernels on the CPU: {reason}")
    return cuda_on_cpu.ops()


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Which kernels the package's ops are on CPU tensors: by default the CPU's."""
    assert extension.status["_C"] is None, "these tests are about the native library, which has to be built first"
    if getattr(request, "param", "cpu.cpp") == "cpu.cpp":
        yield
    else:
        with cuda_on_cpu.in_place_of_the_cpu_s(request.getfixturevalue("cuda_ops")):
            yield


def positional_attention(pos_weight: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(H, N, N) in one softmax over the whole grid: what the factors have to multiply to."""
    height, width = grid
    token = torch.arange(height * width)
    x, y = (token % width).to(pos_weight), (token // width).to(pos_weight)
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    features = torch.stack((dx, dy, dx**2 + dy**2), dim=-1)
    return torch.einsum("nmf,hf->hnm", features, pos_weight).softmax(dim=-1)


def product(row_table: torch.Tensor, col_table: torch.Tensor) -> torch.Tensor:
    tokens = row_table.shape[1] * col_table.shape[1]
    return torch.einsum("hyu,hxw->hyxuw", row_table, col_table).reshape(-1, tokens, tokens)


@EACH_WAY
@pytest.mark.parametrize("grid", GRIDS)
def test_factors_multiply_to_the_positional_attention(tables, grid):
    pos_weight = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(
        product(*tables(pos_weight, *grid)), positional_attention(pos_weight, grid), rtol=0, atol=1e-14
    )


@pytest.mark.equivalence
@EACH_WAY
def test_float32_is_as_accurate_as_one_softmax_over_the_grid(tables):
    pos_weight = torch.randn(9, 3)
    rule = expected(lambda dtype: {"table": positional_attention(pos_weight.to(dtype), (14, 14))}, torch.float32)
    assert_as_exact({"table": product(*tables(pos_weight, 14, 14))}, rule)


@EACH_KERNEL
@pytest.mark.equivalence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
def test_gradient_equals_autograd_through_the_whole_grid(grid, dtype):
    pos_weight, grad = torch.randn(4, 3), torch.randn(4, grid[0] * grid[1], grid[0] * grid[1])

    def gradient(function, dtype):
        leaf = pos_weight.to(dtype).requires_grad_()
        return {"d_pos_weight": torch.autograd.grad(function(leaf, grid), leaf, grad.to(dtype))[0]}

    def of_tables(pos_weight, grid):
        return product(*ck.relative_position_tables(pos_weight, grid))

    if dtype == torch.float64:
        found, truth = (gradient(function, dtype) for function in (of_tables, positional_attention))
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
    else:
        rule = expected(lambda wanted: gradient(positional_attention, wanted), dtype)
        assert_as_exact(gradient(of_tables, dtype), rule)


def test_first_and_second_derivatives():
    pos_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: ck.relative_position_tables(w, (3, 4)), pos_weight)
    assert torch.autograd.gradgradcheck(lambda w: ck.relative_position_tables(w, (3, 4)), pos_weight)


def dual(function, primal: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent))).tangent


@pytest.mark.parametrize("public", [ck.relative_position_tables, ck.dense_position_table])
@pytest.mark.parametrize("trainable", [False, True])
def test_derivatives_forwards_and_of_any_order(public, trainable):
    pos_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=trainable)
    tangent = torch.randn_like(pos_weight)

    def tables(weight):
        found = public(weight, (2, 3))
        return product(*found) if isinstance(found, tuple) else found[..., :6].double()

    for way in (
        lambda f: torch.func.jvp(f, (pos_weight,), (tangent,))[1],
        lambda f: dual(f, pos_weight, tangent),
        lambda f: torch.func.jacfwd(f)(pos_weight),
        lambda f: torch.func.jacrev(f)(pos_weight),
        lambda f: torch.func.hessian(f)(pos_weight),
        lambda f: torch.func.vmap(torch.func.jacrev(f))(torch.stack((pos_weight, tangent))),
        lambda f: torch.func.vmap(f)(torch.stack((pos_weight, tangent))),
    ):
        expected = way(lambda weight: positional_attention(weight, (2, 3)))
        torch.testing.assert_close(way(tables), expected, rtol=1e-6, atol=1e-7)


OPS = {
    "relative_position_tables": lambda w: ops.relative_position_tables(w, 2, 3)[0],
    "dense_position_table": lambda w: ops.dense_position_table(w, 2, 3, torch.float32),
    "relative_position_tables_backward": lambda w: ops.relative_position_tables_backward(
        w[:, :1, None].expand(2, 2, 2), torch.ones(2, 3, 3), torch.ones(2, 2, 2), torch.ones(2, 3, 3)
    ),
    "gated_attention": lambda w: ops.gated_attention(
        *[torch.ones(1, 2, 6, 4)] * 3, w, torch.ones(2), 2, 3, 0.5, 0.0, None, False
    )[0],
    "gated_attention_backward": lambda w: ops.gated_attention_backward(
        *[torch.ones(1, 2, 6, 4)] * 5, torch.ones(1, 2, 6), w, torch.ones(2), 2, 3, 0.5, 0.0, None
    )[4],
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("trainable", [False, True])
def test_an_op_called_by_hand_loses_no_tangent(name, trainable):
    """It has none to give, so it refuses; also when a transform of torch.func is at work inside of another."""
    pos_weight, tangent = torch.randn(2, 3, requires_grad=trainable), torch.randn(2, 3)
    function = OPS[name]
    with pytest.raises(RuntimeError, match=f"{name} cannot do this.*carries a tangent.*plain PyTorch"):
        dual(function, pos_weight, tangent)
    for way in (
        lambda: torch.func.jvp(function, (pos_weight,), (tangent,)),
        lambda: torch.func.grad(lambda w: function(w).sum())(pos_weight),
        lambda: torch.func.vmap(torch.func.grad(lambda w: function(w).sum()))(torch.stack((pos_weight, tangent))),
        lambda: torch.func.jvp(torch.func.vmap(function), (tangent[None],), (tangent[None],)),
    ):
        with pytest.raises(RuntimeError, match=f"{name} cannot do this.*torch.func.*plain PyTorch"):
            way()


def test_the_gradient_s_own_gradient():
    pos_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: ops.relative_position_tables(w, 3, 4), pos_weight)


@EACH_KERNEL
def test_native_and_fallback_gradients_agree():
    tables = ops.relative_position_tables(torch.randn(3, 3, dtype=torch.float64), 5, 4)
    grads = [torch.randn_like(table) for table in tables]
    torch.testing.assert_close(
        ops.relative_position_tables_backward(*grads, *tables),
        eager_tables.relative_position_tables_backward(*grads, *tables),
        rtol=1e-13,
        atol=1e-13,
    )


@EACH_KERNEL
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (5, 27)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_dense_table_is_the_attention_with_zero_padding(grid, dtype, weight_dtype):
    pos_weight = torch.randn(3, 3, dtype=weight_dtype)
    tokens = grid[0] * grid[1]
    table = ck.dense_position_table(pos_weight, grid, dtype)
    assert table.shape == (3, tokens, -(-tokens // 16) * 16)
    assert table.dtype == dtype
    exact = positional_attention(pos_weight.double(), grid)
    torch.testing.assert_close(
        table[..., :tokens].double(),
        exact,
        rtol=torch.finfo(dtype).eps,
        atol=torch.finfo(dtype).tiny + 1e-6 * (dtype == torch.float32),
    )
    assert (table[..., tokens:] == 0).all()


@EACH_KERNEL
def test_dense_table_is_differentiable():
    pos_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 12, 16, dtype=torch.float32)
    (ours,) = torch.autograd.grad(ck.dense_position_table(pos_weight, (3, 4)), pos_weight, grad)
    (exact,) = torch.autograd.grad(positional_attention(pos_weight, (3, 4)), pos_weight, grad[..., :12].double())
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


@EACH_WAY
def test_huge_weights_give_one_hot_rows_not_nan(tables):
    pos_weight = 1e4 * torch.tensor([[0.0, 0.0, -1.0], [2.0, -2.0, -1.0], [1.0, 0.0, 1.0]])
    row_table, col_table = tables(pos_weight, 14, 14)
    assert torch.isfinite(row_table).all()
    assert torch.isfinite(col_table).all()
    torch.testing.assert_close(row_table[0], torch.eye(14))
    torch.testing.assert_close(col_table.sum(-1), torch.ones(3, 14))


@EACH_WAY
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_give_nan_rows_as_one_softmax_does(tables, value):
    pos_weight = torch.tensor([[value, 0.5, -1.0], [0.5, 0.5, -1.0]])
    dense = product(*tables(pos_weight, 3, 3))
    assert torch.equal(dense.isnan(), positional_attention(pos_weight, (3, 3)).isnan())


@EACH_KERNEL
def test_weights_and_gradients_of_any_strides():
    wide = torch.randn(6, 8, dtype=torch.float64)
    strided = wide[::2, 1:7:2]
    assert not strided.is_contiguous()
    tables = ops.relative_position_tables(strided, 3, 4)
    for strided_table, table in zip(tables, ops.relative_position_tables(strided.contiguous(), 3, 4), strict=True):
        assert torch.equal(strided_table, table)
    grads = [
        torch.randn(table.shape[1], 3, table.shape[2] * 2, dtype=torch.float64)[..., ::2].transpose(0, 1)
        for table in tables
    ]
    grads[0] = grads[0][:, :, :1].expand_as(tables[0])
    assert torch.equal(
        ops.relative_position_tables_backward(*grads, *tables),
        ops.relative_position_tables_backward(*(g.contiguous() for g in grads), *tables),
    )


def test_same_bits_for_any_number_of_threads():
    pos_weight = torch.randn(16, 3)
    grads = torch.randn(16, 18, 18), torch.randn(16, 8, 8)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tables = ops.relative_position_tables(pos_weight, 18, 8)
            results.append((*tables, ops.relative_position_tables_backward(*grads, *tables)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32(dtype):
    pos_weight = torch.randn(3, 3).to(dtype)
    row_table, col_table = ck.relative_position_tables(pos_weight, (4, 5))
    expected = ck.relative_position_tables(pos_weight.float(), (4, 5))
    assert torch.equal(row_table, expected[0])
    assert torch.equal(col_table, expected[1])


@EACH_KERNEL
def test_one_int_is_a_square_grid_and_no_heads_are_fine():
    assert [t.shape for t in ck.relative_position_tables(torch.randn(2, 3), 4)] == [(2, 4, 4), (2, 4, 4)]
    assert [t.shape for t in ck.relative_position_tables(torch.randn(0, 3), (2, 5))] == [(0, 2, 2), (0, 5, 5)]
    assert ck.dense_position_table(torch.randn(0, 3), (2, 5)).shape == (0, 10, 16)


@pytest.mark.parametrize(
    ("weight", "grid", "error", "text"),
    [
        (torch.randn(4, 2), (2, 2), ValueError, r"\(heads, 3\).*\(4, 2\)"),
        (torch.randn(3), (2, 2), ValueError, r"\(heads, 3\).*\(3,\)"),
        (torch.ones(4, 3, dtype=torch.int64), (2, 2), TypeError, "floating-point.*int64"),
        ([[1.0, 2.0, 3.0]], (2, 2), TypeError, "list"),
        (torch.randn(4, 3).to_sparse(), (2, 2), TypeError, "dense.*sparse_coo.*to_dense"),
        (torch.randn(4, 3), (True, 2), TypeError, "True"),
        (torch.randn(4, 3), (2, 0), ValueError, r"\(2, 0\)"),
        (torch.randn(4, 3), (2, 2, 2), TypeError, r"\(2, 2, 2\)"),
        (torch.randn(4, 3), "22", TypeError, "'22'"),
        (torch.randn(4, 3), (2.0, 2), TypeError, "2.0"),
    ],
)
def test_bad_input_says_what_was_given(weight, grid, error, text):
    with pytest.raises(error, match=text):
        ck.relative_position_tables(weight, grid)
    with pytest.raises(error, match=text):
        ck.dense_position_table(weight, grid)


@EACH_KERNEL
def test_the_ops_check_what_python_did_not():
    tables = ops.relative_position_tables(torch.randn(2, 3), 3, 4)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        ops.relative_position_tables(torch.randn(2, 3).half(), 3, 4)
    with pytest.raises(RuntimeError, match="64 bits"):
        ops.dense_position_table(torch.randn(2, 3), 1 << 22, 1 << 22, torch.float32)
    with pytest.raises(RuntimeError, match="at most"):
        ops.relative_position_tables(torch.randn(2, 3), 1 << 40, 1)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        ops.dense_position_table(torch.randn(2, 3), 2, 2, torch.float64)
    with pytest.raises(RuntimeError, match="grad_row"):
        ops.relative_position_tables_backward(tables[0][:1], tables[1], *tables)
    with pytest.raises(RuntimeError, match="shape"):
        ops.relative_position_tables_backward(tables[1], tables[1], *tables)
    with pytest.raises(RuntimeError, match=r"row_table must have shape \(heads, L, L\)"):
        ops.relative_position_tables_backward(*tables, tables[0][:, 1:], tables[1])
    with pytest.raises(RuntimeError, match=r"grad_col must agree.*dtype"):
        ops.relative_position_tables_backward(tables[0], tables[1].double(), *tables)
    with pytest.raises(RuntimeError, match="at least one row"):
        ops.relative_position_tables(torch.randn(2, 3), 0, 4)
    with pytest.raises(RuntimeError, match=r"pos_weight must have shape \(heads, 3\)"):
        ops.dense_position_table(torch.randn(2, 4), 3, 4, torch.float32)
    with pytest.raises(TypeError, match="float64"):
        ck.dense_position_table(torch.randn(2, 3), 2, torch.float64)


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        pos_weight = torch.randn(2, 3, dtype=dtype, requires_grad=True)
        torch.library.opcheck(ops.relative_position_tables, (pos_weight, 3, 4))
        torch.library.opcheck(ops.dense_position_table, (pos_weight, 3, 4, torch.bfloat16))
        tables = ops.relative_position_tables(pos_weight.detach(), 3, 4)
        grads = [torch.randn_like(table) for table in tables]
        torch.library.opcheck(ops.relative_position_tables_backward, (*grads, *tables))


@pytest.mark.skipif(
    extension.status["_C_cuda"] is not None, reason="the CUDA library is not built here; the CI's CUDA build runs this"
)
class TestCudaLibrary:
    """Nothing of it can run without a GPU; what it is made of can be read."""

    def test_every_op_has_a_cuda_kernel(self):
        for name in ("relative_position_tables", "relative_position_tables_backward", "dense_position_table"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convit_kernels::{name}", "CUDA")

    def test_all_architectures_are_in_it(self):
        tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
        if tool is None:
            triton = pytest.importorskip("triton", reason="neither the CUDA toolkit's cuobjdump nor triton's is here")
            tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        library = Path(ck.__file__).parent / "_C_cuda.abi3.so"
        code = subprocess.run([tool, "--list-elf", library], capture_output=True, text=True, check=True).stdout
        for architecture in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
            assert architecture + "." in code
        ptx = subprocess.run([tool, "--list-ptx", library], capture_output=True, text=True, check=True).stdout
        assert "sm_120" in ptx


@EACH_KERNEL
def test_the_ops_check_the_device(kernels):
    """Of what reaches a kernel nevertheless: the dispatcher sends tensors of several devices to one of them."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    elsewhere = torch.randn(2, 3, device="meta")
    for op, *rest in ((ops.relative_position_tables,), (ops.dense_position_table, torch.float32)):
        with pytest.raises(RuntimeError, match="pos_weight must be on"):
            op.redispatch(cpu, elsewhere, 3, 4, *rest)
    tables = ops.relative_position_tables(torch.randn(2, 3), 3, 4)
    with pytest.raises(RuntimeError, match="the tables must be on"):
        ops.relative_position_tables_backward.redispatch(cpu, *(t.to("meta") for t in (*tables, *tables)))
    for at, name in enumerate(("grad_row", "grad_col")):
        given = [*tables, *tables]
        given[at] = given[at].to("meta")
        with pytest.raises(RuntimeError, match=f"{name} must agree.*device"):
            ops.relative_position_tables_backward.redispatch(cpu, *given)


class TestCudaKernels:
    def test_what_a_launch_cannot_do_ends_before_anything_is_allocated(self, cuda_ops):
        one = torch.zeros(())  # of any number of heads, and of no memory
        weight = one.expand(2, 3)
        with pytest.raises(RuntimeError, match=r"1x10240 is too long.*at most 10240.*relative_position_tables"):
            cuda_ops.dense_position_table(weight, 1, 10240, torch.float32)
        with pytest.raises(RuntimeError, match=r"4000x2000 is too long.*at most 5120.*relative_position_tables"):
            cuda_ops.dense_position_table(weight.double(), 4000, 2000, torch.float32)
        with pytest.raises(RuntimeError, match="need 4294967296 CUDA blocks; at most 2147483647"):
            cuda_ops.dense_position_table(one.expand(1 << 20, 3), 64, 64, torch.float32)
        with pytest.raises(RuntimeError, match="need 8589934592 CUDA blocks; at most 2147483647"):
            cuda_ops.relative_position_tables(one.expand(1 << 39, 3), 1, 1)
        tables = one.expand(1 << 31, 1, 1)
        with pytest.raises(RuntimeError, match="need 2147483648 CUDA blocks; at most 2147483647"):
            cuda_ops.relative_position_tables_backward(tables, tables, tables, tables)

    @pytest.mark.parametrize("where", ["gpu", "cpu"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_the_cpu_s(self, dtype, where, request):
        if where == "cpu":
            cuda, device = request.getfixturevalue("cuda_ops"), "cpu"
        elif torch.cuda.is_available():
            cuda, device = ops, "cuda"
        else:
            pytest.skip("no GPU here; the kernels run on the CPU")
        pos_weight = torch.randn(5, 3, dtype=dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        expected = ops.relative_position_tables(pos_weight, 13, 21)
        tables = cuda.relative_position_tables(pos_weight.to(device), 13, 21)
        grads = [torch.randn_like(table) for table in expected]
        for truth, found in zip(expected, tables, strict=True):
            torch.testing.assert_close(found.cpu(), truth, **tolerance)
        torch.testing.assert_close(
            cuda.relative_position_tables_backward(*(g.to(device) for g in grads), *tables).cpu(),
            ops.relative_position_tables_backward(*grads, *expected),
            **tolerance,
        )
        dense = cuda.dense_position_table(pos_weight.to(device), 13, 21, torch.float32)
        torch.testing.assert_close(
            dense.cpu(), ops.dense_position_table(pos_weight, 13, 21, torch.float32), **tolerance
        )
