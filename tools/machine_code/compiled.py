"""From a launch to a binary: records what a launcher launches and compiles it for a device that need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelParam

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """The limits of one architecture. CUDA: CUDA C++ programming guide, "Compute capabilities"; AMD: the CDNA 3 and 4
    white papers. ``shared_*`` in bytes, registers are 32-bit."""

    backend: str
    arch: int | str
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int  # what the runtime takes of it for each block
    max_warps: int
    max_blocks: int
    registers: int = 65536
    tensor_memory: int = 0  # columns, sm_100 only

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


DEVICES = {
    "sm_80": Device("cuda", 80, 163 * KIB, 164 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_86": Device("cuda", 86, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=16),
    "sm_89": Device("cuda", 89, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "sm_90": Device("cuda", 90, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_100": Device("cuda", 100, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32, tensor_memory=512),
    "sm_120": Device("cuda", 120, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "gfx942": Device("hip", "gfx942", 64 * KIB, 64 * KIB, 0, max_warps=32, max_blocks=32),
    "gfx950": Device("hip", "gfx950", 160 * KIB, 160 * KIB, 0, max_warps=32, max_blocks=32),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as the launcher made it: the kernel, its arguments by name, the grid and the compiler's options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those among the arguments, within tuples too."""
        flat = [item for value in self.arguments.values() for item in (value if isinstance(value, tuple) else (value,))]
        return [item for item in flat if isinstance(item, torch.Tensor)]


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within this context launches of Triton kernels are recorded in the yielded list, and not run.

    Tensors may live on any device: nothing reads or writes them.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("machine code needs compiled kernels: start a process without TRITON_INTERPRET")
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kernel.arg_names if name in kwargs})
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        options = {name: value for name, value in kwargs.items() if name not in arguments}
        cells = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel, arguments, tuple(cells), options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _specialize(launch: Launch, backend: str) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """The signature, the constants and the attributes that Triton's own launch would derive from the arguments.

    Pointers count as aligned to 16 bytes when the recorded ones are, integers are constants when 1 and carry their
    divisibility by 16. Parameters that the kernel asks not to specialize stay plain. What lies in a tuple has a path of
    indices.
    """
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def kind(value: Any, path: tuple[int, ...], parameter: KernelParam) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            kinds = [kind(item, (*path, index), parameter) for index, item in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if parameter.is_constexpr or isinstance(value, tl.constexpr):
            constants[path] = value
            return "constexpr"
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        hints: list[Any] = []
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            name = "*" + _TYPES[value.dtype]
            if aligned and value.data_ptr() % 16 == 0:
                hints.append(["tt.divisibility", 16])
            if backend == "hip" and not parameter.do_not_specialize and value.untyped_storage().size() <= 2**31 - 1:
                hints.append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            name = "u1"
        elif isinstance(value, int):
            name = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if aligned and value % 16 == 0:
                hints.append(["tt.divisibility", 16])
        elif isinstance(value, float):
            name = parameter.annotation_type or "fp32"
        else:
            raise TypeError(f"{launch.name}: cannot specialize {parameter.name} = {value!r}")
        if hints:
            attributes[path] = hints
        return name

    signature = {
        parameter.name: kind(launch.arguments[parameter.name], (index,), parameter)
        for index, parameter in enumerate(launch.kernel.params)
    }
    return signature, constants, attributes


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def compile_launch(launch: Launch, device: str) -> Any:
    """Compiles one recorded launch for ``device``, a key of `DEVICES`: Triton's CompiledKernel, never loaded."""
    limits = DEVICES[device]
    signature, constants, attributes = _specialize(launch, limits.backend)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=limits.target, options=dict(launch.options))
