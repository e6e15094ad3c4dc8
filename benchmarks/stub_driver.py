"""A driver of a GPU that is not there: Triton compiles for it, loads and launches, and nothing is run."""

from collections.abc import Iterator
from contextlib import contextmanager

import triton
from triton.backends.compiler import GPUTarget


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, *binary: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 128, 0, 1024  # module, function, registers, spills, the most threads

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *launch: object) -> None:
        pass


class StubDriver:
    """What Triton asks a driver for, answered as an H100 would."""

    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def active() -> Iterator[None]:
    """Within this context Triton uses the stub."""
    config = triton.runtime.driver
    before, config._active = config._active, StubDriver()
    try:
        yield
    finally:
        config._active = before
