"""Linear layers by oneDNN, where PyTorch's own go to a slower library.

PyTorch gives a float32 linear layer to MKL, which takes AVX2 on processors of AMD that have AVX-512; oneDNN takes
AVX-512 there. On a Zen 5 it was 2.1 to 2.2 times faster forward and 1.5 to 2.1 backward; with AVX2 alone it is not.
"""

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VARIABLE = "CONVIT_KERNELS_ONEDNN"  # 1: wherever it works, 0: never; else where it is known to be faster


class _OnednnLinear(torch.autograd.Function):
    """F.linear of float32 tensors on the CPU, differentiable any number of times, forwards too, and under torch.func.

    The weight is read anew in each call: nothing of it is kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # private, but the only way to oneDNN's product of ordinary tensors: `works` tests for it
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        return (
            onednn_linear(grad, weight.t(), None) if needs_x else None,
            onednn_linear(grad_rows.t(), rows.t(), None) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        out: Tensor = x.new_zeros(*x.shape[:-1], weight.shape[0])
        if d_x is not None:
            out = out + onednn_linear(d_x, weight, d_bias)
        elif d_bias is not None:
            out = out + d_bias
        if d_weight is not None:
            out = out + onednn_linear(x, d_weight, None)
        return out


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out), x with at least two dimensions."""
    return _OnednnLinear.apply(x, weight, bias)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def works() -> bool:
    """Whether this build of PyTorch has the product, and its result is right."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        return torch.equal(onednn_linear(x, weight, bias), x @ weight.t() + bias)
    except (RuntimeError, TypeError):  # a signature of another version
        return False


@lru_cache(maxsize=1)
def _known_to_be_faster() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    amd = platform.machine() == "x86_64" and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def wanted() -> bool:
    """Whether linear layers are to go to oneDNN here.

    Raises:
        ValueError: the environment variable has another value than 0, 1 or nothing.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={wish}: allowed are 0, 1, and nothing for the faster one")
    chosen = wish == "1" or (wish == "" and _known_to_be_faster())
    return chosen and bool(torch.backends.mkldnn.enabled) and works()


def why_not_plain(layer: nn.Module, *kinds: type[nn.Module]) -> str:
    """Why calling the layer is more than the forward of one of these classes on what it holds; "" when it is not."""
    if type(layer) not in kinds:
        return f"is a {type(layer).__name__}, not an nn.{kinds[0].__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks"
    if "forward" in vars(layer):
        return "has a forward of its own"
    if nn.modules.module._has_any_global_hook():
        return "is seen by hooks on every module"
    return ""


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by oneDNN where it is wanted, and the layer and x are such as it takes.

    torch.compile and torch.export see the layer itself: inductor has its own way to oneDNN.
    """
    if (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # it does not know the op
        and wanted()
        and isinstance(layer, nn.Linear)
        and not why_not_plain(layer, nn.Linear)
        and type(layer.weight) is nn.Parameter
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() > 0  # the gradient of the weight would be a product over nothing
        and not torch.is_autocast_enabled("cpu")
    ):
        out: Tensor = onednn_linear(x, layer.weight, layer.bias)
    else:
        out = layer(x)
    return out
