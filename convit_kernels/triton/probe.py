"""Whether Triton compiles for an architecture, found out by letting it: ``python probe.py BACKEND ARCHITECTURE``.

A program of its own, which imports nothing of the package: LLVM ends the whole process where it does not know a target.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def nothing():
    pass


if __name__ == "__main__":
    backend, architecture = sys.argv[1:]
    if backend == "cuda":
        target = GPUTarget(backend, int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget(backend, architecture, 64 if architecture.startswith("gfx9") else 32)
    triton.compile(ASTSource(nothing, {}, {}), target=target)
