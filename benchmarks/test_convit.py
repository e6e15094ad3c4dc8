"""Attention, GPSA layer and whole ConViT models: timm's, PyTorch's and ours, interleaved and checked.

    pytest benchmarks --benchmark-only               the default set, float32 and bfloat16, ten minutes on two cores
    pytest benchmarks --benchmark-only --sweep       also grids and batches, up to where memory ends
    pytest benchmarks --benchmark-only -k "layer and small"

No implementation of a task is timed before all of them are right. Each of its rounds is preceded by one of eager timm,
so that the ratio of the two is of the same minutes of the same machine. On a GPU the times are between events, after
the L2 has been flushed. docs/benchmarks/method.md says more.
"""

import time

import pytest
import torch
from tasks import CHECKED_TOKENS

from convit_kernels.bench.accuracy import Accuracy, WrongResultsError, judge, require_right
from convit_kernels.bench.implementations import EAGER, CannotRunError, Implementation, Task, build
from convit_kernels.bench.machine import machine
from convit_kernels.bench.measure import (
    DoesNotFitError,
    arithmetic_peak,
    flush_cache,
    memory_limit,
    memory_peak,
    peak_memory,
    peak_resident,
    rounds_within,
    seconds,
    spread,
)
from convit_kernels.bench.results import Row


class Group:
    """One task, its implementations, and how far each is from float64."""

    def __init__(self, task: Task, names: tuple[str, ...]) -> None:
        self.task = task
        self.implementations: dict[str, Implementation] = {}
        self.reasons: dict[str, str] = {}
        checked = task if task.tokens <= CHECKED_TOKENS else task._replace(batch=1)
        candidates = {}
        for name in dict.fromkeys((EAGER, *names)):
            try:
                self.implementations[name] = build(task, name)
                candidates[name] = self.implementations[name] if checked == task else build(checked, name)
            except CannotRunError as reason:
                self.reasons[name] = str(reason)
        self.accuracy: dict[str, Accuracy] = judge(checked, candidates)

    def check(self) -> None:
        """Fails where any implementation of the group is wrong."""
        try:
            require_right(self.accuracy)
        except WrongResultsError as reason:
            pytest.fail(str(reason), pytrace=False)


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest, log) -> Group:
    task, names = request.param
    if time.monotonic() > log.deadline:
        log.leave_out(task, names, "the set's minutes were spent: --minutes gives more")
    torch.compiler.reset()  # else earlier groups' versions of the same code use up the compiler's limit
    try:
        with memory_limit(task.device):
            return Group(task, names)
    except DoesNotFitError as reason:
        log.leave_out(task, names, f"out of memory: float64, which the check needs, does not fit: {reason}")


def test_convit(benchmark, group: Group, name: str, request: pytest.FixtureRequest, log) -> None:
    task, device = group.task, group.task.device
    group.check()
    if name in group.reasons:
        log.leave_out(task, [name], group.reasons[name])
    call, eager = (group.implementations[key].call(task.backward) for key in (name, EAGER))
    try:
        with memory_limit(device):
            resident = peak_resident(call)
            peak = peak_memory(call, device)
            once = seconds(call, device)
    except DoesNotFitError as reason:
        log.leave_out(task, [name], f"out of memory: {reason}")
    try:
        with memory_limit(device):
            eager()
            once += seconds(eager, device)
    except DoesNotFitError:
        eager = None

    times: list[float] = []
    eager_times: list[float] = []

    def before() -> None:
        if eager is not None:
            flush_cache(device)
            eager_times.append(seconds(eager, device))
        flush_cache(device)

    rounds = rounds_within(request.config.getoption("--row-seconds"), once)
    benchmark.group = str(task)
    benchmark.pedantic(lambda: times.append(seconds(call, device)), setup=before, rounds=rounds)

    p50 = spread(times).p50
    shares = {
        "arithmetic": task.flops() / p50 / arithmetic_peak(device, task.dtype).rate,
        "memory": task.bytes() / p50 / memory_peak(device).rate,
    }
    bound = max(shares, key=lambda kind: shares[kind])
    accuracy = group.accuracy.get(name)
    row = Row(
        group=str(task),
        implementation=name,
        seconds=times,
        eager_seconds=eager_times,
        error=accuracy and accuracy.error,
        eager_error=accuracy and accuracy.eager_error,
        allowed_error=accuracy and accuracy.allowed,
        peak_memory=peak,
        peak_resident=resident,
        gflops=task.flops() / p50 / 1e9,
        share_of_peak=shares[bound],
        bound=bound,
        peak=(arithmetic_peak(device, task.dtype) if bound == "arithmetic" else memory_peak(device)).how,
        part=task.part,
        model=task.model,
        batch=task.batch,
        tokens=task.tokens,
        backward=task.backward,
        dtype=str(task.dtype)[6:],
        device=device,
        load_1_minute=machine()["load_1_minute"],
    )
    log.add(row)
    benchmark.extra_info.update(row.to_json())
