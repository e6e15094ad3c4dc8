"""The fused Triton kernels on GPUs: one pass over K and V for content and position, and a backward of its own."""

import importlib.util

import torch
from torch import Tensor

from .. import ops
from ..inputs import Inputs, kernel_head_dim

MAX_HEAD_DIM = 256
MAX_TOKENS = 65_536
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# asked at every call of the attention, so looked up once
_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(inputs: Inputs | None) -> str:
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if inputs is None:
        return "" if ops.INTERPRETED or torch.cuda.is_available() else "torch sees no GPU"
    q = inputs.q
    if q.device.type != "cuda" and not ops.INTERPRETED:
        return f"the tensors are on {q.device}, not on a GPU"
    if q.dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if (head_dim := kernel_head_dim(inputs)) > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, not {head_dim}"
    if q.shape[2] > MAX_TOKENS:
        return f"a grid has at most {MAX_TOKENS} tokens, not {q.shape[2]}"
    if inputs.dropout_p > 0 and inputs.key_mask is not None:
        return "with a key mask the mixed map, on which dropout acts, is never normalised"
    return ops.why_not_attend(inputs)


def why_later(inputs: Inputs) -> str:
    return ops.why_later()


def attention(inputs: Inputs) -> Tensor:
    """One call of the op `gated_attention`, whose GPU implementation is in triton/attention.py.

    Args:
        inputs: on a GPU (in Triton's interpreter on the CPU), in one of DTYPES, head_dim at most MAX_HEAD_DIM and N at
            most MAX_TOKENS, any strides; shapes in `Inputs`.

    Returns:
        (B, H, N, D) in q's dtype, a view of a contiguous (B, N, H, D) tensor. Sums are in float32.
    """
    # seed and offset of the mask, drawn on the device: nothing waits for the host, also within a CUDA graph
    philox = torch.randint(0, 1 << 31, (2,), device=inputs.q.device) if inputs.dropout_p > 0 else None
    return ops.attend(inputs, philox)
