"""Triton's interpreter, mended, for tests of the kernels on a machine without a GPU.

Two defects of the interpreter (3.8, 3.9) are mended here and not in the kernels: it multiplies bfloat16 matrices as if
their bits were integers, and it truncates where the hardware rounds to bfloat16 (its own rounding to nearest loses the
carry into the exponent). And it is made twice as fast: for each call of a device function it looks through all of
triton.language for what to replace, which the launch has done before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as _interpreter

_Builder = _interpreter.InterpreterBuilder
_Handle = _interpreter.TensorHandle
_create_dot = _Builder.create_dot


def _decode(bits: np.ndarray) -> np.ndarray:
    """The float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode(value: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a = _Handle(_decode(a.data), tl.float32)
        b = _Handle(_decode(b.data), tl.float32)
    return _create_dot(self, a, b, d, *rest)


def _rounding(method: Any) -> Any:
    def cast(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return _Handle(_encode(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return _Handle(_decode(src.data), target)
        return method(self, src, dst_type, *rest)

    return cast


_Builder.create_dot = _dot
for _name in ("cast_impl", "create_fp_to_fp", "create_fp_ext", "create_fp_trunc"):
    setattr(_Builder, _name, _rounding(getattr(_Builder, _name)))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    names = self.fn.__globals__
    if id(names) not in _patched:
        _interpreter._patch_lang(self.fn)
        _patched.add(id(names))
    return self.rewrite()(*args, **kwargs)


_patched: set[int] = set()
_interpreter.InterpretedFunction.__call__ = _call
