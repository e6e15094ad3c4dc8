"""The processes that train together: torchrun's, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; the same shape and dtype."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ


def usable_device(name: str) -> torch.device:
    """The device of that name; under torchrun "cuda" is the GPU of this process.

    Raises:
        ValueError: there is no such device, or it cannot compute here.
    """
    if name.startswith("cuda") and under_torchrun():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {name} cannot be used here, but {', '.join(usable)} can") from error
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The process group of torchrun, if it started this process."""
    if not under_torchrun():
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
