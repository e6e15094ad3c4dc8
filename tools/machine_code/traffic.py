"""The global memory that the programs of a launch read and write, from its arguments."""

from __future__ import annotations

import torch

from convit_kernels.triton.launch import blocks

from .compiled import Launch

_BY_QUERIES = {"k": "BLOCK_M", "v": "BLOCK_M"}
_BY_KEYS = dict.fromkeys(("do", "q", "row_lse_ptr", "row_dc_ptr", "row_factor_ptr", "row_delta_ptr"), "BLOCK_N")
# Kernel -> parameter -> the block of which each reads all of the tensor that belongs to its image and head. Of other
# tensors each block of the kernel has a part of its own.
READ_BY_EACH = {
    "forward_kernel": _BY_QUERIES,
    "backward_q_kernel": _BY_QUERIES,
    "backward_kv_kernel": _BY_KEYS,
    "backward_position_kernel": {"do": "BLOCK_N", "row_dc_ptr": "BLOCK_N", "v": "BLOCK_M"},
    "content_forward_kernel": _BY_QUERIES,
    "content_backward_q_kernel": _BY_QUERIES,
    "content_backward_kv_kernel": _BY_KEYS,
}


def requested_bytes(launch: Launch) -> int:
    """What the programs together load and store: lanes that a mask switches off do not count, nor does what a program
    reads again and again of the factors of position, which stay in the L1 cache."""
    total = 0
    for parameter, value in launch.arguments.items():
        fields = value._asdict() if hasattr(value, "_asdict") else {"": value}
        for field, tensor in fields.items():
            if isinstance(tensor, torch.Tensor):
                total += _times(launch, parameter, field) * tensor.numel() * tensor.element_size()
    return total


def _times(launch: Launch, parameter: str, field: str) -> int:
    """How often the programs together need all of a tensor."""
    if block := READ_BY_EACH.get(launch.name, {}).get(parameter):
        return blocks(launch.arguments["num_tokens"], launch.arguments[block])
    if field == "table":  # of all images
        owned = "BLOCK_N" if "_kv_" in launch.name else "BLOCK_M"
        return launch.grid[0] // blocks(launch.arguments["num_tokens"], launch.arguments[owned])
    return launch.grid[0] if field in ("row_table", "col_table") else 1
