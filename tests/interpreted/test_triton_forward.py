"""The fused forward kernel in Triton's interpreter, held to convit_kernels.equivalence."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equivalence import assert_as_exact
from interpreter import load_kernels  # before triton
from mutants import FORWARD
from torch import Tensor

from convit_kernels.equivalence import Expected, eager_attention, expected, expected_attention, relative_indices
from convit_kernels.triton import common, forward
from convit_kernels.triton.configs import Config
from tools.machine_code.baseline import content_forward

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED, OFFSET = 0x123456789ABCDEF, 77


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the launcher."""

    grid: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    regime: str = "dense"
    block: tuple[int, int] = (32, 32)
    batch: int = 1
    gates: tuple[float, ...] = (0.6, -1.1)
    dropout_p: float = 0.0
    logits: float = 1.0
    sign: float = 1.0

    @property
    def id(self) -> str:
        name = f"{self.grid[0]}x{self.grid[1]}-{str(self.dtype)[6:]}-{self.head_dim}-{self.regime}"
        name += f"-drop{self.dropout_p}" if self.dropout_p else ""
        return name + (f"-logits{self.sign * self.logits:g}" if self.sign * self.logits != 1 else "")


# Cheap ones first: a mutant stops at the first that fails. Every value of a dimension meets most values of the others.
CASES = [
    Case((1, 1), FP32, 48, batch=2),
    Case((1, 1), BF16, 16, "factored"),
    Case((1, 7), FP16, 48, "factored", batch=2),
    Case((1, 7), FP32, 33, gates=(40.0, 0.3, -40.0)),
    Case((1, 1), FP32, 48, batch=4, logits=1e4),
    Case((5, 9), FP32, 16, "factored", (64, 16), gates=(0.6,)),
    Case((3, 5), FP32, 48, "factored", (16, 16), gates=(40.0, 0.3, -40.0), sign=-1.0),
    Case((3, 5), BF16, 80, batch=3),
    Case((3, 5), FP32, 96, "factored", (16, 16), dropout_p=0.25),
    Case((3, 5), FP16, 24, logits=1e4),
    Case((3, 5), BF16, 256, "factored"),
    Case((3, 5), FP32, 128, sign=0.0),
    Case((3, 7), FP32, 48, "factored", (16, 16), logits=1e4),
    Case((7, 5), FP32, 48, "dense", (16, 16), batch=2, dropout_p=0.4),
    Case((8, 18), BF16, 64, "factored", (64, 16), gates=(0.6,)),
    Case((18, 8), FP32, 40, "factored", (64, 32), gates=(0.6,), batch=2),
    Case((8, 18), FP16, 48, "dense", (64, 64), gates=(40.0, -40.0)),
    Case((8, 18), BF16, 48, "factored", (64, 64), gates=(0.6,), dropout_p=0.1),
    Case((14, 14), BF16, 48, "dense", (64, 32), batch=2),
    Case((14, 14), FP32, 48, "dense", (64, 64), gates=(0.6,), dropout_p=0.1, sign=-1.0),
    Case((14, 14), FP16, 64, "factored", (128, 64), gates=(2.0,), logits=1e2),
    Case((17, 31), FP32, 32, "factored", (128, 64), gates=(0.6,)),
    Case((17, 31), BF16, 48, "dense", (128, 64), gates=(0.6,)),
]


def factors(pos_weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Py and Px in float64 from their definition."""
    tables = []
    for size, linear in ((grid[0], pos_weight[:, 1]), (grid[1], pos_weight[:, 0])):
        position = torch.arange(size, dtype=torch.float64)
        delta = position[None, :] - position[:, None]
        tables.append(torch.softmax(linear[:, None, None] * delta + pos_weight[:, 2, None, None] * delta**2, -1))
    return tables[0], tables[1]


def philox(seed: int, *counter: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011), written from the paper."""
    c = [np.asarray(word).astype(np.uint64) for word in counter]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def keep_mask(batch: int, heads: int, tokens: int, dropout_p: float) -> Tensor:
    """The mask that `common.keep_mask` defines."""
    column = np.arange(tokens)
    words = philox(
        SEED, *np.broadcast_arrays(
            column // 4, np.arange(tokens)[:, None], np.arange(batch * heads)[:, None, None], np.uint64(OFFSET)
        )
    )  # fmt: skip
    word = np.choose(column % 4, words)
    return torch.from_numpy((word >> np.uint64(1)) >= np.uint64(np.float32(dropout_p) * 2**31)).view(
        batch, heads, tokens, tokens
    )


def inputs(case: Case) -> tuple[Tensor, ...]:
    """q, k, v, all views of larger tensors with other things around them, the weights and the gates."""
    generator = torch.Generator().manual_seed(len(case.id) + case.head_dim)
    tokens, heads = case.grid[0] * case.grid[1], len(case.gates)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    qk = random(case.batch, tokens, 2, heads, case.head_dim).to(case.dtype)  # as a linear layer makes it
    q, k = qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2)
    v = random(heads + 1, case.batch + 1, tokens + 2, case.head_dim + 3).to(case.dtype)[1:, 1:, 2:, 3:].transpose(0, 1)
    # of the dtype's precision, so that eager's positions are as exact as ours
    pos_weight, gate = (0.3 * random(heads, 3)).to(case.dtype), torch.tensor(case.gates, dtype=case.dtype)
    return q, k, v, pos_weight.double(), gate.float()


def call(launcher: Callable[..., Any], case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Run the launcher with the tables of the case's regime."""
    q, k, v, pos_weight, gate = tensors
    row_table, col_table = factors(pos_weight, case.grid)
    if case.regime == "dense":
        tokens = q.shape[2]
        table = torch.zeros(len(gate), tokens, common.padded(tokens), dtype=q.dtype)
        table[:, :, :tokens] = kronecker(row_table, col_table)
        tables = {"table": table}
    else:
        tables = {"row_table": row_table.float().contiguous(), "col_table": col_table.float().contiguous()}
    scale = case.sign * case.logits * case.head_dim**-0.5
    seed = torch.tensor([SEED, OFFSET]) if case.dropout_p else None
    return launcher(
        q,
        k,
        v,
        gate,
        case.grid,
        scale,
        **tables,
        dropout_p=case.dropout_p,
        philox=seed,
        need_grad=True,
        config=Config(*case.block, 4, 2),
    )


def kronecker(row_table: Tensor, col_table: Tensor) -> Tensor:
    """P (H, N, N) of its factors."""
    return torch.einsum("hab,hcd->hacbd", row_table, col_table).flatten(3, 4).flatten(1, 2)


def check(launcher: Callable[..., Any], case: Case) -> None:
    """The rule of equivalence for one case: out, lse and the content's own part."""
    tensors = inputs(case)
    out, lse, content = call(launcher, case, tensors)
    q, k, v, pos_weight, gate = tensors
    scale = case.sign * case.logits * case.head_dim**-0.5
    keep = None
    if case.dropout_p:
        keep = keep_mask(case.batch, len(gate), q.shape[2], case.dropout_p) / (1 - case.dropout_p)
    assert out.dtype == case.dtype and out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    assert_as_exact([out], expected_attention(*tensors, None, case.grid, scale=scale, keep=keep))
    some = gate < 30  # the other heads skip content
    assert_as_exact({"lse": lse[:, some]}, log_sum_exp(q[:, some], k[:, some], scale))
    assert torch.all(lse[:, ~some] == torch.inf)
    if some.any():
        closed = torch.full_like(gate[some], -1e4)
        of_content = (q[:, some], k[:, some], v[:, some], pos_weight[some], closed)
        masked = None if keep is None else keep[:, some]
        rule = expected_attention(*of_content, None, case.grid, scale=scale, keep=masked)
        assert_as_exact([content[:, some]], rule)
    assert torch.all(content[:, ~some] == 0)


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> dict[str, Expected]:
    """What the content's log-sum-exp, (B, H, N) in float32, is held to."""
    return expected(lambda dtype: {"lse": torch.logsumexp((q.to(dtype) @ k.to(dtype).mT) * scale, -1)}, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_dense(case: Case) -> None:
    check(forward.forward, case)


def test_the_baseline_is_right() -> None:
    case = Case((3, 7), FP32, 48, block=(16, 16))
    q, k, v, pos_weight, gate = inputs(case)
    out, lse = content_forward(q, k, v, 0.2, Config(16, 16, 4, 2), need_lse=True)
    closed = torch.full_like(gate, -1e4)
    assert_as_exact([out], expected_attention(q, k, v, pos_weight, closed, None, case.grid, scale=0.2))
    assert_as_exact({"lse": lse}, log_sum_exp(q, k, 0.2))


def test_what_the_backward_reads_only_when_needed() -> None:
    case = CASES[2]
    q, k, v, pos_weight, gate = inputs(case)
    row_table, col_table = (table.float().contiguous() for table in factors(pos_weight, case.grid))
    out, *saved = forward.forward(
        q, k, v, gate, case.grid, 0.1, row_table=row_table, col_table=col_table, config=Config(32, 32, 4, 2)
    )
    assert saved == [None, None] and out.isfinite().all()


@np.errstate(all="ignore")
def check_special_values(launcher: Callable[..., Any]) -> None:
    """NaN and infinities come out where the dense formula has them."""
    case = Case((3, 7), FP32, 48, block=(16, 16), gates=(0.5,))
    for place, index, value in (
        ("q", (0, 0, 5, 40), torch.nan),
        ("k", (0, 0, 20, 3), torch.nan),
        ("k", (0, 0, 18, 3), torch.inf),
        ("v", (0, 0, 2, 7), torch.nan),
        ("v", (0, 0, 20, 47), -torch.inf),
        ("k", (0, 0, slice(0, 16), 0), -torch.inf),  # whole tiles of -inf logits, where q > 0
        ("k", (0, 0, slice(16, 21), 0), -torch.inf),
        ("k", (0, 0, slice(None), 0), -torch.inf),
    ):
        q, k, v, pos_weight, gate = inputs(case)
        q[..., 0] = q[..., 0].abs() + 0.1 if isinstance(index[2], slice) else q[..., 0]
        {"q": q, "k": k, "v": v}[place][index] = value
        out, *_ = call(launcher, case, (q, k, v, pos_weight, gate))
        features = relative_indices(case.grid, q)
        eager = eager_attention(q, k, v, pos_weight.float(), gate, features, case.head_dim**-0.5)
        assert torch.allclose(out, eager, atol=1e-5, equal_nan=True), f"{place}{index} = {value}"


def test_special_values() -> None:
    check_special_values(forward.forward)


def test_the_largest_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,536 tokens, from the factors. The interpreter needs minutes for all rows, so two programs run."""
    programs, kernel = 2, forward.forward_kernel
    case = Case((256, 256), FP32, 16, "factored", (32, 4096), gates=(0.6,))

    class FirstPrograms:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            assert grid == (65536 // 32, 1)
            return kernel[programs, 1]

    monkeypatch.setattr(forward, "forward_kernel", FirstPrograms())
    tensors = inputs(case)
    out, lse, _ = call(forward.forward, case, tensors)
    q, k, v, pos_weight, gate = tensors
    q = q[:, :, : programs * 32]
    # the first rows of the position map: all lie in the grid's first row
    row_table, col_table = factors(pos_weight, case.grid)
    position = torch.einsum("hb,hcd->hcbd", row_table[:, 0], col_table[:, : programs * 32]).flatten(2)
    scale, g = case.head_dim**-0.5, torch.sigmoid(gate.double())

    def rows(dtype: torch.dtype) -> dict[str, Tensor]:
        content = torch.softmax(q.to(dtype) @ k.to(dtype).mT * scale, -1)
        return {"out": ((1 - g).to(dtype) * content + (g * position).to(dtype)) @ v.to(dtype)}

    assert_as_exact([out[:, :, : programs * 32]], expected(rows, FP32, draws=1))
    assert_as_exact({"lse": lse[:, :, : programs * 32]}, log_sum_exp(q, k, scale))


def test_mask_of_dropout() -> None:
    keep = keep_mask(3, 4, 144, 0.3).double()
    deviation = (0.3 * 0.7 / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - 0.7) < 5 * deviation
    flat = keep.flatten(0, 1) - 0.7
    for other in (flat.roll(1, 0), flat.roll(1, 1), flat.roll(1, 2), flat.mT):  # neighbours are independent
        assert abs((flat * other).mean().item()) < 0.01


def test_published_philox() -> None:
    """The known answer of Random123 for the counter and the key of zeros."""
    words = [word.item() for word in philox(0, *(np.zeros(1, dtype=np.uint64) for _ in range(4)))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_head_dims_are_cut_without_waste() -> None:
    expected = {
        16: (16,),
        48: (32, 16),
        64: (64,),
        80: (64, 16),
        96: (64, 32),
        1: (16,),
        33: (32, 16),
        100: (128,),
        256: (256,),
    }
    assert {head_dim: common.split_head_dim(head_dim) for head_dim in expected} == expected
    for head_dim in (0, 257):
        with pytest.raises(ValueError, match="head_dim"):
            common.split_head_dim(head_dim)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid_size": (2, 7)}, "tokens"),
        ({"row_table": None}, "either table"),
        ({"table": torch.empty(2, 7, 16)}, "either table"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"dropout_p": 0.1}, "philox"),
        ({"q": torch.empty(1, 2, 48, 7).mT}, "stride"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    q = torch.empty(1, 2, 7, 48)
    arguments: dict[str, Any] = {"q": q, "k": q, "v": q, "gate": torch.zeros(2), "grid_size": (1, 7), "scale": 0.1}
    arguments |= {"row_table": torch.empty(2, 1, 1), "col_table": torch.empty(2, 7, 7)}
    with pytest.raises(ValueError, match=message):
        forward.forward(**(arguments | change))


@pytest.mark.parametrize("number", range(len(FORWARD)))
def test_mutants_are_noticed(number: int, tmp_path: Path) -> None:
    name, right, wrong = FORWARD[number]
    folder = tmp_path / "triton"
    shutil.copytree(Path(forward.__file__).parent, folder)
    source = (folder / name).read_text()
    assert right in source, "the kernels no longer have what this mutant changes"
    (folder / name).write_text(source.replace(right, wrong))
    launcher = load_kernels(folder, f"mutant_forward_{number}").forward.forward
    with pytest.raises(AssertionError):
        for case in CASES[:14]:
            check(launcher, case)
        check_special_values(launcher)
