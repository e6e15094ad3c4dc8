"""The fused C++ kernels on the CPU: scores, softmax, position and values of a few queries at a time, in the caches."""

from torch import Tensor

from .. import extension, ops


def why_not(q: Tensor | None = None) -> str:
    """Why the kernels cannot run here, or on this query tensor; "" when they can."""
    if extension.status["_C"] is not None:
        return extension.status["_C"]
    if ops.INTERPRETED:
        return "Triton's interpreter has taken its place (TRITON_INTERPRET=1)"
    if q is not None and q.device.type != "cpu":
        return f"the tensors are on {q.device}, not on the CPU"
    return ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    if dropout_p > 0:
        raise NotImplementedError("the kernels have no dropout: use the reference backend")
    return ops.attend(q, k, v, pos_weight, gate, grid, scale)
