"""Wrong kernels of the backward pass: (file, right text, wrong text). `test_mutants_are_noticed` must fail for each."""

from __future__ import annotations

BACKWARD: list[tuple[str, str, str]] = [
    ("common.py", "total += tl.sum(a[1].to", "total -= tl.sum(a[1].to"),
    ("backward.py", "ds = c * (da - dc[:, None])", "ds = c * da"),
    ("backward.py", "dc += row_sum", "dc += 0.0"),
    ("backward.py", "(scale * factor)[:, None]", "(factor)[:, None]"),
    ("backward.py", "lse - tl.log2(content_share)", "lse"),
    ("backward.py", "factor = factor / tl.where(row_sum > 0.0, row_sum, 1.0)", "factor = factor"),
    ("backward.py", "c = tl.where(columns[None, :] < left, c, 0.0)", "c = c"),
    ("backward.py", "tl.where(columns[None, :] < num_tokens, da - dc[:, None], 0.0)", "(da - dc[:, None])"),
    ("backward.py", "share = tl.where(rows < num_tokens, share_x * share_y, 0.0)", "share = share_x * share_y"),
    ("backward.py", "ty -= ey * t0", "ty -= 0.0"),
    ("backward.py", "- (exx + eyy) * t0", "+ (exx + eyy) * t0"),
    ("backward.py", "(origin_y - row_y) * ty", "(origin_y + row_y) * ty"),
    ("backward.py", "return place + largest, linear", "return place, linear"),
    ("backward.py", "0.5 - 0.5 * linear / quadratic", "0.5 + 0.5 * linear / quadratic"),
    ("backward.py", "tl.where(first + step < size,", "tl.where(first < size,"),
    ("backward.py", "mixed(dv, 1.0, pv, position_share)", "mixed(dv, 1.0, pv, 1.0)"),
    ("backward.py", "a += position_share * p.to(tl.float32)", "a += p.to(tl.float32)"),
    ("backward.py", "a = tl.where(keep, a, 0.0)", "a = a"),
    ("backward.py", "p = tl.where(keep, p, 0.0)", "p = p"),
    ("backward.py", "dv_tile = scaled(dv_tile, inverse_keep)", "dv_tile = scaled(dv_tile, 1.0)"),
    ("backward.py", "c *= tl.load(row_factor_ptr + rows)[None, :]", "c = c"),
    ("backward.py", "(first_image + image) * num_heads + head,", "first_image * num_heads + head,"),
    ("backward.py", "image_v += v.batch", "image_v += 0"),
    ("backward.py", "da - dc[:, None], 0.0)", "da, 0.0)"),
    ("backward.py", "image_dc += num_rows", "image_dc += 0"),
]
