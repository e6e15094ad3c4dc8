"""The tests of the Triton kernels by a second executor, without a GPU: `make ttsem`.

Triton's interpreter runs the kernels' Python. ttsem compiles each launch with Triton's own frontend, for a GPU, and
executes what comes out on the CPU; it stops at an access outside of a tensor and where two programs meet at an element
that one of them writes. To the tests every tensor is on a GPU then, but not to PyTorch's dispatcher: only what launches
kernels itself reaches them.
"""

import runpy
import sys

import torch


class Generator(torch.Generator):
    """Of the CPU, whatever GPU is asked for: ttsem replaces devices everywhere but here."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        return super().__new__(cls)


if __name__ == "__main__":
    torch.Generator = Generator  # type: ignore[assignment,misc]
    sys.argv[1:1] = ["pytest", "--device", "cuda", "-p", "no:cacheprovider", "-k", "not mutant"]
    runpy.run_module("ttsem.sanitize", run_name="__main__")
