"""The short way to launch a kernel that Triton has compiled: the same kernel, the same arguments, or Triton's own way.

Nothing is compiled here: a compiler that only counts takes the place of Triton's.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from convit_kernels.triton import launch as launches
from convit_kernels.triton.launch import described, launch

FACTOR: tl.constexpr = tl.constexpr(3)


@triton.jit
def add(x_ptr, y_ptr, pair, size, stride: tl.constexpr, factor, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < size, other=0.0) * factor * FACTOR
    if pair[0] is not None:
        x += tl.load(pair[0] + at * pair[1], mask=at < size, other=0.0)
    tl.store(y_ptr + at, x)


class Pair(NamedTuple):
    ptr: Any
    stride: Any


class Driver:
    """Of a GPU that is not there."""

    device = 0

    def __init__(self, backend: str) -> None:
        self.target = GPUTarget("cuda", 90, 32) if backend == "cuda" else GPUTarget("hip", "gfx942", 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device


class Machine:
    """What Triton has compiled and launched."""

    def __init__(self) -> None:
        self.compiled = 0
        self.launched: list[tuple[Any, ...]] = []

    def compile(self, src: Any, target: GPUTarget, options: dict[str, Any]) -> CompiledKernel:
        self.compiled += 1
        kernel = object.__new__(CompiledKernel)
        kernel.src, kernel.name = src, "add"
        kernel.metadata, kernel.packed_metadata = SimpleNamespace(target=target), (options["num_warps"],)
        kernel.module, kernel.function = None, f"function {self.compiled}"
        kernel._init_handles = lambda: None
        kernel._run = lambda *launched: self.launched.append((*launched[:6], *launched[9:]))  # without hooks
        return kernel

    def last(self) -> tuple[Any, ...]:
        return self.launched[-1]


@pytest.fixture(params=["cuda"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if type(add) is not JITFunction:
        pytest.skip("this process interprets kernels: it compiles none")
    monkeypatch.setattr(driver, "_active", Driver(request.param))
    monkeypatch.setattr(launches, "_kept", {})
    found = Machine()
    add.device_caches.clear()
    for device in (0, 1):
        add.device_caches[device]
    monkeypatch.setattr(add, "compile", found.compile)
    return found


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """One at an address that divides by 16, one at another."""
    whole = torch.empty(64, dtype=dtype)
    return [whole[-whole.data_ptr() % 16 // whole.element_size() :][:16], whole[1:17]]


def some(pick: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `add`, from few enough that many are alike to Triton."""
    pointers = [each for dtype in (torch.float32, torch.float16, torch.int64) for each in tensors(dtype)]
    ints = [1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31, 2**33, 2**33 + 1]
    numbers = [*ints, 0, -1, -16, 1.0, 0.5, 0.0, True, False, None]
    pair = pick.choice([(None, 1), (pick.choice(pointers), pick.choice(ints)), (pick.choice(pointers), None)])
    if pick.random() < 0.5:
        pair = Pair(pair[0], pick.choice([pair[1], tl.constexpr(pick.choice(ints))]))
    arguments = (pick.choice(pointers), pick.choice(pointers), pair, pick.choice(numbers), pick.choice(ints))
    constants = {"BLOCK": pick.choice([16, 32]), "EXACT": pick.choice([True, False])}
    if pick.random() < 0.5:
        constants = dict(reversed(constants.items()))
    return (*arguments, pick.choice(numbers)), constants | {"num_warps": pick.choice([4, 8])}


def key_of_triton(arguments: tuple[Any, ...], constants: dict[str, Any]) -> str:
    *_, binder = add.device_caches[0]
    _, specialization, options = binder(*arguments, **constants)
    return compute_cache_key({}, specialization, options)


def key_of_ours(arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    return (described(arguments), *constants, *constants.values())


def test_equal_keys_are_one_kernel_to_triton(machine: Machine) -> None:
    pick = random.Random(0)
    equal = apart = 0
    for _ in range(3000):
        (arguments, constants), (others, _) = some(pick), some(pick)
        at = pick.randrange(len(arguments))
        one_changed = (*arguments[:at], others[at], *arguments[at + 1 :])
        same = key_of_ours(arguments, constants) == key_of_ours(one_changed, constants)
        to_triton = key_of_triton(arguments, constants) == key_of_triton(one_changed, constants)
        assert to_triton or not same, (arguments, at, others[at])
        equal, apart = equal + same, apart + (not to_triton)
    assert equal > 300 and apart > 1000


def test_another_tensor_of_a_dtype_and_alignment_has_the_same_key(machine: Machine) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for one, other in zip(tensors(dtype), tensors(dtype), strict=True):
            assert one.data_ptr() != other.data_ptr()
            assert described((one, (other, 3))) == described((torch.nn.Parameter(other), (one, 3)))


@pytest.mark.parametrize(
    "change",
    [
        {"x": tensors()[1]},
        {"x": tensors(torch.float16)[0]},
        {"size": 16.0},
        {"size": True},
        {"size": 2**40},
        {"stride": 2},
        {"factor": 1},
        {"pair": (tensors()[0], 16)},
        {"pair": (None, 1)},
        {"pair": (tensors()[0], tl.constexpr(4))},
        {"BLOCK": 32},
        {"EXACT": False},
        {"num_warps": 8},
    ],
)
def test_what_triton_compiles_anew_has_a_key_of_its_own(machine: Machine, change: dict[str, Any]) -> None:
    usual = {"x": tensors()[0], "y": tensors()[0], "pair": (tensors()[0], 4), "size": 16, "stride": 1, "factor": 1.0}
    usual |= {"BLOCK": 16, "EXACT": True, "num_warps": 4}

    def case(values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(list(values.values())[:6]), dict(list(values.items())[6:])

    before, after = case(usual), case(usual | change)
    assert key_of_triton(*before) != key_of_triton(*after)
    assert key_of_ours(*before) != key_of_ours(*after)


def test_the_same_is_launched_by_both_ways(machine: Machine) -> None:
    pick = random.Random(1)
    cases = [some(pick) for _ in range(300)]
    for arguments, constants in cases + cases:
        grid = (pick.randrange(1, 9), pick.randrange(1, 9))
        add[grid](*arguments, **constants)
        expected = machine.last()
        launch(add, grid, *arguments, **constants)
        assert len(machine.last()) == len(expected)
        assert all(mine is theirs or mine == theirs for mine, theirs in zip(machine.last(), expected, strict=True))


def usual_launch() -> None:
    x, y = tensors()
    launch(add, (2, 3), x, y, (x, 4), 16, 1, 0.5, BLOCK=16, EXACT=True, num_warps=4)


@pytest.fixture
def kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`usual_launch` has been kept; from then on this notes each launch that goes Triton's own way."""
    usual_launch()
    noted: list[str] = []
    *cached, binder = add.device_caches[0]

    def noting(*arguments: Any, **constants: Any) -> Any:
        noted.append("triton")
        return binder(*arguments, **constants)

    caches = (*cached, noting)
    monkeypatch.setitem(add.device_caches, 0, caches)
    (key, entry), *more = launches._kept.items()
    assert not more
    launches._kept[key] = entry._replace(caches=caches)
    return noted


def test_a_second_launch_goes_the_short_way(machine: Machine, kept: list[str]) -> None:
    usual_launch()
    assert kept == [] and len(machine.launched) == 2 and machine.compiled == 1


class TestTritonsOwnWay:
    def test_where_a_hook_is_called(self, machine: Machine, kept: list[str]) -> None:
        for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            hooks.add(print)
            try:
                usual_launch()
            finally:
                hooks.remove(print)
        assert len(kept) == 2
        usual_launch()
        assert len(kept) == 2

    def test_where_something_runs_before(self, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(add, "pre_run_hooks", [lambda *arguments, **constants: kept.append("hook")])
        usual_launch()
        assert kept == ["hook", "triton"]

    def test_where_kernels_are_debugged(
        self, machine: Machine, kept: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(knobs.runtime, "debug", True)
        usual_launch()
        assert kept == ["triton"] and machine.compiled == 2

    def test_where_launches_are_recorded(self, machine: Machine, kept: list[str]) -> None:
        from tools.machine_code.compiled import recorded_launches

        with recorded_launches() as recorded:
            usual_launch()
        assert [each.name for each in recorded] == ["add"] and recorded[0].grid == (2, 3)
        assert len(machine.launched) == 1 and kept == []

    def test_where_a_kernel_was_forgotten(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        usual_launch()
        add.device_caches.clear()
        add.device_caches[0]
        monkeypatch.setattr(add, "compile", machine.compile)
        usual_launch()
        assert machine.compiled == 2 and machine.last()[4] == "function 2"

    def test_where_a_global_has_changed(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        assert add.cache_key  # finds what it reads
        usual_launch()
        usual_launch()
        monkeypatch.setitem(globals(), "FACTOR", tl.constexpr(4))
        with pytest.raises(RuntimeError, match="FACTOR has changed"):
            usual_launch()
        assert len(machine.launched) == 2

    def test_on_another_device(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        usual_launch()
        monkeypatch.setattr(Driver, "device", 1)
        usual_launch()
        assert machine.compiled == 2 and machine.last()[3] == 101

    @pytest.mark.parametrize("machine", ["hip"], indirect=True)
    def test_on_amds_gpus(self, machine: Machine) -> None:
        usual_launch()
        usual_launch()
        assert len(machine.launched) == 2 and launches._kept == {}

    def test_of_arguments_that_are_unknown(self, machine: Machine) -> None:
        class Address(torch.Tensor):
            pass

        x = tensors()[0]
        for _ in range(2):
            launch(add, (1, 1), x.as_subclass(Address), x, (None, 1), 16, 1, 0.5, BLOCK=16, EXACT=True, num_warps=4)
        assert len(machine.launched) == 2 and launches._kept == {}


def test_no_more_is_kept_than_a_limit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST", 3)
    x = tensors()[0]
    for size in range(2, 12):
        launch(add, (1, 1), x, x, (x, 1), size, 1, 0.5, BLOCK=16, EXACT=True, num_warps=4)
        assert 1 <= len(launches._kept) <= 3
    assert len(machine.launched) == 10
