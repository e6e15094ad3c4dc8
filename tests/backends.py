"""Every backend that can run here, for tests of each, and the call that they test."""

import pytest
import torch
from equivalence import Inputs

import convit_kernels as ck

AVAILABLE = [backend.name for backend in ck.backends() if backend.available]
EACH_BACKEND = pytest.mark.parametrize("backend", AVAILABLE)
# those that take float64
EACH_EXACT_BACKEND = pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "triton"])
FAST = [name for name in AVAILABLE if name != "reference"]
EACH_FAST_BACKEND = pytest.mark.parametrize("backend", FAST)


def attend(inputs: Inputs, grid, backend=None, scale=None, **options) -> torch.Tensor:
    return ck.gpsa_attention(*inputs[:5], grid_size=grid, scale=scale, backend=backend, **options)
