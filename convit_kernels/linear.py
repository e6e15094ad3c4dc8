"""Linear layers by oneDNN, where PyTorch's own go to a slower library.

PyTorch gives a float32 linear layer to MKL, which takes AVX2 on processors of AMD that have AVX-512; oneDNN takes
AVX-512 there. What that is worth depends on the processor, and so a short trial decides: on a Zen 5 oneDNN was 2.1 to
2.2 times faster forward and 1.5 to 2.1 backward, on a Zen 4 no faster forward and slower backward.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIABLE = "CONVIT_KERNELS_ONEDNN"  # 1: wherever it works, 0: never; else where a trial finds it faster
FASTER = 1.15  # oneDNN is taken where it is so many times as fast in each product of a trial: less may be noise
DISTURBED = 0.002  # seconds: a product that takes longer (0.3 ms on a Zen 4) waited for threads, and tells nothing
_T = TypeVar("_T")


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


def _once_apart(function: Callable[[], _T]) -> Callable[[], _T]:
    """The function, called once a process, in a thread of its own, and its result kept.

    A new thread has none of the modes that the caller may be under: autocast, fake tensors, torch.func's transforms,
    another default device, tracing, a profile.
    """

    @lru_cache(maxsize=1)
    def apart() -> _T:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(function).result()

    lock = threading.Lock()  # callers of several threads wait for one trial

    @wraps(function)
    def once() -> _T:
        with lock:
            return apart()

    return once


@_once_apart
def works() -> bool:
    """Whether this build of PyTorch has the product, and its result is right."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (6, 12, 4))
    x, weight = x.view(2, 3), weight.view(4, 3)
    try:
        return torch.equal(onednn_linear(x, weight, bias), x @ weight.t() + bias)
    except (RuntimeError, TypeError):  # a signature of another version
        return False


def _trial() -> dict[str, tuple[float, float]]:
    """Seconds of PyTorch's own product and of oneDNN's: forward, and for the gradients of x and of the weight.

    The layer is that of queries and keys in ConViT-Ti, with an image's tokens for each thread, up to 8: 29 MFLOP a
    thread. Of some processor times of this thread the least counts: it depends little on what else the machine does.
    """
    rows, channels, out = 196 * min(torch.get_num_threads(), 8), 192, 384
    # ones: the generator of random numbers is the user's
    x, weight, grad = (
        torch.ones(*size, dtype=torch.float32, device="cpu")
        for size in ((rows, channels), (out, channels), (rows, out))
    )
    products = {"forward": (x, weight), "for the gradient of x": (grad, weight.t()), "of the weight": (grad.t(), x.t())}
    ways: tuple[Callable[..., Tensor], ...] = F.linear, onednn_linear
    seconds = {}
    for name, (left, right) in products.items():
        times: tuple[list[float], list[float]] = [], []
        for _ in range(6):
            for way, taken in zip(ways, times, strict=True):
                begin = time.thread_time()
                way(left, right, None)
                taken.append(time.thread_time() - begin)
        seconds[name] = min(times[0][1:]), min(times[1][1:])  # the first call prepares what the others use
    return seconds


@_once_apart
def _faster() -> tuple[bool, str]:
    """Whether oneDNN is faster here, and by which figures."""
    seconds = _trial()
    figures = ", ".join(
        f"{1e3 * plain:.2f} and {1e3 * onednn:.2f} ms {name}" for name, (plain, onednn) in seconds.items()
    )
    taken = all(FASTER * onednn < plain < DISTURBED for plain, onednn in seconds.values())
    return taken, (
        f"a trial with {torch.get_num_threads()} threads took PyTorch and oneDNN {figures}; oneDNN is taken "
        f"where it is {FASTER} times as fast in each, and none takes {1e3 * DISTURBED:g} ms"
    )


def choice() -> tuple[bool, str]:
    """Whether float32 linear layers on the CPU go to oneDNN, and why or why not.

    The environment variable and PyTorch's own switch are read at each call. Without the variable a trial of about ten
    milliseconds decides, once a process, at the first call.

    Raises:
        ValueError: the environment variable has another value than 0, 1 or nothing.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={wish}: allowed are 0, 1, and nothing for the faster one")
    if wish == "0":
        return False, f"{VARIABLE}=0"
    if not torch.backends.mkldnn.enabled:
        return False, "torch.backends.mkldnn.enabled is False"
    if not works():
        return False, "this build of PyTorch has no such product"
    return (True, f"{VARIABLE}=1") if wish else _faster()


def _hooks_on_every_module() -> bool:
    """Whether there are others than those of torch's ModuleTracker, which notes whose turn it is for a FLOP counter."""
    module = nn.modules.module
    if not module._has_any_global_hook():
        return False
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, f"_global_{kind}").values()]
    return not all(type(getattr(hook, "__self__", None)).__name__ == "ModuleTracker" for hook in hooks)


def why_not_plain(layer: nn.Module, *kinds: type[nn.Module]) -> str:
    """Why calling the layer is more than the forward of one of these classes on what it holds; "" when it is not."""
    if type(layer) not in kinds:
        return f"is a {type(layer).__name__}, not an nn.{kinds[0].__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks"
    # the class's own is what accelerate leaves there when it takes its hooks off
    if "forward" in vars(layer) and vars(layer)["forward"] != type(layer).forward.__get__(layer):
        return "has a forward of its own"
    if _hooks_on_every_module():
        return "is seen by hooks on every module"
    return ""


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by oneDNN where it is taken, and the layer and x are such as it takes.

    torch.compile and torch.export see the layer itself: inductor has its own way to oneDNN.
    """
    if (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # it does not know the op
        and isinstance(layer, nn.Linear)
        and not why_not_plain(layer, nn.Linear)
        and not nn.modules.module._has_any_global_hook()  # a FLOP counter does not know oneDNN's product
        and type(layer.weight) is nn.Parameter
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() > 0  # the gradient of the weight would be a product over nothing
        and not torch.is_autocast_enabled("cpu")
        and choice()[0]  # the last, since it may take a trial
    ):
        out: Tensor = onednn_linear(x, layer.weight, layer.bias)
    else:
        out = layer(x)
    return out
