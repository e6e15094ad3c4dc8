"""Wrong kernels: (file, right text, wrong text). The suite must fail for each (`test_mutants_are_noticed` of the
pass that it belongs to).
"""

from __future__ import annotations

FORWARD: list[tuple[str, str, str]] = [
    ("forward.py", "correction = tl.exp2(m - new_m)", "correction = tl.exp2(new_m - m)"),
    ("forward.py", "c = scaled(c, correction[:, None])", "c = c"),
    ("forward.py", "s = tl.where(columns[None, :] < left,", "s = tl.where(columns[None, :] < left + 1,"),
    ("common.py", "x[1] * x_factor + y[1]", "x[1] * x_factor - y[1]"),
    ("forward.py", "c = scaled(c, normalize)", "c = c"),
    ("forward.py", "(m + tl.log2(total)) * LN2", "(m + tl.log2(total))"),
    ("forward.py", "total = tl.sum(e, 1)\n", "total = tl.sum(e, 1) * 2.0\n"),
    ("forward.py", "p, position_share * inverse_keep", "p, position_share"),
    ("forward.py", "tile = tl.where(keep, tile, 0.0)", "tile = tile"),
    ("forward.py", "(dropout.philox, batch * num_heads + head", "(dropout.philox, batch + head"),
    ("common.py", "(-x[1].to", "(x[1].to"),
    ("forward.py", "if position_share < SATURATION:", "if content_share < SATURATION:"),
    (
        "forward.py",
        "keys = next_tokens(keys, BLOCK_N, position.width)",
        "keys = next_tokens(keys, BLOCK_N, position.height)",
    ),
    ("forward.py", 'm = m + float("inf")', "m = m"),
    ("common.py", "tl.where(gate > 0.0, smaller, larger), tl.where", "tl.where(gate > 0.0, larger, smaller), tl.where"),
    (
        "common.py",
        "first = ptrs[0] + step",
        "first = ptrs[0]",
    ),
    ("common.py", "tokens[0] + step // width + wrap.to(tl.int32)", "tokens[0] + step // width"),
    ("common.py", "tl.join(k0.to(tl.int8), k2.to(tl.int8))", "tl.join(k0.to(tl.int8), k1.to(tl.int8))"),
    ("common.py", "LOWEST: tl.constexpr = tl.constexpr(-3.0e38)", "LOWEST: tl.constexpr = tl.constexpr(-3.0)"),
    ("common.py", "tl.dot(a[1], tl.trans(b[1]), product,", "product - tl.dot(a[1], tl.trans(b[1]),"),
]
