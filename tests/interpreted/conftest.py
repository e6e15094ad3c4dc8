"""The Triton kernels on the device of --device: interpreted on the CPU, compiled on a GPU.

The interpreter is chosen for a whole process: run the folder by itself, with TRITON_INTERPRET=1. It watches the memory
of every kernel.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from guard import Guard, watching


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: needs Triton's interpreter, on whatever machine")
    if config.getoption("--device") == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise pytest.UsageError("without a GPU the kernels are interpreted: set TRITON_INTERPRET=1")
        import interpreter  # noqa: F401


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--device") != "cpu" and item.get_closest_marker("interpreter"):
        pytest.skip("needs Triton's interpreter")


@pytest.fixture(autouse=True)
def guard(device: torch.device) -> Iterator[Guard]:
    """On the CPU every kernel is watched; elsewhere tensors are made on the device."""
    if device.type == "cpu":
        with watching() as guard:
            yield guard
    else:
        with device:
            yield Guard()
