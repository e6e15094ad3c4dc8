"""The package's torch.library ops: schemas, fallback kernels, fake kernels and autograd formulas.

Shapes and dtypes of arguments and results are in schemas.py.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from . import (
    eager_attention,
    eager_tables,
    extension,  # loading it registers the native kernels
)
from ._ops import add_op_namespace_prefix, ops
from .flops import tell_counters
from .inputs import Inputs
from .schemas import SCHEMAS

_F = TypeVar("_F", bound=Callable[..., Any])
_DERIVING = (TransformType.Grad, TransformType.Jvp)
# What a call may meet on its way to a kernel of this package when nothing but autograd takes part in it: of which
# classes the tensors are, and for what the dispatcher stops at them, or at all
_CLASSES = {Tensor, torch.nn.Parameter}
_STOPS = (
    "BackendSelect",
    "ADInplaceOrView",
    *(f"{kind}{on}" for on in ("CPU", "CUDA") for kind in ("", "Autograd", "Autocast")),
)
_OTHER_STOPS = ~functools.reduce(
    int.__or__, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in _STOPS)
)


def transformed() -> bool:
    """Whether a transform of torch.func, vmap among them, is at work."""
    return torch._C._are_functorch_transforms_active()


def constant_in_programs(function: _F) -> _F:
    """A function whose result torch.compile takes for a constant.

    As `torch.compiler.assume_constant_result` marks it, which imports the whole compiler for that: over a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_programs  # for torch.compile 2.10 and 2.11 alike
def exporting() -> bool:
    """Whether PyTorch is writing down a program, which must run where this package is not.

    torch.onnx.export does so in the one way or the other.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def why_later() -> str:
    """Why backend=None goes on to plain PyTorch although the ops could compute; "" where it need not."""
    return "an exported program holds PyTorch's operators alone, to run without this package" if exporting() else ""


def why_not(*tensors: Tensor) -> str:
    """Why the ops cannot compute with these tensors as they are being differentiated; "" when they can.

    The ops have first derivatives, backwards. torch.func's transforms cannot use those, and a tangent of forward-mode
    differentiation would get lost: both have to go to plain PyTorch. vmap alone is no obstacle.
    """
    if transformed() and (
        torch.compiler.is_compiling()  # which does not follow a question for the transforms
        or any(one.key() in _DERIVING for one in torch._C._functorch.get_interpreter_stack())
    ):
        return "the fused kernels have no derivatives for torch.func.grad, jvp and their like"
    within_level = forward_ad._current_level >= 0  # asked first: it is quick, and mostly false
    if within_level and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "the fused kernels have no forward-mode derivative, and an input carries a tangent"
    return ""


def _guarded(name: str, autograd: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        if reason := why_not(*(value for value in args if isinstance(value, Tensor))):
            raise RuntimeError(
                f"{add_op_namespace_prefix(name)} cannot do this: {reason}. gpsa_attention(backend=None), "
                "relative_position_tables and dense_position_table go to plain PyTorch there"
            )
        return autograd(keyset, *args)

    return kernel


class _Library(torch.library.Library):
    """One whose derivatives refuse what `why_not` names, also where an op is called by hand."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":  # what register_autograd makes of a formula
            fn = _guarded(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]


# Which implementation torch's dispatcher calls, by op and device:
#   gated_attention[_backward]                                   csrc/attention/op.cpp, on CUDA triton/attention.py
#   relative_position_tables[_backward], dense_position_table    csrc/tables/cpu.cpp, on CUDA csrc/tables/cuda.cu
# Those of csrc register themselves when extension.py loads their library; the tables' fallback, on every device and
# where that library has no code for a GPU, is eager_tables.py. Fake kernels (shapes alone) and autograd formulas are
# below, the same for every device.
_library: torch.library.Library = _Library(ops.name, "DEF")  # type: ignore[no-untyped-call]

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_TABLES = ("relative_position_tables", "relative_position_tables_backward", "dense_position_table")
for _name in _TABLES:
    _library.impl(_name, getattr(eager_tables, _name), "CompositeExplicitAutograd")


def _without_cuda_code() -> None:
    """Gives the tables on CUDA back to PyTorch where the native library has no code for a GPU of this machine."""
    if extension.lacks_code():
        for name in _TABLES:
            _library.impl(name, getattr(eager_tables, name), "CUDA")


# when CUDA is initialised, which importing this must not do, and before there is a tensor on it
torch.cuda._lazy_call(_without_cuda_code)


# then the Triton kernels run on CPU tensors, and the native library registers none for them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _of_triton(name: str) -> Callable[..., Any]:
    """A function of triton/attention.py, which is imported at the first call."""
    return getattr(importlib.import_module(".triton.attention", __package__), name)  # type: ignore[no-any-return]


def _in_triton(name: str) -> Callable[..., Any]:
    return lambda *args: _of_triton(name)(*args)


for _name in ("gated_attention", "gated_attention_backward"):
    _library.impl(_name, _in_triton(_name), "CUDA")
    if INTERPRETED:
        _library.impl(_name, _in_triton(_name), "CPU")

relative_position_tables = ops.relative_position_tables.default
relative_position_tables_backward = ops.relative_position_tables_backward.default
dense_position_table = ops.dense_position_table.default
gated_attention = ops.gated_attention.default
gated_attention_backward = ops.gated_attention_backward.default


def _tables_fake(pos_weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    heads = pos_weight.shape[0]
    return pos_weight.new_empty(heads, height, height), pos_weight.new_empty(heads, width, width)


def _tables_backward_fake(grad_row: Tensor, grad_col: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    return row_table.new_empty(row_table.shape[0], 3)


def _dense_fake(pos_weight: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    tokens = height * width
    columns = tokens + -tokens % eager_tables.COLUMN_MULTIPLE
    return pos_weight.new_empty(pos_weight.shape[0], tokens, columns, dtype=dtype)


def why_not_attend(inputs: Inputs) -> str:
    """Why `attend` cannot compute from these inputs, on any device; "" when it can."""
    if inputs.spacing is not None:
        return (
            "the kernels know positions on a line, or on a plane of one spacing, not on three axes or of two spacings"
        )
    return why_not(*inputs[:5])


def attend(inputs: Inputs, philox: Tensor | None = None) -> Tensor:
    """`gated_attention`'s output alone, with its derivatives.

    Args:
        inputs: shapes and dtypes in `Inputs`.
        philox: (2,) int64 on q's device, seed and offset of the dropout; needed where dropout_p > 0.

    Returns:
        (B, H, N, D) in q's dtype, a view of a contiguous (B, N, H, D) tensor. What the backward reads is saved only
        where something needs a gradient.

    Raises:
        RuntimeError: torch.jit.trace is at work and gradients are enabled.
    """
    q, k, v, pos_weight, gate, grid, scale, dropout_p, _, _ = inputs
    settings = (*grid, scale, dropout_p, philox)
    # a tensor under torch.func.vmap does not tell whether the one that it stands for needs a gradient
    need_grad = torch.is_grad_enabled() and (
        transformed() or q.requires_grad or any(tensor.requires_grad for tensor in inputs[1:5])
    )
    if _watched(inputs[:5]):
        if torch.jit.is_tracing() and torch.is_grad_enabled():  # type: ignore[attr-defined,no-untyped-call]
            raise RuntimeError(
                "torch.jit.trace cannot write down the derivatives of the fused kernels: trace under torch.no_grad(), "
                "or leave the backend out"
            )
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
            tell_counters()
        pos_weight, gate = _parameters(q, pos_weight, gate)
        return gated_attention(q, k, v, pos_weight, gate, *settings, need_grad)[0]  # type: ignore[no-any-return]
    if need_grad:
        return _Attention.apply(q, k, v, pos_weight, gate, *settings)  # type: ignore[no-any-return]
    return _forward(q, k, v, *_parameters(q, pos_weight, gate), *settings, False)[0]


def _stops_elsewhere(tensor: Tensor) -> bool:
    return torch._C._dispatch_keys(tensor).raw_repr() & _OTHER_STOPS != 0


def _watched(tensors: Sequence[Tensor]) -> bool:
    """Whether more than autograd takes part in a call, and it must be one of the op.

    A compiler, a mode, a transform, a tracer, forward-mode differentiation, a tensor of another class or one that is
    lazily negated.
    """
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._dispatch_tls_local_include_set().raw_repr() & _OTHER_STOPS != 0
        or not _CLASSES.issuperset(map(type, tensors))
        or any(map(_stops_elsewhere, tensors))
    )


def _parameters(q: Tensor, pos_weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the ops take."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        pos_weight if pos_weight.dtype == dtype else pos_weight.to(dtype),
        gate if gate.dtype == dtype else gate.to(dtype),
    )


def _forward(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What `gated_attention` returns, and after it what else its backward can use. Derivatives are the caller's."""
    with torch._C._AutoDispatchBelowAutograd():
        if q.is_cuda or INTERPRETED:
            return _of_triton("forward_with_tables")(q, *rest)  # type: ignore[no-any-return]
        return gated_attention(q, *rest)  # type: ignore[no-any-return]


def _backward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What `gated_attention_backward` returns, from its arguments and what `_forward` gave beyond."""
    with torch._C._AutoDispatchBelowAutograd():
        if d_out.is_cuda or INTERPRETED:
            return _of_triton("gated_attention_backward")(d_out, *rest)  # type: ignore[no-any-return]
        return gated_attention_backward(d_out, *rest)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """`gated_attention` and its derivative where nothing watches: the autograd of torch.library takes 30 us more."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, *settings: Any) -> Tensor:
        out, lse, content, *tables = _forward(q, k, v, *_parameters(q, pos_weight, gate), *settings, True)
        *ctx.settings, philox = settings
        ctx.save_for_backward(q, k, v, content, lse, pos_weight, gate, philox, *tables)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, content, lse, pos_weight, gate, philox, *tables = ctx.saved_tensors
        inputs = (d_out, q, k, v, content, lse, *_parameters(q, pos_weight, gate), *ctx.settings, philox)
        if torch.is_grad_enabled() or _watched(inputs[:6]):
            if torch._C._len_torch_dispatch_stack() > 0:
                tell_counters()
            *grads, d_pos_weight, d_gate = gated_attention_backward(*inputs)
        else:
            *grads, d_pos_weight, d_gate = _backward(*inputs, *tables)
        return *grads, d_pos_weight.to(pos_weight.dtype), d_gate.to(gate.dtype), *(None,) * 5


def _heads_last(q: Tensor) -> Tensor:
    """An empty tensor of q's shape, laid out as the output projection reads it: (B, N, H, D) in memory."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = rest[-1]
    nothing = q.new_empty(0)
    lse = q.new_empty(q.shape[:3] if need_grad else 0, dtype=pos_weight.dtype)
    in_triton = q.device.type != "cpu" or INTERPRETED
    return _heads_last(q), lse, _heads_last(q) if need_grad and in_triton else nothing


def _attention_backward_fake(d_out: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    pos_weight, gate = rest[4:6]
    return *(_heads_last(q) for _ in range(3)), torch.empty_like(pos_weight), torch.empty_like(gate)


for _name, _fake in (
    ("relative_position_tables", _tables_fake),
    ("relative_position_tables_backward", _tables_backward_fake),
    ("dense_position_table", _dense_fake),
    ("gated_attention", _attention_fake),
    ("gated_attention_backward", _attention_backward_fake),
):
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)


def _tables_gradient(*tensors: Tensor) -> Tensor:
    """The gradient of pos_weight, (H, 3), from the tables (H, height, height) and (H, width, width), after theirs."""
    plain = why_not(*tensors)
    function = eager_tables.relative_position_tables_backward if plain else relative_position_tables_backward
    return function(*tensors)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)


def _tables_vjp(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor, None, None]:
    return _tables_gradient(grad_row, grad_col, *ctx.saved_tensors), None, None


torch.library.register_autograd(
    add_op_namespace_prefix("relative_position_tables"), _tables_vjp, setup_context=_save_tables, lib=_library
)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pos_weight, ctx.height, ctx.width, _ = inputs
    ctx.save_for_backward(pos_weight)


def _dense_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (pos_weight,) = ctx.saved_tensors
    height, width = ctx.height, ctx.width
    row_table, col_table = relative_position_tables(pos_weight, height, width)
    grad = grad[..., : height * width].to(row_table.dtype)  # (H, N, N), without the padding
    grad = grad.reshape(-1, height, width, height, width)  # (H, query y, query x, key y, key x)
    grad_row = torch.einsum("hyxuw,hxw->hyu", grad, col_table)
    grad_col = torch.einsum("hyxuw,hyu->hxw", grad, row_table)
    return _tables_gradient(grad_row, grad_col, row_table, col_table), None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("dense_position_table"), _dense_vjp, setup_context=_save_weight, lib=_library
)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, pos_weight, gate, *ctx.settings, philox, _ = inputs
    _, lse, content = output
    ctx.mark_non_differentiable(lse, content)
    ctx.has_philox = philox is not None
    saved = (q, k, v, content, lse, pos_weight, gate)
    ctx.save_for_backward(*saved, philox) if ctx.has_philox else ctx.save_for_backward(*saved)


def _attention_vjp(ctx: Any, d_out: Tensor, d_lse: Tensor, d_content: Tensor) -> tuple[Tensor | None, ...]:
    if torch._C._len_torch_dispatch_stack() > 0:
        tell_counters()
    saved = ctx.saved_tensors
    philox = saved[7] if ctx.has_philox else None
    return *gated_attention_backward(d_out, *saved[:7], *ctx.settings, philox), *(None,) * 6


torch.library.register_autograd(
    add_op_namespace_prefix("gated_attention"), _attention_vjp, setup_context=_save_attention, lib=_library
)


def _save_tables_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _tables_second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    formula = eager_tables.relative_position_tables_backward
    return eager_attention.differentiable_gradients(formula, ctx.saved_tensors, grad)


torch.library.register_autograd(
    add_op_namespace_prefix("relative_position_tables_backward"),
    _tables_second,
    setup_context=_save_tables_backward,
    lib=_library,
)


def _save_attention_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_out, q, k, v, _, _, pos_weight, gate, ctx.height, ctx.width, ctx.scale, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(d_out, q, k, v, pos_weight, gate)


def _attention_second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.dropout_p > 0:
        raise NotImplementedError("dropout in the fused kernels has no second derivative: take backend='reference'")

    def first(d_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, pos_weight, gate = inputs
        out = eager_attention.gated_attention(q, k, v, pos_weight, gate, ctx.height, ctx.width, ctx.scale)
        return torch.autograd.grad(out, inputs, d_out, create_graph=True)

    found = eager_attention.differentiable_gradients(first, ctx.saved_tensors, grads)
    return *found[:4], None, None, *found[4:], *(None,) * 5


torch.library.register_autograd(
    add_op_namespace_prefix("gated_attention_backward"),
    _attention_second,
    setup_context=_save_attention_backward,
    lib=_library,
)


def _samples_as_heads(op: Callable[..., Any], heads_in: tuple[int, ...], heads_out: tuple[int, ...]) -> Any:
    """torch.func.vmap's rule for an op: one call, in which each sample has heads of its own.

    Args:
        heads_in, heads_out: which dimension is that of the heads, of each of the first arguments and of each result.
    """

    def fold(value: Tensor, dim: int | None, heads: int, samples: int) -> Tensor:
        if value.dim() - (dim is not None) <= heads:  # empty, in place of something that is not needed
            return value
        each = value.expand(samples, *value.shape) if dim is None else value.movedim(dim, 0)
        return each.movedim(0, heads).flatten(heads, heads + 1)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        first = len(heads_in)
        philox = next((at for at in range(first, len(args)) if isinstance(args[at], Tensor)), None)
        if philox is not None:
            if in_dims[philox] is None:
                raise NotImplementedError(
                    'the fused kernels draw each sample its own dropout: give vmap randomness="different"'
                )
            args = (*args[:philox], args[philox].select(in_dims[philox], 0), *args[philox + 1 :])
        samples = info.batch_size
        folded = [fold(*each, samples) for each in zip(args, in_dims, heads_in, strict=False)]
        results = op(*folded, *args[first:])
        several = isinstance(results, tuple)
        found, dims = [], []
        for result, heads in zip(results if several else (results,), heads_out, strict=True):
            absent = result.dim() <= heads
            found.append(result if absent else result.unflatten(heads, (samples, -1)))
            dims.append(None if absent else heads)
        return (tuple(found), tuple(dims)) if several else (found[0], dims[0])

    return rule


for _op, _heads_in, _heads_out in (
    (relative_position_tables, (0,), (0, 0)),
    (relative_position_tables_backward, (0, 0, 0, 0), (0,)),
    (dense_position_table, (0,), (0,)),
    (gated_attention, (1, 1, 1, 0, 0), (1, 1, 1)),
    (gated_attention_backward, (1, 1, 1, 1, 1, 1, 0, 0), (1, 1, 1, 0, 0)),
):
    torch.library.register_vmap(_op, _samples_as_heads(_op, _heads_in, _heads_out), lib=_library)
