"""The fused Triton kernels on GPUs: one pass over K and V for content and position, and a backward of its own."""

import functools
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..inputs import Inputs, kernel_head_dim
from ..triton import configs

MAX_HEAD_DIM = 256
MAX_TOKENS = 65_536
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# asked at every call of the attention, so looked up once
_INSTALLED = importlib.util.find_spec("triton") is not None


def _why_not_compiled(architecture: str) -> str:
    """Why Triton cannot compile for an architecture that was not known here; "" when it can.

    Tried in a process of its own, because LLVM ends the whole process for some: about two seconds, once.
    """
    backend = "cuda" if architecture.startswith("sm_") else "hip"
    command = [sys.executable, str(Path(configs.__file__).with_name("probe.py")), backend, architecture]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return f"whether Triton can compile for {architecture} could not be tried: {error}"
    if done.returncode == 0:
        return ""
    said = re.findall(r".*(?:error|fatal).*", done.stderr, re.IGNORECASE) or ["no reason given"]
    return f"Triton cannot compile for {architecture}: {said[-1].strip()}"


@functools.lru_cache
def why_not_on(index: int) -> str:
    """Why the kernels cannot run on the GPU of this number; "" when they can."""
    gpu = configs.gpu(index)
    if configs.nearest_family(gpu) is None:
        return f"there are no launch configurations for {gpu.architecture}, nor for anything older with as much memory"
    return "" if gpu.architecture in configs.FAMILIES else _why_not_compiled(gpu.architecture)


@functools.lru_cache
def _warned_of(index: int) -> str:
    """As `why_not_on`, with one warning where something slower is to run instead."""
    if reason := why_not_on(index):
        warnings.warn(f"convit_kernels runs without its Triton kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


@functools.lru_cache
def _why_not_with(index: int, dtype: torch.dtype, head_dim: int) -> str:
    return _warned_of(index) or configs.why_not(configs.family(torch.device("cuda", index)), dtype, head_dim)


@ops.constant_in_programs  # torch.compile follows no cache
def _why_not_there(index: int, dtype: torch.dtype, head_dim: int) -> str:
    return _why_not_with(index, dtype, head_dim)


def why_not(inputs: Inputs | None) -> str:
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if inputs is None:
        if ops.INTERPRETED:
            return ""
        if not torch.cuda.is_available():
            return "torch sees no GPU of NVIDIA or AMD (those of Intel and Apple run the composite)"
        reasons = [why_not_on(index) for index in range(torch.cuda.device_count())]
        return reasons[0] if all(reasons) else ""
    q = inputs.q
    if q.device.type in ("xpu", "mps"):
        return f"the tensors are on {q.device}; the kernels are for GPUs of NVIDIA and AMD, others run the composite"
    if q.device.type != "cuda" and not ops.INTERPRETED:
        return f"the tensors are on {q.device}, not on a GPU"
    if q.dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if (head_dim := kernel_head_dim(inputs)) > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, not {head_dim}"
    if q.device.type == "cuda" and (reason := _why_not_there(q.device.index, q.dtype, head_dim)):
        return reason
    if q.shape[2] > MAX_TOKENS:
        return f"a grid has at most {MAX_TOKENS} tokens, not {q.shape[2]}"
    if q.shape[1] > configs.MAX_HEADS:
        return f"there are at most {configs.MAX_HEADS} heads, not {q.shape[1]}"
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
