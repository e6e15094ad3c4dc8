"""The fused C++ kernels on the CPU: scores, softmax, position and values of a few queries at a time, in the caches."""

from torch import Tensor

from .. import extension, ops
from ..inputs import Inputs


def why_not(inputs: Inputs | None) -> str:
    if extension.status["_C"] is not None:
        return extension.status["_C"]
    if ops.INTERPRETED:
        return "Triton's interpreter has taken its place (TRITON_INTERPRET=1)"
    if inputs is None:
        return ""
    if inputs.q.device.type != "cpu":
        return f"the tensors are on {inputs.q.device}, not on the CPU"
    if inputs.dropout_p > 0:
        return "the kernels have no dropout"
    return ops.why_not(*inputs[:5])


def attention(inputs: Inputs) -> Tensor:
    """One call of the op `gated_attention`, whose CPU kernel is in csrc/attention/op.cpp.

    Args:
        inputs: on the CPU, in any dtype and with any strides; shapes in `Inputs`. dropout_p must be 0 (see `why_not`).

    Returns:
        (B, H, N, D) in q's dtype, a view of a contiguous (B, N, H, D) tensor. Sums are in float32, of float64
        inputs in float64.
    """
    return ops.attend(inputs)
