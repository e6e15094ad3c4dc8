"""Launches of the kernels: at first Triton's own, then by a shorter way for arguments that are alike.

`kernel[grid](...)` binds and inspects every argument, and makes a text of it all to look the compiled kernel up with,
at each launch: longer than a small kernel takes on the GPU. Here the compiled kernel is kept under a key that needs no
inspection. It holds each argument itself; only a tensor stands there as what Triton compiles for, its dtype and whether
its address divides by 16. So equal keys are the same kernel to Triton, too.

The short way is for CUDA, whose compiler asks no more of a tensor. It is left to Triton whenever something watches a
launch or takes part in it (hooks, debugging, instrumentation), replaces it (the interpreter, a recorder), or is not
known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_RUN = JITFunction.run
_MOST = 4096  # sizes and strides are part of a key: a process that sees ever new ones starts over


class _Kept(NamedTuple):
    kernel: Any  # kept, as the key has its id
    compiled: Any
    constants: tuple[Any, ...]  # in the order of the kernel's parameters
    caches: Any  # Triton's own, where the compiled kernel is from
    read: list[tuple[dict[str, Any], str, Any]]  # the global values that went into its code

    def holds(self, device: int) -> bool:
        """Whether Triton, too, would find this kernel, and would not complain of a global that has changed."""
        for space, name, value in self.read:
            if space.get(name) is not value:
                return False
        return self.kernel.device_caches.get(device) is self.caches


_kept: dict[tuple[Any, ...], _Kept] = {}


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many elements. As `triton.cdiv`, which takes a microsecond outside a kernel."""
    return -(-size // block)


def _silent(hook: Any) -> bool:
    """Whether nobody is called: a chain of hooks without any."""
    return hook is None or getattr(hook, "calls", None) == []


def _alone(kernel: Any) -> bool:
    """Whether a launch is nothing but a launch: of a compiled kernel, with nobody watching or taking part."""
    runtime = knobs.runtime
    return (
        type(kernel) is JITFunction
        and JITFunction.run is _RUN
        and not kernel.pre_run_hooks
        and not kernel.debug
        and not runtime.debug
        and _silent(runtime.launch_enter_hook)
        and _silent(runtime.launch_exit_hook)
        and getattr(runtime, "add_stages_inspection_hook", None) is None
        and not getattr(knobs.compilation, "instrumentation_mode", "")
    )


def described(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What of the arguments is in the key; None where one is neither tensor, number, None nor constant, nor a tuple."""
    found: list[Any] = []
    return tuple(found) if _describe(arguments, found.append) else None


def _describe(arguments: tuple[Any, ...], add: Callable[[Any], None]) -> bool:
    for value in arguments:
        kind = type(value)
        if kind is int or value is None:
            add(value)
        elif kind is Tensor or kind is Parameter:
            add(value.dtype)
            add(value.data_ptr() % 16 == 0)
        elif kind is float or kind is bool:  # which equal an int
            add(kind)
            add(value)
        elif kind is constexpr:
            add(kind)
            add(value.value)
        elif isinstance(value, tuple):
            add(kind)
            add(len(value))
            if not _describe(value, add):
                return False
        else:
            return False
    return True


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """What ``kernel[grid](*arguments, **constants)`` does.

    Args:
        kernel: a function of `triton.jit`.
        grid: the programs along both axes.
        arguments: the kernel's first parameters: tensors, numbers, None, `tl.constexpr`, and tuples of those.
        constants: the others, all `tl.constexpr`, and the compiler's options, num_warps for example.
    """
    described_arguments = described(arguments) if _alone(kernel) else None
    if described_arguments is None:
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    key = (id(kernel), device, described_arguments, *constants, *constants.values())
    kept = _kept.get(key)
    if kept is None or not kept.holds(device):
        _keep(key, device, kernel, kernel[grid](*arguments, **constants), len(arguments), constants)
        return
    compiled = kept.compiled
    compiled.run(
        *grid, 1, active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *arguments, *kept.constants,
    )  # fmt: skip


def _keep(key: tuple[Any, ...], device: int, kernel: Any, compiled: Any, given: int, constants: dict[str, Any]) -> None:
    """Keeps a kernel that Triton has compiled and launched; one that is no ordinary kernel of CUDA it leaves."""
    names = kernel.arg_names[given:]
    if type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda":
        return
    if not constants.keys() >= set(names):  # a default that the key does not hold
        return
    if len(_kept) >= _MOST:
        _kept.clear()
    read = [(space, name, space.get(name)) for (name, _), (_, space) in kernel.used_global_vals.items()]
    values = tuple(constants[name] for name in names)
    _kept[key] = _Kept(kernel, compiled, values, kernel.device_caches.get(device), read)
