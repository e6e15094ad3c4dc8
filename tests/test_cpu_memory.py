"""What the fused CPU kernels take of memory besides their results, by the growth of a process."""

import pytest
from processes import run_program

from convit_kernels import extension

pytestmark = pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it")
SETS = [] if extension.status["_C"] is not None else extension.instruction_sets()
MEMORY = """
import resource, torch, convit_kernels as ck
torch.set_num_threads(1)
def attend(side, head_dim, dtype):
    q = torch.zeros(1, 1, side * side, head_dim, dtype=dtype)
    parameters = torch.zeros(1, 3, dtype=torch.promote_types(dtype, torch.float32)), torch.zeros(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        ck.gpsa_attention(q[..., :1, :], q[..., :1, :], q[..., :1, :], *parameters, backend="cpu")
        out = ck.gpsa_attention(q, q, q, *parameters, backend="cpu")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - out.nbytes // 1024
attend(4, {head_dim}, torch.{dtype})
print(max(attend({side}, {head_dim}, torch.{dtype}), 0))
"""


def check(side: int, head_dim: int, dtype: str) -> None:
    """At most two megabytes a thread."""
    program = MEMORY.format(side=side, head_dim=head_dim, dtype=dtype)
    assert int(run_program(program).stdout) <= 2048 + 256  # the process itself grows a little, too


@pytest.mark.parametrize(
    ("side", "head_dim", "dtype"),
    [(14, 48, "float32"), (64, 48, "float32"), (64, 256, "float64"), (96, 48, "float32"), (96, 8, "float64")],
)
@pytest.mark.parametrize("cache", ["", str(1 << 18), str(1 << 30)])
def test_a_forward_by_numbers(side, head_dim, dtype, cache, monkeypatch):
    monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
    check(side, head_dim, dtype)


@pytest.mark.parametrize("name", [name for name in SETS if "bf16" in name])
@pytest.mark.parametrize("cache", [str(1 << 18), str(1 << 30)])
def test_a_forward_by_pairs(name, cache, monkeypatch):
    monkeypatch.setenv("CONVIT_KERNELS_ISA", name)
    monkeypatch.setenv("CONVIT_KERNELS_L2", cache)
    check(64, 80, "bfloat16")
