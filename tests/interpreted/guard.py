"""The memory of kernels, watched while Triton's interpreter runs them.

The interpreter reads and writes whatever address a kernel computes, and runs one program after another. Here each
tensor argument of a launch has a range of addresses of its own, far from every other: an access is judged against the
view that its pointer came from, not against what happens to lie there. Of each element is known which program wrote
it, so that what programs of a GPU would do to each other in any order shows in this one. New memory holds a NaN that no
arithmetic makes. So it is known who reads what nobody wrote, and at the end what nobody ever wrote.

A lane that may not be where it is reads what it would read masked, and writes nothing; the kernel goes on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

SHIFT = 40  # 1 TiB of addresses for each argument; what lies half of it below an argument's first belongs to it too
HALF = 1 << (SHIFT - 1)
# by bytes an element: a quiet NaN of every floating-point dtype, and no likely integer
POISON = {2: 0x7FFD, 4: 0x7FFD7FFD, 8: 0x7FFD7FFD7FFD7FFD}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_load, _store, _empty = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, torch.empty
_NOT_KERNELS = (
    str(Path(triton.__file__).parent),
    *(str(Path(__file__).parent / name) for name in ("guard.py", "interpreter.py")),
)

Line = tuple[tuple[str, int], ...]  # file and number, the innermost call first


class Fault(NamedTuple):
    """What went wrong with which argument of which kernel, and where: in a device function, and from where called."""

    kind: str
    kernel: str
    argument: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.argument} of {self.kernel}" + (f", {self.line}" if self.line else "")


class MemoryFaultError(AssertionError):
    """What a kernel did that it may not do."""


@dataclass
class Storage:
    """Elements of memory that arguments of a launch share, and the program, counted from 1, that wrote each."""

    size: int
    element_size: int
    writer: np.ndarray | None = None
    reads: list[tuple[Argument, np.ndarray, int, Line]] = field(default_factory=list)

    def write(self, element: np.ndarray, program: int) -> bool:
        """Whether another program has written one of the elements."""
        if self.writer is None:
            self.writer = np.zeros(self.size, np.int32)
        others = (self.writer[element] != 0) & (self.writer[element] != program)
        self.writer[element] = program
        return bool(others.any())

    def races(self) -> Iterator[tuple[Argument, Line]]:
        """Reads of an element that another program wrote, before or after."""
        if self.writer is not None:
            for argument, element, program, line in self.reads:
                writer = self.writer[element]
                if ((writer != 0) & (writer != program)).any():
                    yield argument, line


class Argument:
    """A tensor argument; to the kernel a pointer to addresses of its own."""

    def __init__(self, name: str, tensor: Tensor, number: int, storage: Storage) -> None:
        self.name, self.tensor, self.storage = name, tensor, storage
        self.dtype, self.size = tensor.dtype, tensor.element_size()
        self.base = number << SHIFT
        place = np.zeros((), np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            place = place[..., None] + np.arange(length) * stride
        self.extent = int(place.max()) + 1 if place.size else 0
        inside = np.zeros(self.extent, bool)
        inside[place] = True
        self.inside = None if inside.all() else inside  # of each element from the view's first to its last

    def data_ptr(self) -> int:
        return self.base

    def has(self, element: np.ndarray) -> np.ndarray:
        """Which elements, counted from the view's first, belong to it."""
        inside = (element >= 0) & (element < self.extent)
        if self.inside is not None:
            inside &= self.inside[np.where(inside, element, 0)]
        return inside


class Guard:
    """What is known of the kernels that run; `faults` says what was wrong, each once."""

    def __init__(self) -> None:
        self.faults: dict[Fault, None] = {}
        self.fresh: dict[tuple[Any, ...], tuple[str, str, Tensor]] = {}  # kernel, argument: handed over unwritten

    def fault(self, kind: str, argument: str, line: Line) -> None:
        self.faults[Fault(kind, self.kernel, argument, " < ".join(f"{file}:{number}" for file, number in line))] = None

    def launch(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with an `Argument` in place of each tensor."""
        self.kernel = executor.fn.__name__
        self.arguments: dict[int, Argument] = {}
        self.storages: dict[int, Storage] = {}

        def guarded(name: str, value: Any) -> Any:
            if hasattr(value, "_fields"):
                return type(value)(*(guarded(f"{name}.{each}", getattr(value, each)) for each in value._fields))
            if isinstance(value, tuple):
                return tuple(guarded(f"{name}[{index}]", each) for index, each in enumerate(value))
            return self.argument(name, value) if isinstance(value, Tensor) else value

        named = [guarded(name, value) for name, value in zip(executor.arg_names, args, strict=False)]
        return named, {name: guarded(name, value) for name, value in kwargs.items()}

    def argument(self, name: str, tensor: Tensor) -> Argument:
        memory, size, number = tensor.untyped_storage(), tensor.element_size(), len(self.arguments) + 1
        storage = self.storages.setdefault(memory.data_ptr(), Storage(memory.nbytes() // size, size))
        if storage.element_size != size:
            raise NotImplementedError("views of one storage whose elements differ in size")
        self.arguments[number] = Argument(name, tensor, number, storage)
        if _unwritten(tensor):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            self.fresh.setdefault(key, (self.kernel, name, tensor))
        return self.arguments[number]

    def returned(self) -> None:
        """The launch is over: who read what, and who wrote it?"""
        for storage in self.storages.values():
            for argument, line in storage.races():
                self.fault("read by one program, written by another", argument.name, line)

    def finish(self) -> None:
        """All launches are over: raises MemoryFaultError for whatever was wrong."""
        for kernel, name, tensor in self.fresh.values():
            if _unwritten(tensor):
                self.faults[Fault("never written", kernel, name)] = None
        if self.faults:
            raise MemoryFaultError("\n".join(map(str, self.faults)))

    def access(self, pointers: Any, mask: Any, write: bool) -> tuple[Any, Any]:
        """The true pointers, and the mask of the lanes that are where they may be."""
        x, y, z = interpreter_builder.grid_idx
        program = 1 + x + interpreter_builder.grid_dim[0] * (y + interpreter_builder.grid_dim[1] * z)
        address = pointers.data.view(np.int64)
        allowed = np.broadcast_to(mask.data, address.shape).astype(bool)
        true = np.zeros_like(address)
        number = (address + HALF) >> SHIFT
        line = _line()
        for each in _distinct(number[allowed]):
            lanes = allowed & (number == each)
            argument = self.arguments.get(each)
            if argument is None:
                self.fault("wild address", "no argument", line)
                allowed &= ~lanes
                continue
            distance = address - argument.base
            element = distance // argument.size
            inside = argument.has(element)
            if (lanes & ~inside).any():
                self.fault("write out of bounds" if write else "read out of bounds", argument.name, line)
                allowed &= ~lanes | inside
                lanes &= inside
            true[lanes] = distance[lanes] + argument.tensor.data_ptr()
            touched = element[lanes] + argument.tensor.storage_offset()
            if not write:
                argument.storage.reads.append((argument, touched, program, line))
            else:
                if len(np.unique(touched)) != len(touched):
                    self.fault("written by two lanes", argument.name, line)
                if argument.storage.write(touched, program):
                    self.fault("written by two programs", argument.name, line)
        return TensorHandle(true.view(np.uint64), pointers.dtype), TensorHandle(allowed, mask.dtype)

    def load(self, builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        true, allowed = self.access(pointers, mask, write=False)
        loaded = _load(builder, true, allowed, *rest)
        poisoned = allowed.data & _poisoned(loaded.data)
        if poisoned.any():
            for number in _distinct((pointers.data.view(np.int64)[poisoned] + HALF) >> SHIFT):
                self.fault("read of what nobody wrote", self.arguments[number].name, _line())
        return loaded

    def store(self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        true, allowed = self.access(pointers, mask, write=True)
        return _store(builder, true, value, allowed, *rest)


def _distinct(numbers: np.ndarray) -> list[int]:
    if not numbers.size:
        return []
    return [int(numbers[0])] if (numbers == numbers[0]).all() else np.unique(numbers).tolist()


def _poisoned(values: np.ndarray) -> Any:
    """Which values are those of new memory."""
    size = values.itemsize
    return values.view(f"i{size}") == POISON[size] if size in POISON else np.zeros(values.shape, bool)


def _unwritten(tensor: Tensor) -> bool:
    """Whether some element is still that of new memory."""
    size = tensor.element_size()
    return size in POISON and bool((tensor.detach().view(INTEGERS[size]) == POISON[size]).any())


def _new(*args: Any, **kwargs: Any) -> Tensor:
    """torch.empty, where nothing looks like a result."""
    tensor = _empty(*args, **kwargs)
    size = tensor.element_size()
    if size in POISON:
        tensor.detach().view(INTEGERS[size]).fill_(POISON[size])
    return tensor


def _line() -> Line:
    """Where the kernel is."""
    found = []
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not GridExecutor.__call__.__code__:
        if not frame.f_code.co_filename.startswith(_NOT_KERNELS):
            found.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def _no_atomics(*_: Any) -> None:
    raise NotImplementedError("the guard does not know the order of atomics")


@contextlib.contextmanager
def watching() -> Iterator[Guard]:
    """Watches every kernel that the interpreter runs inside. Raises MemoryFaultError at the end for what was wrong."""
    guard = Guard()
    builder = {
        "create_masked_load": lambda *args: guard.load(*args),
        "create_masked_store": lambda *args: guard.store(*args),
        "create_atomic_rmw": _no_atomics,
        "create_atomic_cas": _no_atomics,
    }
    executor = {
        "_init_args_hst": lambda *args: guard.launch(*args),
        "_restore_args_dev": lambda *_: guard.returned(),
    }
    with (
        mock.patch.multiple(InterpreterBuilder, **builder),
        mock.patch.multiple(GridExecutor, **executor),
        mock.patch.object(torch, "empty", _new),
    ):
        yield guard
    guard.finish()
