"""What a CUDA graph asks of the backend `triton`: nothing on the way reads the device, nothing outlives a call.

What needs no GPU is held everywhere; that a graph replays right, on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convit_kernels as ck
from convit_kernels.backends import triton as backend
from convit_kernels.inputs import checked

pytest.importorskip("triton")

from convit_kernels.triton.attention import backward_with_tables, forward_with_tables
from tools.machine_code.compiled import recorded_launches

needs_compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be recorded"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")

# they allocate, look at the same memory in another way, or launch a kernel: none reads the device's memory to the host
ASYNCHRONOUS = {
    "aten.empty.memory_format",
    "aten.transpose.int",
    "aten.unbind.int",
    "aten.clone.default",
    "aten.randint.low",
    "convit_kernels.dense_position_table.default",
    "convit_kernels.relative_position_tables.default",
    "convit_kernels.gated_attention.default",
}


class Seen(TorchDispatchMode):
    """The operators that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **kwargs or {})


def tensors(side: int, device: str = "cpu") -> list[Tensor]:
    q, k, v, d_out = (torch.randn(2, 3, 16, side * side, device=device).mT for _ in range(4))  # a last stride above 1
    return [q, k, v, torch.randn(3, 3, device=device), torch.randn(3, device=device), d_out]


@needs_compiled
@pytest.mark.parametrize("side", [4, 20], ids=["dense", "factored"])
@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_operator_on_the_way_reads_the_device(side: int, need_grad: bool, dropout_p: float) -> None:
    *inputs, d_out = tensors(side)
    settings = (side, side, 0.25, dropout_p, torch.tensor([1, 2]) if dropout_p else None)
    with recorded_launches() as launches, Seen() as seen:
        _, lse, content, *tables = forward_with_tables(*inputs, *settings, need_grad)
        if need_grad:
            q, k, v, *parameters = inputs
            backward_with_tables(d_out, q, k, v, content, lse, *parameters, *settings, *tables)
    assert [each.name for each in launches] == ["forward_kernel"] + need_grad * [
        "backward_q_kernel",
        "backward_kv_kernel",
        "backward_position_kernel",
        "backward_reduce_kernel",
    ]
    assert seen.names <= ASYNCHRONOUS
    tables_made = [name for name in seen.names if "table" in name]
    assert len(tables_made) == 1  # of the one kind


def test_the_seed_of_dropout_is_drawn_on_the_device() -> None:
    q, k, v, pos_weight, gate, _ = tensors(4, "meta")
    with torch.no_grad(), Seen() as seen:
        backend.attention(checked(q, k, v, pos_weight, gate, None, None, 0.3))
    assert {"aten.randint.low", "convit_kernels.gated_attention.default"} <= seen.names <= ASYNCHRONOUS


@needs_gpu
class TestOnAGpu:
    @staticmethod
    def layer(**options: Any) -> ck.GPSA:
        torch.manual_seed(0)
        return ck.GPSA(96, 2, grid_size=(7, 9), backend="triton", **options).cuda()

    @staticmethod
    def captured(call: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles and loads, which a capture does not allow
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph, results

    def test_a_replay_is_a_training_step_with_the_weights_of_its_time(self) -> None:
        layer, x = self.layer(), torch.randn(2, 63, 96, device="cuda", requires_grad=True)
        leaves = [x, *layer.parameters()]

        def step() -> list[Tensor | None]:
            out = layer(x)
            return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]

        graph, results = self.captured(step)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf) * 0.3)
        graph.replay()
        for mine, expected in zip(results, step(), strict=True):
            assert mine is None or torch.equal(mine, expected)

    def test_each_replay_draws_another_mask(self) -> None:
        layer, x = self.layer(attn_drop=0.5), torch.randn(2, 63, 96, device="cuda")
        with torch.no_grad():
            graph, out = self.captured(lambda: layer(x))
        graph.replay()
        first = out.clone()
        graph.replay()
        assert not torch.equal(first, out)

    def test_reduced_overhead_gives_the_same(self) -> None:
        layer, x = self.layer(), torch.randn(2, 63, 96, device="cuda")
        compiled = torch.compile(layer, mode="reduce-overhead")
        with torch.no_grad():
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                out = compiled(x).clone()
            torch.testing.assert_close(out, layer(x))
