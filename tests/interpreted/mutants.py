"""Wrong kernels: (file, right text, wrong text). The suite must fail for each (`test_mutants_are_noticed` of the
pass that it belongs to).
"""

from __future__ import annotations

FORWARD: list[tuple[str, str, str]] = [
    ("forward.py", "correction = tl.exp2(m - new_m)", "correction = tl.exp2(new_m - m)"),
    ("forward.py", "c1 = c1 * correction[:, None]", "c1 = c1"),
    ("forward.py", "s = tl.where(columns[None, :] < left,", "s = tl.where(columns[None, :] < left + 1,"),
    ("forward.py", "o1 = c1 * content_row + p1 * position", "o1 = c1 * content_row - p1 * position"),
    ("forward.py", "c1 *= normalize", "c1 = c1"),
    ("forward.py", "(m + tl.log2(total)) * LN2", "(m + tl.log2(total))"),
    ("forward.py", "total = tl.sum(e, 1)\n", "total = tl.sum(e, 1) * 2.0\n"),
    ("forward.py", "position = position * inverse_keep", "position = position"),
    ("forward.py", "p = tl.where(keep, p, 0.0)", "p = p"),
    ("forward.py", "batch_head = batch * num_heads + head", "batch_head = batch + head"),
    ("forward.py", "q1 = (-q1.to", "q1 = (q1.to"),
    ("forward.py", "if position < SATURATION:", "if content < SATURATION:"),
    (
        "forward.py",
        "col_y, col_x = next_tile(col_y, col_x, BLOCK_N, width)",
        "col_y, col_x = next_tile(col_y, col_x, BLOCK_N, height)",
    ),
    ("forward.py", 'm = m + float("inf")', "m = m"),
    ("common.py", "tl.where(gate > 0.0, smaller, larger), tl.where", "tl.where(gate > 0.0, larger, smaller), tl.where"),
    (
        "common.py",
        "rows.to(tl.int64)[:, None] * stride\n    x0 =",
        "(rows + 1).to(tl.int64)[:, None] * stride\n    x0 =",
    ),
    ("common.py", "return y + step // width + wrap.to(tl.int32)", "return y + step // width"),
    ("common.py", "tl.join(k0.to(tl.int8), k2.to(tl.int8))", "tl.join(k0.to(tl.int8), k1.to(tl.int8))"),
    ("common.py", "LOWEST: tl.constexpr = tl.constexpr(-3.0e38)", "LOWEST: tl.constexpr = tl.constexpr(-3.0)"),
    ("common.py", "tl.dot(a1, tl.trans(b1), product,", "product - tl.dot(a1, tl.trans(b1),"),
]
