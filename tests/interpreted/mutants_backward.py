"""Wrong kernels of the backward pass: (file, right text, wrong text). `test_mutants_are_noticed` must fail for each."""

from __future__ import annotations

BACKWARD: list[tuple[str, str, str]] = [
    ("backward.py", "dc += tl.sum(do1.to", "dc -= tl.sum(do1.to"),
    ("backward.py", "ds = c * (da - dc[:, None])", "ds = c * da"),
    ("backward.py", "dc += row_sum", "dc += 0.0"),
    ("backward.py", "row_scale = (scale * factor)", "row_scale = (factor)"),
    ("backward.py", "lse - tl.log2(content)", "lse"),
    ("backward.py", "factor = factor / tl.where(row_sum > 0.0, row_sum, 1.0)", "factor = factor"),
    ("backward.py", "c = tl.where(columns[None, :] < left, c, 0.0)", "c = c"),
    ("backward.py", "t = tl.where(columns[None, :] < num_tokens, p, 0.0) * (da", "t = p * (da"),
    ("backward.py", "share = tl.where(rows < num_tokens, share_x * share_y, 0.0)", "share = share_x * share_y"),
    ("backward.py", "ty += tl.sum(t * (dy - ey[:, None]), 1)", "ty += tl.sum(t * dy, 1)"),
    ("backward.py", "(dy * dy - er[:, None])", "(dy * dy + er[:, None])"),
    ("backward.py", "dv0 += position * pv0", "dv0 += pv0"),
    ("backward.py", "a += position * p.to(tl.float32)", "a += p.to(tl.float32)"),
    ("backward.py", "a = tl.where(keep, a, 0.0)", "a = a"),
    ("backward.py", "p = tl.where(keep, p, 0.0)", "p = p"),
    ("backward.py", "dv0 *= inverse_keep", "dv0 *= 1.0"),
    ("backward.py", "c *= tl.load(row_factor_ptr + rows)[None, :]", "c = c"),
    ("backward.py", "(first_image + image) * num_heads + head, rows", "first_image * num_heads + head, rows"),
    ("backward.py", "image_v += stride_vb", "image_v += 0"),
    ("backward.py", "(da - dc[:, None])", "da"),
    ("backward.py", "image_dc += num_rows", "image_dc += 0"),
]
