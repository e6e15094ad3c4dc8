"""The fused C++ kernels on the CPU: scores, softmax, position and values of a few queries at a time, in the caches."""

import math
import os
from functools import cache

import torch
from torch import Tensor

from .. import extension, ops
from ..inputs import Inputs, kernel_head_dim

# What PyTorch needs of a processor to multiply these dtypes by AMX, in torch.cpu's private words.
_AMX = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


def why_not(inputs: Inputs | None) -> str:
    if extension.status["_C"] is not None:
        return extension.status["_C"]
    if ops.INTERPRETED:
        return "Triton's interpreter has taken its place (TRITON_INTERPRET=1)"
    if inputs is None:
        return ""
    if inputs.q.device.type not in ("cpu", "meta"):
        return f"the tensors are on {inputs.q.device}, not on the CPU"
    if inputs.dropout_p > 0:
        return "the kernels have no dropout"
    return ops.why_not_attend(inputs)


@cache
def _limit(dtype: torch.dtype, isa: str) -> tuple[float, str]:
    name = str(dtype).removeprefix("torch.")
    unit = extension.units_by_dtype()[name]
    if dtype in _AMX and not unit.startswith("amx_") and getattr(torch.cpu, _AMX[dtype], lambda: False)():
        # Measured on an Intel Xeon with AMX, forward in bfloat16, this backend's time over the composite's with an
        # earlier avx512_bf16: 0.91 to 0.99 for 19 and 25 kB, 1.86 for 98 kB. float16 (AMX-FP16): not measured anywhere.
        return 32e3, f"PyTorch multiplies {name} by AMX, the unit {unit} does not"
    if unit == "portable" and dtype in (torch.float32, torch.float64):
        # Measured on an AMD EPYC (Zen 4) with PyTorch kept to SSE, forward + backward in float32, the same ratio: 0.8
        # to 0.9 for 38 kB, 1.0 for 50 kB, 1.1 to 2.0 beyond 100 kB. Not measured elsewhere, on Arm for example.
        return 40e3, f"PyTorch's products of {name} are faster than those of the unit {unit}"
    if dtype == torch.float64:
        # Measured on that EPYC, forward + backward, the same ratio for 393, 884 and 1573 kB: avx2 1.0, 1.1 to 1.2 and
        # 1.2; avx512 0.8 to 0.9, 0.9 and 1.0 to 1.2. Forward alone avx512 has 0.7 to 0.8. Not measured elsewhere.
        return 800e3, "PyTorch's backward of float64 may be faster once a head's gradients leave the caches"
    return math.inf, ""


@ops.constant_in_programs
def limit(dtype: torch.dtype) -> tuple[float, str]:
    """From how many bytes of keys of one image and head on the composite is expected to be faster, and why.

    Infinity where it never is. This depends on the processor and on the unit in use, not on any time taken here.

    Raises:
        RuntimeError: CONVIT_KERNELS_ISA names a unit that cannot run.
    """
    return _limit(dtype, os.environ.get("CONVIT_KERNELS_ISA", ""))


def why_later(inputs: Inputs) -> str:
    if reason := ops.why_later():
        return reason
    key_bytes, why = limit(inputs.q.dtype)
    if not why:
        return ""
    return why if inputs.q.shape[2] * kernel_head_dim(inputs) * inputs.q.element_size() >= key_bytes else ""


def attention(inputs: Inputs) -> Tensor:
    """One call of the op `gated_attention`, whose CPU kernel is in csrc/attention/op.cpp.

    Args:
        inputs: on the CPU, in any dtype and with any strides; shapes in `Inputs`. dropout_p must be 0 (see `why_not`).

    Returns:
        (B, H, N, D) in q's dtype, a view of a contiguous (B, N, H, D) tensor. Sums are in float32, of float64
        inputs in float64.
    """
    return ops.attend(inputs)
