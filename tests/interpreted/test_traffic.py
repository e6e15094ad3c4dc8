"""What the programs of a launch are said to read and write is what they do under the guard."""

from typing import Any

import numpy as np
import pytest
import torch
from guard import Guard
from test_triton_backward import Problem

from convit_kernels.triton.configs import Config
from convit_kernels.triton.forward import forward
from tools.machine_code.compiled import Launch
from tools.machine_code.traffic import requested_bytes

pytestmark = pytest.mark.interpreter


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Launch, list[int]]]:
    """Of each kernel its launch, and the bytes of each access, those that several lanes name counted once."""
    found: dict[str, tuple[Launch, list[int]]] = {}
    launch, access = Guard.launch, Guard.access

    def launched(guard: Guard, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        found[executor.fn.__name__] = Launch(executor.fn, arguments, executor.grid, {}), []
        return launch(guard, executor, args, kwargs)

    def accessed(guard: Guard, pointers: Any, mask: Any, write: bool) -> Any:
        true, allowed = access(guard, pointers, mask, write)
        bits = pointers.dtype.element_ty.primitive_bitwidth
        found[guard.kernel][1].append(len(np.unique(true.data[allowed.data])) * bits // 8)
        return true, allowed

    monkeypatch.setattr(Guard, "launch", launched)
    monkeypatch.setattr(Guard, "access", accessed)
    return found


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_requested_bytes(launches: dict[str, tuple[Launch, list[int]]], dtype: torch.dtype, dense: bool) -> None:
    problem = Problem((6, 7), 48, dtype, heads=2)
    tables = {"table": problem.table} if dense else {"row_table": problem.row_table, "col_table": problem.col_table}
    config = Config(16, 32, 4, 2)
    forward(
        problem.q, problem.k, problem.v, problem.gate, problem.grid, problem.scale,
        need_grad=True, config=config, **tables,
    )  # fmt: skip
    problem.fused(*problem.saved(), dense=dense, blocks=(16, 32), kv=(32, 16))
    assert len(launches) == 5
    for name, (launch, sizes) in launches.items():
        said, found = requested_bytes(launch), sum(sizes)
        if dense or name not in ("forward_kernel", "backward_kv_kernel"):
            assert said == pytest.approx(found, rel=0.03), name
        else:  # the factors are read anew for each tile
            assert 0.5 * found < said < found, name
