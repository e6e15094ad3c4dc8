"""The tables' CUDA kernels, compiled for the CPU: csrc/tables/cuda.cu, with cuda_runtime.h of this folder.

CXXFLAGS are added to the compiler's: a sanitizer's, where the process runs under one.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch

from convit_kernels.schemas import NAMESPACE, SCHEMAS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "csrc" / "tables" / "cuda.cu"
OPS = ("relative_position_tables", "relative_position_tables_backward", "dense_position_table")
SPACE = f"{NAMESPACE}_cuda_on_cpu"
COMPILER = os.environ.get("CXX", "g++")
REWRITTEN = {
    r"(\w+<[\w, ]+>)<<<(.*)>>>\(": r"cuda_on_cpu::launch(\1, \2, ",
    r"extern __shared__ (\w+) (\w+)\[\];": r"\1* \2 = static_cast<\1*>(cuda_on_cpu::team->dynamic_shared(__LINE__));",
    r"__shared__ (\w+) (\w+)((?:\[\w+\])+);": (
        r"using \2_t = \1\3; \2_t& \2 = *static_cast<\2_t*>(cuda_on_cpu::team->shared(__LINE__, sizeof(\2_t)));"
    ),
}


def why_not() -> str:
    """Why the kernels cannot be compiled here; "" where they can."""
    if not SOURCE.exists():
        return "needs the source tree"
    if shutil.which(COMPILER) is None:
        return f"needs a C++ compiler: there is no {COMPILER}"
    program = "#include <barrier>\nint main() { std::barrier<> here(1); }"
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=program, text=True, capture_output=True, env=_environment()).returncode:
        return f"needs a compiler of C++20: {COMPILER} is none"
    return ""


def _environment() -> dict[str, str]:
    """That of the compiler, which needs no sanitizer."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def compiled() -> Path:
    """The library of the ops, in build/ until one of its sources changes.

    Raises:
        subprocess.CalledProcessError: the compiler, whose output says why.
    """
    source = SOURCE
    text = source.read_text()
    for pattern, replacement in REWRITTEN.items():
        text, count = re.subn(pattern, replacement, text)
        assert count > 0, f"{source} has no {pattern}"
    assert "__shared__" not in text and "<<<" not in text, f"{source} has what cuda_on_cpu cannot read"
    torch_root = Path(torch.__file__).parent
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-g1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wno-sign-compare",
        "-Wno-unknown-pragmas",
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-DCONVIT_KERNELS_NAMESPACE={SPACE}"]
    command += [f"-I{HERE}", f"-iquote{source.parent}", f"-isystem{torch_root / 'include'}"]
    command += [*os.environ.get("CXXFLAGS", "").split(), "-x", "c++", "-", "-x", "none"]
    command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"]
    parts = [" ".join(command), torch.__version__, text, (HERE / "cuda_runtime.h").read_text()]
    parts += [path.read_text() for path in sorted(source.parents[1].rglob("*.h"))]
    library = ROOT / "build" / "cuda_on_cpu" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        text = f'#line 1 "{source.relative_to(source.parents[2])}"\n{text}'
        subprocess.run([*command, "-o", str(unfinished)], input=text, text=True, check=True, env=_environment())
        unfinished.replace(library)
    return library


@cache
def ops() -> ModuleType:
    """The namespace with the tables' ops, of CUDA's kernels on CPU tensors."""
    library = torch.library.Library(SPACE, "DEF")
    for name in OPS:
        library.define(name + SCHEMAS[name])
    torch.ops.load_library(compiled())
    space: ModuleType = getattr(torch.ops, SPACE)
    space.library = library  # the ops live as long as it
    return space


@contextmanager
def in_place_of_the_cpu_s(space: ModuleType) -> Iterator[None]:
    """Within it the package's ops on CPU tensors are those of `space`."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in OPS:
        library.impl(name, partial(getattr(space, name).default.redispatch, cpu), "CPU")
    try:
        yield
    finally:
        library._destroy()
