"""From a launch to a binary: records what a launcher launches and compiles it for a device that need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """The limits of one architecture. CUDA: CUDA C++ programming guide, "Compute capabilities"; AMD: the white papers
    of CDNA 2 to 4, the RDNA 4 instruction set's guide, and LLVM's guide for AMDGPU for how registers are given out.
    ``shared_*`` in bytes, registers are 32-bit."""

    backend: str
    arch: int | str
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int  # what the runtime takes of it for each block
    max_warps: int
    max_blocks: int
    registers: int = 65536
    tensor_memory: int = 0  # columns, sm_100 only
    schedulers: int = 4  # SIMDs
    lane_registers: int = 512  # AMD: of one lane of a SIMD, for all of its waves
    lane_granule: int = 8  # AMD: they are given to a wave in units of so many

    @property
    def warp_size(self) -> int:
        return 64 if str(self.arch).startswith("gfx9") else 32

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


DEVICES = {
    "sm_75": Device("cuda", 75, 64 * KIB, 64 * KIB, 0, max_warps=32, max_blocks=16),
    "sm_80": Device("cuda", 80, 163 * KIB, 164 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_86": Device("cuda", 86, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=16),
    "sm_89": Device("cuda", 89, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "sm_90": Device("cuda", 90, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_100": Device("cuda", 100, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32, tensor_memory=512),
    "sm_120": Device("cuda", 120, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "gfx90a": Device("hip", "gfx90a", 64 * KIB, 64 * KIB, 0, max_warps=32, max_blocks=32),
    "gfx942": Device("hip", "gfx942", 64 * KIB, 64 * KIB, 0, max_warps=32, max_blocks=32),
    "gfx950": Device("hip", "gfx950", 160 * KIB, 160 * KIB, 0, max_warps=32, max_blocks=32),
    "gfx1200": Device(
        "hip",
        "gfx1200",
        64 * KIB,
        64 * KIB,
        0,
        max_warps=32,
        max_blocks=16,
        schedulers=2,
        lane_registers=1536,
        lane_granule=24,
    ),
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


def _specialize(launch: Launch, backend: str) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """The signature, the constants and the attributes that Triton's own launch would derive from the arguments.

    Pointers count as aligned to 16 bytes when the recorded ones are, integers are constants when 1 and carry their
    divisibility by 16. Parameters that the kernel asks not to specialize stay plain.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        hints: list[Any] = []
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if aligned and value.data_ptr() % 16 == 0:
                hints.append(["tt.divisibility", 16])
            if backend == "hip" and not parameter.do_not_specialize and value.untyped_storage().size() <= 2**31 - 1:
                hints.append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if aligned and value % 16 == 0:
                hints.append(["tt.divisibility", 16])
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            raise TypeError(f"{launch.name}: cannot specialize {name} = {value!r}")
        if hints:
            attributes[index,] = hints
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
