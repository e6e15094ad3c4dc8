"""The fused CPU kernels: exact for every instruction set, shape and layout, the same bits on any number of threads."""

import functools
import shutil
from pathlib import Path

import native_mutants
import pytest
import torch
from equivalence import Inputs, assert_as_exact, eager_attention, make_inputs, problem, with_gradients

import convit_kernels as ck
from convit_kernels import extension, ops
from convit_kernels.equivalence import expected_attention

pytestmark = pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it")
INSTRUCTION_SETS = [] if extension.status["_C"] is not None else extension.instruction_sets()
# of the two that units multiply in different ways
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# in bytes: with the smaller one keys come in chunks from the first on, where the grid has 8 columns
EACH_CACHE = pytest.mark.parametrize("cache", ["262144", "1024"], ids=["whole", "chunked"])
# which fill a second-level cache of 128 KiB: several chunks of keys and blocks of queries, the last of each odd
MANY = (19, 23)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("CONVIT_KERNELS_ISA", request.param)
    assert extension.instruction_set() == request.param


@pytest.fixture(autouse=True)
def second_level_cache(monkeypatch):
    """A small one, which 768 tokens fill: the same paths are taken on every machine."""
    monkeypatch.setenv("CONVIT_KERNELS_L2", str(1 << 18))


@pytest.fixture
def many_tokens(second_level_cache, monkeypatch):
    """A smaller one, which 384 tokens fill: dense rules of more take long."""
    monkeypatch.setenv("CONVIT_KERNELS_L2", str(1 << 17))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attend(inputs: Inputs, grid, scale=None) -> torch.Tensor:
    return ck.gpsa_attention(*inputs[:5], grid_size=grid, scale=scale, backend="cpu")


def check(grid, dtype=torch.float32, *, batch=2, heads=3, head_dim=24, scale=None, **options) -> None:
    """Output and every gradient by the rule of convit_kernels.equivalence."""
    inputs, expected = problem(scale, batch=batch, heads=heads, grid=grid, head_dim=head_dim, dtype=dtype, **options)
    assert_as_exact(with_gradients(lambda i: attend(i, grid, scale), inputs), expected)


@pytest.mark.usefixtures("instruction_set")
def test_each_dtype_is_served_by_the_set_in_use_or_by_its_base():
    name = extension.instruction_set()
    complete = name.replace("amx_bf16", "avx512").replace("avx512_bf16", "avx512")
    every = dict.fromkeys(["float32", "float64", "bfloat16", "float16"], complete)
    assert extension.units_by_dtype() == every | {"bfloat16": name}


@pytest.mark.equivalence
@pytest.mark.usefixtures("instruction_set")
class TestEquivalence:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (3, 5), (14, 14), (8, 18), (18, 8)])
    def test_grids(self, grid, dtype):
        check(grid, dtype)

    @EACH_DTYPE
    def test_a_grid_of_several_chunks_of_keys(self, dtype):
        check((17, 31), dtype)

    @EACH_DTYPE
    @EACH_CACHE
    @pytest.mark.parametrize("head_dim", [1, 8, 40, 48, 64, 80, 96, 128, 200])
    def test_head_dims(self, head_dim, cache, dtype, monkeypatch):
        monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
        check((5, 9), dtype, head_dim=head_dim)

    @EACH_DTYPE
    @EACH_CACHE
    @pytest.mark.parametrize("tokens", [2, 15, 16, 17, 63, 64, 65, 97, 191, 193])
    def test_rows_of_any_length(self, tokens, cache, dtype, monkeypatch):
        """Around the sizes of vectors, tiles and chunks."""
        monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
        check((1, tokens), dtype, head_dim=17)

    @pytest.mark.parametrize("gate", [-40.0, 0.0, 40.0])
    def test_saturated_gates(self, gate):
        check((4, 6), gate=gate)

    @pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
    def test_any_scale(self, scale):
        check((4, 6), scale=scale)

    @pytest.mark.parametrize("grid", [(3, 5), (14, 14)])
    def test_float64_to_its_last_digits(self, grid):
        inputs = make_inputs(2, 3, grid, 20, torch.float64)
        exact = with_gradients(lambda i: eager_attention(i, grid, 0.25), inputs)
        ours = with_gradients(lambda i: attend(i, grid, 0.25), inputs)
        for mine, truth in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)

    @pytest.mark.usefixtures("many_tokens")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [0.4, -0.4])
    def test_many_tokens(self, dtype, scale):
        """So many that a block takes its keys in chunks, with a running maximum."""
        check(MANY, dtype, batch=1, heads=2, head_dim=13, scale=scale, draws=1)

    @pytest.mark.usefixtures("many_tokens")
    @EACH_DTYPE
    @pytest.mark.parametrize("grid", [(16, 32), (1, 450), (450, 1), (57, 8)])
    def test_many_tokens_on_any_grid(self, grid, dtype):
        inputs, expected = problem(0.4, True, batch=1, heads=1, grid=grid, head_dim=8, dtype=dtype, draws=1)
        assert_as_exact([attend(inputs, grid, 0.4)], expected)

    @pytest.mark.usefixtures("many_tokens")
    def test_many_tokens_in_float64(self):
        inputs = make_inputs(1, 1, MANY, 5, torch.float64)
        torch.testing.assert_close(
            attend(inputs, MANY, 0.4), eager_attention(inputs, MANY, 0.4), rtol=1e-12, atol=1e-13
        )

    def test_the_average_error_is_that_of_eager(self):
        """Of the results of many elements: a few parameters' gradients have no average."""
        squares = torch.zeros(2, 4, dtype=torch.float64)
        for _ in range(8):
            inputs = make_inputs(2, 3, (8, 9), 48)
            exact = with_gradients(lambda i: eager_attention(i, (8, 9), 0.14), inputs.to(torch.float64))
            for row, function in enumerate((attend, eager_attention)):
                found = with_gradients(lambda i, function=function: function(i, (8, 9), 0.14), inputs)
                squares[row] += torch.stack(
                    [(a - b).square().mean() for a, b in zip(found[:4], exact[:4], strict=True)]
                )
        assert ((squares[0] / squares[1]).sqrt() < 1.5).all()


@pytest.mark.equivalence
@pytest.mark.usefixtures("instruction_set")
class TestExtremes:
    @EACH_DTYPE
    @EACH_CACHE
    def test_logits_of_ten_thousand(self, cache, dtype, monkeypatch):
        """As sharp as a softmax gets: its exact result is nearly one key's value, and its gradients nearly vanish."""
        monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
        check((5, 9), dtype, head_dim=16, scale=0.25, logits=1e4)

    @pytest.mark.parametrize("which", ["q", "k", "v"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_non_finite_values_spread_as_in_the_reference_layer(self, which, value, dtype):
        inputs = make_inputs(2, 2, (5, 4), 19, dtype)
        spoiled = getattr(inputs, which).clone()
        spoiled[1, 0, 5, 3] = value
        inputs = inputs._replace(**{which: spoiled})
        expected, found = eager_attention(inputs, (5, 4), 0.5), attend(inputs, (5, 4), 0.5)
        assert not torch.isfinite(expected).all()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())

    @pytest.mark.usefixtures("many_tokens")
    @pytest.mark.parametrize("which", ["q", "k", "v"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(("logits", "position"), [(100.0, 0.01), (1.0, 10.0)])
    @EACH_DTYPE
    def test_non_finite_values_among_many_tokens(self, which, value, logits, position, dtype):
        """Where the content's part of the map is zero and the position's is not, and the other way round."""
        inputs = make_inputs(1, 2, MANY, 8, dtype, logits=logits)
        spoiled = getattr(inputs, which).clone()
        spoiled[0, :, (5, 420), 3] = value
        inputs = inputs._replace(**{which: spoiled}, pos_weight=inputs.pos_weight * position)
        # in float32: PyTorch's product of bfloat16 by AMX lets the NaN of a row into the one before, where keys are odd
        expected = eager_attention(inputs.to(torch.float32), MANY, 0.5)
        found = attend(inputs, MANY, 0.5)
        assert not torch.isfinite(expected).all()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())

    @pytest.mark.usefixtures("many_tokens")
    @EACH_DTYPE
    def test_values_whose_sum_overflows(self, dtype):
        """Not their weighted mean: the map's rows sum to one."""
        inputs = make_inputs(1, 1, MANY, 8, dtype)
        inputs = inputs._replace(q=torch.zeros_like(inputs.q), v=torch.full_like(inputs.v, 1e37))
        error = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(attend(inputs, MANY), inputs.v, rtol=error, atol=0)

    @pytest.mark.usefixtures("many_tokens")
    @EACH_DTYPE
    def test_scores_of_minus_infinity_in_a_whole_chunk_of_keys(self, dtype):
        inputs = make_inputs(1, 1, MANY, 8, dtype)
        q, k = inputs.q.abs(), inputs.k.clone()
        k[0, 0, :200] = -float("inf")
        inputs = inputs._replace(q=q, k=k)
        assert torch.isfinite(eager_attention(inputs, MANY, 0.5)).all()
        finite = inputs._replace(k=k.clamp(min=-1e4))  # as good as -inf to a softmax
        rule = expected_attention(*finite[:5], None, MANY, scale=0.5, recomputed=False, draws=1)
        assert_as_exact([attend(inputs, MANY, 0.5)], rule)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_key_that_no_query_sees(self, dtype):
        """Its scores are all -inf; a block's unused queries, whose own would be NaN, spoil no gradient."""
        inputs = make_inputs(1, 1, (5, 7), 8, dtype)
        k = inputs.k.clone()
        k[0, 0, 4] = -float("inf")
        inputs = inputs._replace(q=inputs.q.abs() + 0.5, k=k)
        mine, eager = (with_gradients(lambda i, f=f: f(i, (5, 7), 0.5), inputs) for f in (attend, eager_attention))
        assert not eager[3].isnan().any()
        for result, expected in zip(mine[:4], eager[:4], strict=True):  # out, dq, dk, dv
            assert torch.equal(result.isnan(), expected.isnan())

    @pytest.mark.parametrize("which", ["q", "k", "v", "pos_weight", "gate", "grad"])
    @EACH_DTYPE
    def test_a_nan_is_lost_in_no_result(self, which, dtype):
        """Every result that has a NaN for its input has one here; eager's renormalisation spreads some further."""
        inputs = make_inputs(1, 2, (3, 4), 8, dtype)
        spoiled = getattr(inputs, which).clone()
        spoiled[(0,) * spoiled.dim()] = float("nan")
        inputs = inputs._replace(**{which: spoiled})
        out, _, _, dv, d_weight, d_gate = with_gradients(lambda i: attend(i, (3, 4), 0.5), inputs)
        assert torch.equal(out.isnan(), eager_attention(inputs, (3, 4), 0.5).isnan())
        assert d_gate[0].isnan()
        assert d_weight[0].isnan().all() == (which not in ("q", "k"))
        assert not d_gate[1].isnan() and not d_weight[1].isnan().any()
        assert dv[0, 0].isnan().any() == (which != "v")

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            (torch.float16, 1e-7),  # subnormal
            (torch.float16, 6.1e-5),
            (torch.float16, 65504.0),
            (torch.bfloat16, 1.2e-38),
            (torch.bfloat16, 1e38),
        ],
    )
    def test_numbers_at_the_edges_of_half_precision(self, dtype, value):
        """With one token the output is the value itself."""
        v = torch.full((1, 1, 1, 3), value).to(dtype)
        q = torch.ones_like(v)
        out = ck.gpsa_attention(q, q, v, torch.zeros(1, 3), torch.zeros(1), backend="cpu")
        assert torch.equal(out, v)


@functools.cache
def in_float64(grid, dtype) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """Inputs, their output, and that with the values' magnitudes: found once for all units."""
    inputs = make_inputs(1, 1, grid, 13, dtype)
    exact = inputs.to(torch.float64)
    magnitudes = exact._replace(v=exact.v.abs())
    return inputs, eager_attention(exact, grid, 0.3), eager_attention(magnitudes, grid, 0.3)


@pytest.mark.usefixtures("instruction_set")
class TestRounding:
    """How often a result is rounded, and to what: sharper than by the rule, as eager rounds far more often."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_rounds_to_nearest(self, dtype):
        """Every number and the middle between neighbours, against torch's own conversion; NaN and infinity too."""
        v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        # dot products of bfloat16 take what is subnormal for zero
        v = v if dtype == torch.float16 else v[~(v.abs() < 4 * torch.finfo(dtype).tiny)]
        v = v.view(-1, 1, 1, 1).expand(-1, -1, -1, 9)  # in a vector and apart
        q, pos_weight = torch.zeros_like(v), torch.zeros(1, 3)
        out = ck.gpsa_attention(q, q, v, pos_weight, torch.zeros(1), backend="cpu")
        torch.testing.assert_close(out, v, rtol=0, atol=0, equal_nan=True)
        pair = torch.cat((v, v.roll(1, 0)), dim=2)  # weights of one half each
        q = torch.zeros_like(pair)
        out = ck.gpsa_attention(q, q, pair, pos_weight, torch.zeros(1), grid_size=(1, 2), backend="cpu")[:, :, :1]
        expected = (pair.float() / 2).sum(2, keepdim=True).to(dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("grid", [(3, 5), (14, 14), (37, 45), pytest.param((53, 63), id="larger_blocks")])
    def test_half_precision_errs_by_two_roundings(self, grid, dtype):
        """The map's, by a unit roundoff of the values that it weighs, and the output's; float32's are far below.

        Of the most tokens a block has more queries: a sixteenth of them.
        """
        inputs, out, weighed = in_float64(grid, dtype)
        allowed = 1.01 * torch.finfo(dtype).eps / 2 * (weighed + out.abs())
        assert ((attend(inputs, grid, 0.3) - out).abs() <= allowed).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_gradients_in_half_precision_are_rounded_once(self, dtype):
        """To the nearest of those in float32, where another order of sums may move a last digit."""
        if dtype == torch.bfloat16 and "bf16" in extension.instruction_set():
            pytest.skip("multiplies in bfloat16: see the next test")
        inputs = make_inputs(2, 2, (14, 14), 13, dtype)
        half, single = (
            with_gradients(lambda i: attend(i, (14, 14), 0.3), i) for i in (inputs, inputs.to(torch.float32))
        )
        for name, mine, wide in zip(("dq", "dk", "dv"), half[1:4], single[1:4], strict=True):
            roundings = torch.finfo(dtype).eps / 2 * wide.abs() + torch.finfo(dtype).smallest_normal * 2.0**-10
            assert ((mine - wide).abs() <= roundings + 1e-6 * wide.abs().max()).all(), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("grid", [(3, 5), (14, 14)])
    def test_gradients_in_half_precision_err_by_two_roundings(self, grid, dtype):
        """Their own, and that of the map or the scores' gradients, by a unit roundoff of what these weigh."""
        inputs, scale = make_inputs(1, 2, grid, 13, dtype), 0.3
        q, k, v, pos_weight, gate, d_out = inputs.to(torch.float64)
        content = (q @ k.mT * scale).softmax(-1)
        position = ck.dense_position_table(pos_weight, grid)[..., : q.shape[2]].double()
        g = torch.sigmoid(gate)[:, None, None]
        d_content = (1 - g) * (d_out @ v.mT)
        d_scores = scale * content * (d_content - (content * d_content).sum(-1, keepdim=True))
        terms = ((d_scores, k), (d_scores.mT, q), (((1 - g) * content + g * position).mT, d_out))
        mine = with_gradients(lambda i: attend(i, grid, scale), inputs)[1:4]
        unit = torch.finfo(dtype).eps / 2
        for name, gradient, (left, right) in zip(("dq", "dk", "dv"), mine, terms, strict=True):
            exact, weighed = left @ right, left.abs() @ right.abs()
            smallest = torch.finfo(dtype).smallest_normal
            assert ((gradient - exact).abs() <= 1.01 * unit * (weighed + exact.abs()) + smallest).all(), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("grid", [(14, 14), (37, 45)])
    def test_the_rows_of_the_map_sum_to_one(self, grid, dtype):
        """Hundreds of weights that are rounded to nearest err by a small part of a step of one: by far less than half.

        Were they truncated, it would be most of a step.
        """
        inputs = make_inputs(1, 2, grid, 16, dtype, gate=-1.0)
        ones = torch.ones_like(inputs.v)
        inputs = inputs._replace(q=inputs.q / 2, v=ones, pos_weight=torch.zeros_like(inputs.pos_weight))
        assert torch.equal(attend(inputs, grid), ones)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_columns_of_the_map_are_not_truncated(self, dtype):
        """Summed by dv where d_out is one: rounded to nearest they err up and down, truncated by half a step down."""
        inputs = make_inputs(2, 2, (14, 14), 16, dtype, gate=-1.0)
        inputs = inputs._replace(q=inputs.q / 2, grad=torch.ones_like(inputs.grad))
        mine = with_gradients(lambda i: attend(i, (14, 14)), inputs)[3].double()
        exact = with_gradients(lambda i: eager_attention(i, (14, 14), 0.25), inputs.to(torch.float64))[3]
        assert (mine / exact - 1).mean().abs() < 0.2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("gate", [-40.0, 40.0])
    def test_a_softmax_in_float32(self, gate):
        """The map itself, by values that are an identity matrix, of content and of position.

        Logits are exact and differ by at most 2. Multiplied by log2(e), rounded, they err by 4 unit roundoffs of e, a
        polynomial of degree 5 by 4, the sum of 8 such numbers by 8 + 7, and at most six more operations by 6: 29.
        """
        tokens = 8
        q, k = torch.zeros(2, 64, 1, tokens, tokens)
        q[..., 0], k[..., 0] = 1, torch.randint(-64, 65, (64, 1, tokens)) / 64
        pos_weight, identity = torch.tensor([[1 / 8, 0, -1 / 64]]), torch.eye(tokens).expand_as(q)
        inputs = Inputs(q, k, identity, pos_weight, torch.full((1,), gate), identity)
        expected = eager_attention(inputs.to(torch.float64), (1, tokens), 1.0)
        torch.testing.assert_close(attend(inputs, (1, tokens), 1.0).double(), expected, rtol=29 * 2.0**-24, atol=1e-16)


@pytest.mark.usefixtures("instruction_set")
class TestBlocks:
    @EACH_DTYPE
    def test_several_in_every_accumulator(self, dtype):
        """So many images that the queries of each are not divided further: dk and dv add up over their blocks."""
        check((10, 15), dtype, batch=32, heads=1, head_dim=5, draws=1)

    @pytest.mark.usefixtures("many_tokens")
    @pytest.mark.parametrize("scale", [0.25, -0.25])
    def test_the_largest_logit_in_any_of_many_chunks(self, scale):
        """Chunks' largest differ so much that no exponential of another's is finite."""
        inputs = make_inputs(1, 1, MANY, 8, torch.float64, logits=1e4)
        found, expected = (function(inputs, MANY, scale) for function in (attend, eager_attention))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("cache", ["65536", "100000000", ""])
    def test_caches_of_any_size(self, cache, monkeypatch):
        monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
        check((14, 14), head_dim=16)
        check((30, 31), torch.bfloat16, batch=1, heads=1, head_dim=13, draws=1)

    @pytest.mark.usefixtures("many_tokens")
    def test_the_largest_logit_in_any_of_many_chunks_of_pairs(self):
        options = {"batch": 1, "heads": 1, "grid": MANY, "head_dim": 8, "dtype": torch.bfloat16, "logits": 1e4}
        inputs, expected = problem(0.25, True, draws=1, **options)
        assert_as_exact([attend(inputs, MANY, 0.25)], expected)

    @EACH_DTYPE
    def test_the_largest_logit_of_a_negative_scale(self, dtype):
        check((5, 7), dtype, head_dim=16, scale=-0.25, logits=1e4)


@pytest.mark.usefixtures("instruction_set")
class TestSubnormals:
    """Flushed to zero inside, where they cost some processors a hundred times as much, and nowhere else."""

    @pytest.fixture(params=[False, True], ids=["kept", "flushed"])
    def flushed(self, request):
        assert torch.set_flush_denormal(request.param)
        yield request.param
        torch.set_flush_denormal(False)

    @pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot flush on this processor")
    @EACH_DTYPE
    def test_the_caller_s_own_setting_survives(self, flushed, dtype):
        inputs = make_inputs(2, 2, (14, 14), 16, dtype)
        with_gradients(lambda i: attend(i, (14, 14)), inputs)
        assert ((torch.tensor([1e-39]) * 1).item() == 0) is flushed

    def test_no_thread_stays_changed(self):
        with_gradients(lambda i: attend(i, (14, 14)), make_inputs(4, 2, (14, 14), 16, torch.float32))
        assert (torch.full((1 << 20,), 1e-39) * 1 != 0).all()

    @EACH_DTYPE
    def test_results_are_flushed(self, dtype):
        inputs = make_inputs(1, 1, (3, 3), 16, dtype)
        inputs = inputs._replace(v=torch.full_like(inputs.v, 1e-39))
        assert (attend(inputs, (3, 3)) == 0).all()

    def test_subnormal_numbers_of_float16_are_read_as_they_are(self):
        bits = torch.arange(1, 1024, dtype=torch.int16)
        v = bits.view(torch.float16).reshape(1, 1, 1, -1)
        inputs = make_inputs(1, 1, (1, 1), v.shape[-1], torch.float16)._replace(v=v)
        assert torch.equal(attend(inputs, (1, 1)), v)


class TestMutants:
    """`make mutants` holds that each is noticed."""

    def test_the_sources_have_what_they_change_and_here_is_the_test_that_notices(self, tmp_path):
        shutil.copytree(Path(__file__).parent.parent / "csrc" / "attention", tmp_path / "attention")
        native_mutants.plant(tmp_path / "attention", native_mutants.MUTANTS, "op.cpp")
        for mutant in native_mutants.MUTANTS:
            name, test = mutant.test.split("::")
            assert hasattr(globals()[name], test), mutant.test


@pytest.mark.usefixtures("instruction_set")
class TestLayout:
    @EACH_DTYPE
    def test_any_strides(self, dtype):
        grid, shape = (4, 5), (2, 3, 20, 12)
        dense = make_inputs(2, 3, grid, 12, dtype)
        layouts = [
            lambda t: t.contiguous(),
            lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            lambda t: t.flip(0).contiguous().flip(0),
            lambda t: torch.stack((t, t), -1)[..., 1],
        ]
        expected = with_gradients(lambda i: attend(i, grid), dense)
        for layout in layouts:
            inputs = Inputs(*(layout(t) if t.shape == shape else t for t in dense))
            for mine, truth in zip(with_gradients(lambda i: attend(i, grid), inputs), expected, strict=True):
                assert torch.equal(mine, truth)

    @EACH_DTYPE
    def test_expanded_inputs_and_gradients(self, dtype):
        q, pos_weight, gate = torch.randn(1, 1, 1, 1), torch.randn(3).expand(2, 3), torch.randn(1).expand(2)
        q = q.to(dtype).expand(2, 2, 12, 5)
        inputs = Inputs(q, q, q, pos_weight, gate, torch.ones((), dtype=dtype).expand(2, 2, 12, 5))
        found = with_gradients(lambda i: attend(i, (3, 4)), inputs)
        expected = with_gradients(lambda i: attend(i, (3, 4)), Inputs(*(t.contiguous() for t in inputs)))
        assert all(torch.equal(mine, truth) for mine, truth in zip(found, expected, strict=True))

    def test_results_are_laid_out_for_the_output_projection(self):
        inputs = make_inputs(2, 3, (4, 5), 12)
        out, dq, dk, dv, *_ = with_gradients(lambda i: attend(i, (4, 5)), inputs)
        assert all(t.transpose(1, 2).is_contiguous() for t in (out, dq, dk, dv))

    def test_inputs_with_adjacent_channels_are_not_copied(self):
        inputs = make_inputs(2, 2, (8, 8), 16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with_gradients(lambda i: attend(i, (8, 8)), inputs)
        assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::contiguous", "aten::clone"}


@pytest.mark.usefixtures("instruction_set")
class TestThreads:
    @pytest.mark.parametrize(
        "shape", [(5, 3, (7, 9), 20), (1, 1, (16, 20), 48), (1, 2, (1, 3), 5), (1, 1, (41, 40), 6)]
    )
    @EACH_DTYPE
    def test_the_same_bits_on_any_number(self, threads, shape, dtype):
        batch, heads, grid, head_dim = shape
        inputs = make_inputs(batch, heads, grid, head_dim, dtype)
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(with_gradients(lambda i: attend(i, grid), inputs))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @EACH_DTYPE
    def test_images_do_not_change_one_another(self, dtype):
        inputs = make_inputs(3, 2, (5, 6), 16, dtype)
        one = Inputs(*(t[1:2] if t.dim() == 4 else t for t in inputs))
        assert torch.equal(attend(inputs, (5, 6))[1:2], attend(one, (5, 6)))


class TestOperator:
    def arguments(self, dtype=torch.float32):
        inputs = make_inputs(2, 3, (3, 4), 8, dtype)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:5]]
        return leaves, (3, 4, 0.5, 0.0, None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opcheck(self, dtype):
        leaves, settings = self.arguments(dtype)
        torch.library.opcheck(torch.ops.convit_kernels.gated_attention.default, (*leaves, *settings, True))
        out, lse, content = ops.gated_attention(*leaves, *settings, True)
        detached = [t.detach() for t in leaves]
        arguments = (torch.randn_like(out), *detached[:3], content.detach(), lse.detach(), *detached[3:], *settings)
        torch.library.opcheck(torch.ops.convit_kernels.gated_attention_backward.default, arguments)

    @pytest.mark.usefixtures("instruction_set")
    @pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
    def test_the_log_sum_exp(self, dtype, error):
        (q, k, v, *parameters), settings = self.arguments(dtype)
        parameters = [parameter.float() for parameter in parameters]
        _, lse, content = ops.gated_attention(q, k, v, *parameters, *settings, True)
        torch.testing.assert_close(lse, (0.5 * q.float() @ k.float().mT).logsumexp(-1), rtol=1e-6, atol=error)
        assert content.numel() == 0
        assert ops.gated_attention(q, k, v, *parameters, *settings, False)[1].numel() == 0

    def test_only_the_output_is_differentiable(self):
        """What is kept for the backward has no gradient of its own, and says so."""
        leaves, settings = self.arguments()
        out, lse, content = ops.gated_attention(*leaves, *settings, True)
        assert [result.requires_grad for result in (out, lse, content)] == [True, False, False]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"height": 4}, "height \\* width must be the number of tokens"),
            ({"height": 2**40, "width": 2**40}, "the grid must"),
            ({"dropout_p": 0.5}, "no dropout"),
            ({"k": torch.randn(2, 3, 12, 7)}, "k must have q's shape"),
            ({"v": torch.randn(2, 3, 12, 8).double()}, "v must have q's dtype"),
            ({"q": torch.randn(2, 12, 8)}, "q must have shape"),
            ({"pos_weight": torch.randn(3, 3).double()}, "pos_weight must be float64 where q is"),
            ({"pos_weight": torch.randn(3, 2)}, "pos_weight must have shape"),
            ({"gate": torch.randn(2)}, "gate must have shape"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, text):
        q = torch.randn(2, 3, 12, 8)
        arguments = {"q": q, "k": q, "v": q, "pos_weight": torch.randn(3, 3), "gate": torch.randn(3), "height": 3}
        arguments |= {"width": 4, "scale": 0.5, "dropout_p": 0.0, "philox": None, "need_grad": False} | changes
        with pytest.raises(RuntimeError, match=text):
            torch.ops.convit_kernels.gated_attention(*arguments.values())

    def test_compiled_in_one_graph(self):
        inputs = make_inputs(2, 2, (3, 4), 8)
        compiled = torch.compile(lambda i: attend(i, (3, 4)), fullgraph=True, backend="aot_eager")
        ours, expected = (with_gradients(f, inputs) for f in (compiled, lambda i: attend(i, (3, 4))))
        assert all(torch.equal(mine, truth) for mine, truth in zip(ours, expected, strict=True))


class TestChoice:
    def test_it_is_the_fastest_on_a_cpu(self):
        inputs = make_inputs(2, 2, (3, 4), 8)
        chosen = ck.gpsa_attention(*inputs[:5], grid_size=(3, 4))
        assert torch.equal(chosen, attend(inputs, (3, 4)))
        assert not torch.equal(chosen, ck.gpsa_attention(*inputs[:5], grid_size=(3, 4), backend="composite"))

    def test_dropout_goes_to_the_reference_where_no_backend_is_asked_for(self):
        inputs = make_inputs(2, 2, (3, 4), 8)
        results = []
        for backend in ("reference", None):
            torch.manual_seed(5)
            results.append(ck.gpsa_attention(*inputs[:5], grid_size=(3, 4), dropout_p=0.4, backend=backend))
        assert torch.equal(*results)
        with pytest.raises(RuntimeError, match="the kernels have no dropout"):
            ck.gpsa_attention(*inputs[:5], grid_size=(3, 4), dropout_p=0.4, backend="cpu")

    @pytest.mark.parametrize("bytes", ["large", "0", "-1", "1e6"])
    def test_a_cache_that_is_no_size_is_refused(self, bytes, monkeypatch):
        monkeypatch.setenv("CONVIT_KERNELS_L2", bytes)
        with pytest.raises(RuntimeError, match=f"CONVIT_KERNELS_L2={bytes}: give the bytes of a core's second-level"):
            attend(make_inputs(1, 1, (2, 2), 4), (2, 2))

    @pytest.mark.parametrize("name", ["avx1024", "AVX2"])
    def test_an_unknown_instruction_set_is_refused_with_those_there_are(self, name, monkeypatch):
        monkeypatch.setenv("CONVIT_KERNELS_ISA", name)
        inputs = make_inputs(1, 1, (2, 2), 4)
        with pytest.raises(RuntimeError, match=f"CONVIT_KERNELS_ISA={name}.*only .*portable"):
            attend(inputs, (2, 2))
        with pytest.raises(RuntimeError, match=f"CONVIT_KERNELS_ISA={name}"):
            extension.instruction_set()
