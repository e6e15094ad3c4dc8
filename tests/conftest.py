"""What every test runs under."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton's interpreter is chosen for a whole process: those tests have one of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

# The order of torch's sums follows the number of threads, and with it the one draw of eager's rounding that ours is
# held to: with as many threads everywhere, a suite that passes here passes on other machines.
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an output that a kernel does not write shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def idx_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Fashion-MNIST's files with a data set that a tiny model learns in seconds."""
    from tiny_images import write_all  # needs the examples' libraries, which not every environment has

    return write_all(tmp_path_factory.mktemp("idx"))
