"""Time and memory of a call, and what the machine could do at best."""

import ctypes
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop on stderr


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation; of one value, that value thrice."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(tenths[1], tenths[4], tenths[7])


def milliseconds(seconds: float) -> str:
    """Three or more significant digits, without a unit."""
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


@lru_cache(maxsize=1)
def _cold_lines(device: str) -> torch.Tensor:
    properties = torch.cuda.get_device_properties(device)
    return torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device=device)


def flush_cache(device: str) -> None:
    """Empties a GPU's L2 by writing four times its size, so that no implementation finds another's tensors there.

    A CPU's caches are left alone: implementations run in turn, and each finds what the one before it left.
    """
    if is_cuda(device):
        _cold_lines(device).zero_()


def seconds(function: Call, device: str) -> float:
    """The time of one call: between two events on a GPU, by the clock elsewhere."""
    if is_cuda(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def rounds_within(budget: float, once: float) -> int:
    """How many rounds of `once` seconds are done in about `budget` seconds: no fewer than five, or three slow ones."""
    fewest = 3 if once > 2.0 else 5
    return int(min(max(budget / once, fewest), 50))


def interleaved(
    functions: Mapping[str, Call], device: str, rounds: int, step: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call, one of each implementation in turn, so that a change of the machine's pace meets all alike.

    Calls `step` after each round; warming up is up to the caller.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            flush_cache(device)
            samples[name].append(seconds(function, device))
        step()
    return samples


def memory_over_time(recorded: profile, device: str) -> list[tuple[float, int]]:
    """Each allocation and release of torch's allocator on a device, in order: microseconds, bytes in use from then on.

    `recorded` is a finished profile with profile_memory; both numbers count from its start.
    """
    results: Any = recorded.profiler.kineto_results  # type: ignore[union-attr]
    kind = torch._C._autograd.DeviceType.CUDA if is_cuda(device) else torch._C._autograd.DeviceType.CPU
    events = [event for event in results.events() if event.name() == "[memory]" and event.device_type() == kind]
    in_use, curve = 0, []
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        curve.append(((event.start_ns() - results.trace_start_ns()) / 1e3, in_use))
    return curve


def peak_memory(function: Call, device: str) -> int:
    """Bytes torch's allocator holds at the highest point of one call, beyond what it held before.

    Scratch that a library allocates by itself is not in it: see `peak_resident`.
    """
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    return max((in_use for _, in_use in memory_over_time(recorded, device)), default=0)


def _resident(field: str) -> int:
    line = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line[1]) * 1024 if line else 0


def peak_resident(function: Call) -> int | None:
    """Bytes by which the process itself grows at the highest point of one call: also memory of no torch allocator.

    None where the system does not tell (it is Linux that does). Small amounts are lost in the heap's own slack, and a
    GPU's memory is not in it.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the heap still holds what earlier calls have given back
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


class DoesNotFitError(Exception):
    """A call needs more memory than the machine has; the text says what it asked for."""


@contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """Within it, asking for more memory than is free raises DoesNotFitError.

    On a CPU the system would otherwise end the process: the address space is limited to what is in use and free now.
    """
    limited = not is_cuda(device) and Path("/proc/meminfo").exists()
    if limited:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 if available else 0
        limit = _resident("VmSize") + int(0.9 * free)
        limits = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "can't allocate memory" in str(error) or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise DoesNotFitError(str(error).splitlines()[0]) from error
        raise
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Peak(NamedTuple):
    """The most that a device was seen to do: floating-point operations or bytes a second, and how it was found."""

    rate: float
    how: str


def _best(function: Call, device: str, work: float) -> float:
    """Work a second in the fastest of at least five calls and a third of a second."""
    function()
    times = [seconds(function, device) for _ in range(5)]
    while sum(times) < 1 / 3:
        times.append(seconds(function, device))
    return work / min(times)


@lru_cache
def matrix_product(device: str, dtype: torch.dtype, side: int) -> Peak:
    """FLOP/s of a square matrix product by the fastest of the libraries that torch has for the device.

    Multiply and add count as two.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    rates = {"torch.mm": _best(lambda: torch.mm(a, b, out=out), device, 2.0 * side**3)}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is not None and not is_cuda(device) and torch.backends.mkldnn.is_available():
        # private, but the way to oneDNN where torch.mm goes to MKL; it lacks products that the processor lacks
        with suppress(RuntimeError):
            rates["oneDNN"] = _best(lambda: onednn(a, b, None, "none", [], ""), device, 2.0 * side**3)
    name = max(rates, key=lambda key: rates[key])
    return Peak(rates[name], f"{side} x {side} matrix product, {str(dtype)[6:]}, {name}")


@lru_cache
def arithmetic_peak(device: str, dtype: torch.dtype) -> Peak:
    """FLOP/s of the fastest large matrix product: those are bound by arithmetic. Real peaks are somewhat higher."""
    if is_cuda(device):
        return matrix_product(device, dtype, 8192)
    small = matrix_product(device, dtype, 512)
    sides = [side for side in (1024, 1536, 2048) if 2.0 * side**3 < small.rate]  # a second is enough
    return max((matrix_product(device, dtype, side) for side in sides), key=lambda peak: peak.rate, default=small)


@lru_cache
def memory_peak(device: str) -> Peak:
    """Bytes a second that copying a tensor far larger than any cache reads and writes."""
    size = 1 << (30 if is_cuda(device) else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peak(_best(lambda: target.copy_(source), device, 2.0 * size), f"copy of {size >> 20} MiB")
