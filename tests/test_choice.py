"""Which backend backend=None takes on the CPU: the C++ kernels, but where PyTorch is expected to be faster."""

import pytest
import torch
from equivalence import make_inputs

import convit_kernels as ck
from convit_kernels import attention, extension
from convit_kernels.backends import cpu
from convit_kernels.inputs import FLOATING, checked

pytestmark = pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it")
HALVES = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one whose unit for each dtype is this one, and whose PyTorch has AMX for some dtypes."""

    def fake(unit, amx=()):
        names = [str(dtype).removeprefix("torch.") for dtype in FLOATING]
        monkeypatch.setattr(extension, "units_by_dtype", lambda: dict.fromkeys(names, unit))
        for dtype, question in HALVES.items():
            monkeypatch.setattr(torch.cpu, question, lambda dtype=dtype: dtype in amx)
        monkeypatch.setattr(cpu, "_limit", cpu._limit.__wrapped__)  # what was found before is of another machine

    return fake


def chosen(dtype, tokens, head_dim=48, dropout_p=0.0):
    q, k, v = (torch.zeros(1, 1, tokens, head_dim, dtype=dtype) for _ in range(3))
    return attention.fastest(checked(q, k, v, torch.zeros(1, 3), torch.zeros(1), (1, tokens), None, dropout_p))


@pytest.mark.parametrize("amx", [(), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("unit", ["amx_bf16", "amx_bf16_emulated", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_go_to_pytorch_where_it_has_amx_and_the_unit_has_not(dtype, unit, amx, machine):
    machine(unit, amx)
    assert chosen(dtype, 1024) == ("composite" if dtype in amx and not unit.startswith("amx_") else "cpu")
    assert chosen(dtype, 196) == "cpu"


@pytest.mark.parametrize(
    ("unit", "dtype", "tokens"),
    [("portable", torch.float32, 209), ("portable", torch.float64, 105), ("avx2", torch.float64, 2084)],
)
def test_large_heads_go_to_pytorch_where_its_products_are_faster(unit, dtype, tokens, machine):
    machine(unit)
    assert chosen(dtype, tokens - 1) == "cpu"
    assert chosen(dtype, tokens) == "composite"
    assert chosen(dtype, tokens // 2 + 1, head_dim=96) == "composite"


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "avx512", "avx2"])
def test_float32_never_does_on_a_processor_with_avx2(unit, machine):
    machine(unit, amx=(torch.bfloat16, torch.float16))
    assert chosen(torch.float32, 4096, head_dim=128) == "cpu"


def test_a_torch_that_does_not_tell_of_amx_is_taken_to_have_none(machine, monkeypatch):
    machine("avx512_bf16")
    monkeypatch.delattr(torch.cpu, HALVES[torch.bfloat16])
    assert chosen(torch.bfloat16, 1024) == "cpu"


def test_the_environment_may_name_another_unit_at_any_time(monkeypatch):
    for unit in ("portable", *extension.instruction_sets()):
        monkeypatch.setenv("CONVIT_KERNELS_ISA", unit)
        by_portable = extension.units_by_dtype()["float32"] == "portable"
        assert chosen(torch.float32, 1024) == ("composite" if by_portable else "cpu")


def test_a_backend_that_is_named_is_taken(machine):
    machine("portable")
    inputs = make_inputs(1, 1, (20, 20), 48)[:5]
    for backend in ("cpu", "composite"):
        named = ck.gpsa_attention(*inputs, backend=backend)
        assert torch.equal(named, ck.gpsa_attention(*inputs)) == (backend == "composite")


def test_what_pytorch_cannot_do_either_goes_on_to_the_next(machine):
    machine("portable")
    assert chosen(torch.float32, 1024, dropout_p=0.5) == "reference"


@pytest.mark.parametrize(("side", "op"), [(4, "gated_attention"), (20, "scaled_dot_product_attention")])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_makes_the_same_choice_in_one_graph(side, op, dynamic, machine):
    machine("avx512_bf16", amx=(torch.bfloat16,))
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(ck.gpsa_attention, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        compiled(*make_inputs(1, 2, (side, side), 48, torch.bfloat16)[:5], grid_size=(side, side))
    assert len(graphs) == 1
    assert op in graphs[0]
