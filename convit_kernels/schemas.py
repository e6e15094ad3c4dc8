"""The schemas of the package's torch.library ops. No imports beyond the standard library: the build reads this file."""

import hashlib

# of the ops in torch.ops; the build compiles it into the native libraries
NAMESPACE = "convit_kernels"

SCHEMAS = {
    # pos_weight (heads, 3), float32 or float64 -> row_table (heads, height, height), col_table (heads, width, width)
    "relative_position_tables": "(Tensor pos_weight, SymInt height, SymInt width) -> (Tensor, Tensor)",
    # the tables and their gradients -> the gradient of pos_weight, (heads, 3)
    "relative_position_tables_backward": (
        "(Tensor grad_row, Tensor grad_col, Tensor row_table, Tensor col_table) -> Tensor"
    ),
    # pos_weight (heads, 3) -> (heads, N, N rounded up to 16) in float32, float16 or bfloat16, N = height * width
    "dense_position_table": "(Tensor pos_weight, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
    # q, k, v (B, H, N, D), pos_weight (H, 3) and gate (H,) in float32, or float64 where q is; philox (2,) int64: the
    # dropout's seed and offset
    # -> out (B, H, N, D), and what the backward needs, empty unless need_grad: the content's log-sum-exp (B, H, N) in
    # float32 (float64 where q is) and its own part C V (B, H, N, D), empty too on a CPU, whose backward does without
    "gated_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, SymInt height, SymInt width, float scale, "
        "float dropout_p, Tensor? philox, bool need_grad) -> (Tensor, Tensor, Tensor)"
    ),
    # -> the gradients of q, k, v, pos_weight and gate
    "gated_attention_backward": (
        "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor content, Tensor lse, Tensor pos_weight, Tensor gate, "
        "SymInt height, SymInt width, float scale, float dropout_p, Tensor? philox) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

# Compiled into the native libraries; one that carries another fingerprint was built for other schemas.
# A SymInt, which torch.compile needs for grids of several sizes, is an int to them.
INTERFACE = hashlib.sha256(repr(sorted(SCHEMAS.items())).replace("SymInt", "int").encode()).hexdigest()[:16]
