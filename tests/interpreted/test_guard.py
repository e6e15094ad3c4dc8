"""The guard of the interpreter sees each kind of fault: in small kernels, and in copies of the package's with a fault
of memory or order. The package's own have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from guard import MemoryFaultError, watching
from mutants import plant
from mutants_memory import LANES, MEMORY, NEVER, NEW, RACE, READ, TWO, WRITE, Mutant
from test_triton_backward import Problem
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from convit_kernels.triton import backward, forward
from convit_kernels.triton.configs import Config

pytestmark = pytest.mark.interpreter
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@triton.jit
def load(ptrs):
    return tl.load(ptrs)


@triton.jit
def copy(x_ptr, y_ptr, read, write, program, lane):
    """Four elements a program; where, in elements: ``program`` from one program to the next, ``lane`` to lane."""
    place = tl.program_id(0) * program + tl.arange(0, 4) * lane
    tl.store(y_ptr + place + write, load(x_ptr + place + read))


@triton.jit
def copy_in_tuples(tensors, places):
    (x_ptr, y_ptr), (read, write) = tensors, places
    place = tl.arange(0, 4)
    tl.store(y_ptr + place + write, tl.load(x_ptr + place + read))


@triton.jit
def in_place(x_ptr):
    place = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + 1)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + 1)


@triton.jit
def count(x_ptr):
    tl.atomic_add(x_ptr, 1)


class Pointers(NamedTuple):
    x: Tensor
    y: Tensor


def faults(launch: Callable[[], Any]) -> set[tuple[str, str]]:
    """Kind and argument of each."""
    with pytest.raises(MemoryFaultError), watching() as guard:
        launch()
    return {(fault.kind, fault.argument) for fault in guard.faults}


def middle() -> Tensor:
    """8 elements, with others around them in the same storage."""
    return torch.arange(24.0)[8:16]


# read, write, program, lane
RIGHT = (0, 0, 4, 1)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((-1, 0, 4, 1), {(READ, "x_ptr")}),
        ((1, 0, 4, 1), {(READ, "x_ptr")}),
        ((0, 1, 4, 1), {(WRITE, "y_ptr"), (NEVER, "y_ptr")}),
        ((0, -1, 4, 1), {(WRITE, "y_ptr"), (NEVER, "y_ptr")}),
        ((1 << 42, 0, 4, 1), {("wild address", "no argument")}),
        ((0, 0, 2, 1), {(TWO, "y_ptr"), (NEVER, "y_ptr")}),
        ((0, 0, 4, 0), {(LANES, "y_ptr"), (NEVER, "y_ptr")}),
        ((0, 0, 0, 2), {(TWO, "y_ptr"), (NEVER, "y_ptr")}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # a set's order differs by process
)
def test_each_kind_of_fault(place: tuple[int, ...], expected: set[tuple[str, str]]) -> None:
    assert faults(lambda: copy[2,](middle(), torch.empty(8), *place)) == expected


def test_what_is_right() -> None:
    with watching():
        x, y = middle(), torch.empty(8)
        copy[2,](x, y, *RIGHT)
        copy[2,](y, x, *RIGHT)  # after the launch that wrote it
        in_place[2,](x)  # a program reads what it wrote itself
    assert torch.equal(x, torch.arange(10.0, 18.0))


@pytest.mark.parametrize("strides", [(3, 1), (7, 0)])
def test_what_lies_between_the_rows_of_a_view(strides: tuple[int, int]) -> None:
    rows = torch.zeros(24).as_strided((4, 2), strides)
    assert faults(lambda: copy[2,](rows, torch.empty(8), *RIGHT)) == {(READ, "x_ptr")}


def test_a_fault_does_no_harm() -> None:
    x, storage = middle(), torch.zeros(12)
    with pytest.raises(MemoryFaultError), watching():
        copy[2,](x, storage[:8], 2, 0, 4, 1)
        copy[2,](x, storage[:6], *RIGHT)
    assert storage.tolist() == [8, 9, 10, 11, 12, 13, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, torch.float64, torch.int32, torch.int64, torch.int16])
def test_new_memory(dtype: torch.dtype) -> None:
    new = torch.empty(8, dtype=dtype)
    assert faults(lambda: copy[2,](torch.empty(8, dtype=dtype), new, *RIGHT)) == {
        (NEW, "x_ptr"),
        (NEVER, "x_ptr"),
        (NEVER, "y_ptr"),
    }
    with watching():
        x = torch.empty(8, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 1)  # by whomever
        copy[2,](x, torch.empty(8, dtype=dtype), *RIGHT)


@pytest.mark.parametrize(("read", "write"), [(0, 4), (4, 0)])
def test_one_program_reads_what_another_writes(read: int, write: int) -> None:
    """The second writes where the first has read, or reads where it has written; by two names of one storage."""
    whole = torch.zeros(12)
    views = {0: whole[:8], 4: whole[4:]}
    assert faults(lambda: copy[2,](views[read], views[write], *RIGHT)) == {(RACE, "x_ptr")}


@pytest.mark.parametrize(
    ("pair", "names"), [(lambda *pair: pair, ("tensors[0]", "tensors[1]")), (Pointers, ("tensors.x", "tensors.y"))]
)
def test_tensors_in_tuples(pair: Callable[..., tuple[Tensor, Tensor]], names: tuple[str, str]) -> None:
    x, y = torch.arange(8.0)[2:6], torch.zeros(4)
    with watching():
        copy_in_tuples[1,](pair(x, y), (0, 0))
    assert torch.equal(x, y)
    assert faults(lambda: copy_in_tuples[1,](pair(x, y), (1, 0))) == {(READ, names[0])}
    assert faults(lambda: copy_in_tuples[1,](tensors=pair(x, y), places=(0, 1))) == {(WRITE, names[1])}


def test_a_fault_says_where() -> None:
    with pytest.raises(MemoryFaultError) as found, watching():
        copy[2,](middle(), torch.zeros(8), 1, 0, 4, 1)
    device, kernel = (inspect.getsourcelines(function.fn)[1] for function in (load, copy))
    lines = f"test_guard.py:{device + 2} < test_guard.py:{kernel + 4}"
    assert str(found.value) == f"read out of bounds: x_ptr of copy, {lines}"


def test_atomics_are_refused() -> None:
    with pytest.raises(Exception, match="does not know the order of atomics"), watching():
        count[1,](torch.zeros(1))


def tight(tensor: Tensor) -> Tensor:
    """The same, with the same strides, in a view whose last element is the last of its storage."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.zeros(size + 3, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride(), 3).copy_(tensor)


class Call(NamedTuple):
    """Both passes, one after the other."""

    grid: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    dense: bool
    blocks: tuple[int, int] = (16, 16)
    kv: tuple[int, int] = (16, 16)
    gates: tuple[float, ...] = (0.6,)
    dropout_p: float = 0.0
    batch: int = 1

    def run(self, kernels: Any) -> None:
        given = Problem(
            self.grid, self.head_dim, self.dtype, batch=self.batch, gates=list(self.gates), dropout_p=self.dropout_p
        )
        given.q, given.k, given.v, given.d_out = map(tight, (given.q, given.k, given.v, given.d_out))
        tables = {"table": given.table} if self.dense else {"row_table": given.row_table, "col_table": given.col_table}
        _, lse, content = kernels.forward.forward(
            given.q, given.k, given.v, given.gate, self.grid, given.scale, **tables,
            dropout_p=self.dropout_p, philox=given.philox, need_grad=True, config=Config(*self.blocks, 4, 1),
        )  # fmt: skip
        launcher = kernels.backward.backward
        given.fused(content, lse, dense=self.dense, blocks=self.blocks, kv=self.kv, launcher=launcher)


ALL_GATES = (0.6, -40.0, 40.0)
CALLS = {
    "dense": Call((3, 7), FP32, 16, True),
    "factored": Call((3, 7), FP16, 16, False),
    "odd": Call((1, 7), FP32, 40, True),
    "heads": Call((1, 7), FP32, 48, True, gates=ALL_GATES, batch=2),
    # a ragged tile that is wider than the padded table, query blocks of dK and dV larger than those of dQ
    "wide": Call((6, 7), FP16, 48, True, (16, 64), (32, 16), (40.0, 0.6)),
    "wide_dropout": Call((6, 7), FP32, 40, True, (16, 64), (32, 16), (40.0, 0.6), 0.25),
    "wide_factored": Call((6, 7), BF16, 64, False, (16, 64), (32, 16), (40.0, 0.6), 0.25),
    "wide_keys": Call((3, 7), FP16, 16, True, kv=(16, 64)),
    "dropout": Call((3, 5), BF16, 33, False, (32, 32), (32, 32), ALL_GATES, 0.25, 2),
    "paper_dense": Call((14, 14), FP16, 48, True, (128, 64), (64, 128)),
    "paper_factored": Call((14, 14), BF16, 40, False, (64, 128), (128, 64), (0.6, -40.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_have_no_fault(name: str) -> None:
    with watching():
        CALLS[name].run(SimpleNamespace(forward=forward, backward=backward))


def test_every_output_is_watched() -> None:
    """Kernels that store nothing leave all of them as they were."""
    with (
        pytest.raises(MemoryFaultError),
        watching() as guard,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(InterpreterBuilder, "create_masked_store", lambda *_: None)
        CALLS["dense"].run(SimpleNamespace(forward=forward, backward=backward))
    assert sum(fault.kind == NEVER for fault in guard.faults) == 12


@pytest.mark.parametrize("mutant", MEMORY)
def test_mutants_are_noticed(mutant: Mutant, tmp_path: Path) -> None:
    kernels = plant(mutant[:3], tmp_path)
    assert mutant.kind in {kind for kind, _ in faults(lambda: CALLS[mutant.call].run(kernels))}
