"""The fused backward kernels in Triton's interpreter, held to convit_kernels.equivalence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from equivalence import assert_as_exact
from mutants_backward import BACKWARD
from torch import Tensor

from convit_kernels.equivalence import Expected, expected_attention
from tools.machine_code.baseline import content_backward

FOLDER = Path(__file__).resolve().parents[2] / "convit_kernels" / "triton"
kernels = interpreter.load_kernels(FOLDER, "interpreted_backward")
keep_mask = kernels.common.keep_mask
dropout_threshold = kernels.common.dropout_threshold
Config = kernels.backward.Config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("dq", "dk", "dv", "d_gate", "d_pos_weight")


@triton.jit
def mask_kernel(philox_ptr, keep_ptr, dropout_p, num_tokens, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    keep = keep_mask((philox_ptr, tl.program_id(0), dropout_threshold(dropout_p)), rows, 0, BLOCK)
    ptrs = keep_ptr + (tl.program_id(0) * num_tokens + rows[:, None]) * num_tokens + rows[None, :]
    tl.store(ptrs, keep.to(tl.float32), mask=(rows[:, None] < num_tokens) & (rows[None, :] < num_tokens))


def factor(weight: Tensor, size: int) -> Tensor:
    """One factor (H, size, size) of P in float64, from (H, 2) weights of the offset and its square."""
    place = torch.arange(size, dtype=torch.float64)
    offset = place[None] - place[:, None]
    return (weight[:, 0, None, None] * offset + weight[:, 1, None, None] * offset**2).softmax(-1)


class Problem:
    """Inputs in one dtype, every tensor a slice or a transpose of a larger one, and what the kernels need beside
    them."""

    def __init__(
        self,
        grid: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        *,
        batch: int = 3,
        heads: int = 1,
        gates: list[float] | None = None,
        looking: tuple[float, float, float] | None = None,
        logits: float = 1.0,
        common: float = 0.0,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(grid[0] * 1000 + grid[1] * 10 + head_dim)
        tokens = grid[0] * grid[1]
        heads = heads if gates is None else len(gates)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.grid, self.dtype, self.dropout_p = grid, dtype, dropout_p
        self.scale = head_dim**-0.5 if scale is None else scale
        qkv = randn(batch, tokens + 1, 3, heads, head_dim + 8).to(dtype)[:, 1:, ..., :head_dim]
        qkv[:, :, 0] *= logits
        qkv[:, :, 2] += common
        self.q, self.k, self.v = qkv.permute(2, 0, 3, 1, 4)
        self.d_out = randn(batch, heads, tokens, 2 * head_dim).to(dtype)[..., head_dim:]
        # of the dtype's precision, so that eager's positions are as exact as ours
        self.gate = (randn(heads) if gates is None else torch.tensor(gates)).to(dtype).float()
        pos_weight = 0.4 * randn(len(self.gate), 3)
        pos_weight[:, 2] = -0.2 - pos_weight[:, 2].abs()
        if looking is not None:  # at the offset (x, y), so sharply
            x, y, strength = looking
            pos_weight[:] = strength * torch.tensor([2 * x, 2 * y, -1.0])
        self.pos_weight = pos_weight.to(dtype).float()
        w = self.pos_weight.double()
        row_factor, col_factor = factor(w[:, [1, 2]], grid[0]), factor(w[:, [0, 2]], grid[1])
        self.row_table, self.col_table = row_factor.float(), col_factor.float()
        dense = torch.einsum("hab,hcd->hacbd", row_factor, col_factor).reshape(len(w), tokens, tokens)
        self.table = torch.zeros(len(w), tokens, kernels.common.padded(tokens), dtype=dtype)
        self.table[:, :, :tokens] = dense
        self.philox = torch.tensor([1234567, 89])
        self.keep: Tensor | None = None
        if dropout_p > 0.0:
            self.keep = torch.full((batch, heads, tokens, tokens), torch.nan)
            block = triton.next_power_of_2(max(tokens, 16))
            mask_kernel[batch * heads,](self.philox, self.keep, dropout_p, tokens, BLOCK=block)

    def saved(self) -> tuple[Tensor, Tensor]:
        """What the forward pass keeps, C V under the dropout mask and lse, rounded from float64."""
        logits = (self.q.double() @ self.k.double().transpose(-1, -2)) * self.scale
        content = logits.softmax(-1)
        if self.keep is not None:
            content = content * self.keep / (1 - self.dropout_p)
        return (content @ self.v.double()).to(self.dtype), logits.logsumexp(-1).float()

    def largest_logit(self) -> float:
        return ((self.q.double() @ self.k.double().transpose(-1, -2)) * self.scale).abs().max().item()

    @cached_property
    def expected(self) -> dict[str, Expected]:
        keep = None if self.keep is None else self.keep / (1 - self.dropout_p)
        inputs = (self.q, self.k, self.v, self.pos_weight, self.gate, self.d_out, self.grid)
        return expected_attention(*inputs, scale=self.scale, keep=keep, recomputed=False)

    def hold(self, gradients: tuple[Tensor, ...]) -> None:
        """Holds gradients to the rule."""
        dtypes = (self.q.dtype,) * 3 + (torch.float32,) * 2
        assert tuple(gradient.dtype for gradient in gradients) == dtypes[: len(gradients)]
        assert_as_exact(dict(zip(NAMES, gradients, strict=False)), self.expected)

    def fused(
        self,
        content: Tensor,
        lse: Tensor,
        *,
        dense: bool,
        blocks: tuple[int, int] = (32, 64),
        kv: tuple[int, int] | None = None,
        backward: Callable[..., tuple[Tensor, ...]] = kernels.backward.backward,
    ) -> tuple[Tensor, ...]:
        config = Config(*blocks, 4, 1)
        return backward(
            self.d_out, self.q, self.k, self.v, content, lse, self.pos_weight, self.gate, self.grid, self.scale,
            table=self.table if dense else None, row_table=None if dense else self.row_table, col_table=None if dense
            else self.col_table, dropout_p=self.dropout_p, philox=self.philox if self.dropout_p > 0.0 else None,
            configs=(config, Config(*(kv or blocks), 4, 1), config),
        )  # fmt: skip

    def check(self, **options: Any) -> tuple[Tensor, ...]:
        """The fused gradients, held to the rule."""
        fused = self.fused(*self.saved(), **options)
        self.hold(fused)
        return fused


def large_logits(dtype: torch.dtype) -> Problem:
    """Logits of 1e4 from small integers: their products are exact in whatever order they are summed, as the eager
    formula and each kernel does in its own. So what is left is what the softmax makes of such logits."""
    problem = Problem((3, 5), 48, dtype, logits=40.0, scale=0.5)
    problem.q, problem.k = problem.q.round(), (40 * problem.k).round()
    return problem


def far(dtype: torch.dtype) -> Problem:
    """A head that looks at tokens far from the query, and sharply: of logits from the query's own place all would be
    lost to rounding."""
    return Problem((3, 9), 48, dtype, looking=(-6.0, 1.0, 2.0))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factored"])
@pytest.mark.parametrize(("grid", "head_dim"), [((1, 1), 16), ((1, 7), 80), ((3, 5), 64), ((6, 7), 48), ((7, 1), 24)])
def test_gradients(dtype: torch.dtype, dense: bool, grid: tuple[int, int], head_dim: int) -> None:
    problem = Problem(grid, head_dim, dtype, heads=2 if dense else 1)
    problem.check(dense=dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "head_dim", "dense"), [((14, 14), 48, True), ((8, 18), 64, True), ((8, 18), 16, False)], ids=str
)
def test_gradients_of_many_tiles(dtype: torch.dtype, grid: tuple[int, int], head_dim: int, dense: bool) -> None:
    Problem(grid, head_dim, dtype).check(dense=dense, blocks=(128, 64), kv=(64, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factored"])
def test_dropout(dtype: torch.dtype, dense: bool) -> None:
    problem = Problem((3, 7), 48, dtype, dropout_p=0.3)
    assert problem.keep is not None and 0.2 < 1 - problem.keep.mean() < 0.4
    problem.check(dense=dense, blocks=(16, 32), kv=(16, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", [[-30.0, 30.0], [-100.0, 100.0], [-6.0, 6.0]], ids=str)
def test_saturated_gates(dtype: torch.dtype, gates: list[float]) -> None:
    fused = Problem((3, 5), 16, dtype, gates=gates).check(dense=True)
    if abs(gates[0]) > 10:
        assert fused[3].abs().max() < 1e-8  # nothing moves a gate that far out
        assert fused[4][0].abs().max() < 1e-8 and fused[4][1].abs().max() > 1e-2
        assert fused[0][:, 1].float().abs().max() < 1e-8 and fused[0][:, 0].abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype: torch.dtype) -> None:
    problem = large_logits(dtype)
    assert 5e3 < problem.largest_logit() < 2e4
    problem.check(dense=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.2, 0.0], ids=str)
def test_any_scale(dtype: torch.dtype, scale: float) -> None:
    Problem((3, 5), 16, dtype, scale=scale).check(dense=True)


def check_common_part(dtype: torch.dtype, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """All dA of a row share a large part that the softmax's gradient must take out exactly: a row of dS sums to zero.

    So do the keys' gradients, whatever the content that was saved had lost in half precision, up to their own rounding.
    """
    problem = Problem((3, 5), 48, dtype, common=20.0)
    dk = problem.check(dense=True, backward=backward)[1]
    left = dk.double().sum(2).abs().max().item()
    allowed = torch.finfo(dtype).eps * dk.shape[2] ** 0.5 * dk.abs().max().item()
    assert dtype == torch.float32 or left <= allowed, f"the sum of dK is {left:.3e}, not {allowed:.3e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_with_a_common_part(dtype: torch.dtype) -> None:
    check_common_part(dtype, kernels.backward.backward)


@pytest.mark.parametrize("programs", [1, 5, 10**6])
def test_the_share_of_a_position_program(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs sum over all images and keys, many over one image and one tile each."""
    monkeypatch.setattr(kernels.backward, "POSITION_PROGRAMS", programs)
    Problem((4, 9), 16, torch.float32).check(dense=True, blocks=(16, 16))
    Problem((3, 7), 16, torch.float32, dropout_p=0.2).check(dense=False, blocks=(16, 16))


@pytest.mark.parametrize("blocks", [((16, 64), (64, 16)), ((64, 16), (16, 64)), ((32, 16), (64, 32))], ids=str)
def test_any_tile_shape(blocks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    Problem((5, 7), 48, torch.float32).check(dense=True, blocks=blocks[0], kv=blocks[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", [[0.5, -1.0], [-40.0, 40.0]], ids=str)
def test_after_the_fused_forward(dtype: torch.dtype, gates: list[float]) -> None:
    problem = Problem((3, 5), 48, dtype, gates=gates, dropout_p=0.25)
    _, lse, content = kernels.forward.forward(
        problem.q, problem.k, problem.v, problem.gate, problem.grid, problem.scale,
        table=problem.table, dropout_p=0.25, philox=problem.philox, need_grad=True, config=Config(16, 16, 4, 1),
    )  # fmt: skip
    problem.hold(problem.fused(content, lse, dense=True))


def test_ten_runs_give_the_same_bits() -> None:
    problem = Problem((3, 5), 16, torch.bfloat16, batch=2, dropout_p=0.1)
    content, lse = problem.saved()
    runs = [problem.fused(content, lse, dense=True, blocks=(16, 16)) for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))
    assert "atomic_" not in (FOLDER / "backward.py").read_text()


@pytest.mark.xfail(strict=True, reason="another order of a float32 sum gives other bits; so the test above can fail")
def test_another_order_of_the_images_gives_the_same_bits() -> None:
    problem = Problem((5, 7), 16, torch.float32, batch=5, heads=4)
    content, lse = problem.saved()
    first = problem.fused(content, lse, dense=True)
    problem.q, problem.k, problem.v, problem.d_out = (
        x.flip(0) for x in (problem.q, problem.k, problem.v, problem.d_out)
    )
    again = problem.fused(content.flip(0), lse.flip(0), dense=True)
    assert torch.equal(first[4], again[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_baseline_is_right(dtype: torch.dtype) -> None:
    """Content-only attention, whose instructions the fused kernels are compared with, must be a true flash
    attention."""
    problem = Problem((5, 7), 48, dtype, gates=[-200.0, -200.0])
    out, lse = problem.saved()  # the gates are closed
    config = Config(32, 16, 4, 1)
    fused = content_backward(
        problem.d_out,
        problem.q,
        problem.k,
        problem.v,
        out,
        lse,
        problem.scale,
        configs=(config, config),
    )
    problem.hold(fused)


def test_coordinates_are_exact() -> None:
    """The float arithmetic of `coordinates`, for every token and width that the kernels may meet."""
    token = torch.arange(65536, dtype=torch.float32)
    for width in [*range(1, 20), 28, 49, 97, 181, 255, 256, 257, 999, 4099, 32768, 65536]:
        y = ((token + 0.5) * torch.tensor(1.0 / width, dtype=torch.float32)).floor()
        assert torch.equal(y, torch.arange(65536).div(width, rounding_mode="floor").float()), width


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_looks_far_away(dtype: torch.dtype) -> None:
    far(dtype).check(dense=True)


def test_arguments_that_do_not_fit() -> None:
    problem = Problem((3, 5), 16, torch.float32)
    good = (problem.d_out, problem.q, problem.k, problem.v, *problem.saved(), problem.pos_weight, problem.gate)
    tables = {"table": problem.table}
    backward = kernels.backward.backward
    with pytest.raises(ValueError, match="4 x 4 grid"):
        backward(*good, (4, 4), 1.0, **tables)
    with pytest.raises(ValueError, match="either table"):
        backward(*good, (3, 5), 1.0, row_table=problem.row_table, col_table=problem.col_table, **tables)
    with pytest.raises(ValueError, match="philox"):
        backward(*good, (3, 5), 1.0, dropout_p=0.5, **tables)
    with pytest.raises(ValueError, match="dropout_p"):
        backward(*good, (3, 5), 1.0, dropout_p=1.0, **tables)
    with pytest.raises(ValueError, match="last stride"):
        backward(problem.d_out.transpose(-1, -2).contiguous().transpose(-1, -2), *good[1:], (3, 5), 1.0, **tables)


@pytest.mark.parametrize("number", range(len(BACKWARD)))
def test_mutants_are_noticed(number: int, tmp_path: Path) -> None:
    name, right, wrong = BACKWARD[number]
    folder = tmp_path / "triton"
    shutil.copytree(FOLDER, folder)
    source = (folder / name).read_text()
    assert right in source, "the kernels no longer have what this mutant changes"
    (folder / name).write_text(source.replace(right, wrong))
    mutant = interpreter.load_kernels(folder, f"mutant_backward_{number}").backward
    mutant.POSITION_PROGRAMS = 1  # every loop runs
    with pytest.raises(AssertionError):
        for dtype, dropout_p in (
            (torch.float32, 0.0),
            (torch.float16, 0.0),
            (torch.float32, 0.3),
            (torch.float16, 0.3),
        ):
            problem = Problem((3, 5), 48, dtype, batch=2, dropout_p=dropout_p)
            problem.check(dense=True, blocks=(16, 16), backward=mutant.backward)
        check_common_part(torch.bfloat16, mutant.backward)
        for problem in (large_logits(torch.float32), far(torch.float32)):
            problem.check(dense=True, backward=mutant.backward)
