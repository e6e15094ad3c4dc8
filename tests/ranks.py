"""Processes that talk by gloo, kept for the tests of a module: starting them takes seconds."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# imported once, by the process that the others are forked from
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "timm"]


def _join(rank: int, count: int, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=file.as_uri(), rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )


class Ranks:
    """So many ranks of one group; `folder` is where they meet."""

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pools = [ProcessPoolExecutor(1, context, _join, (rank, count, folder / "group")) for rank in range(count)]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of a module gives on each rank; raises what it raises on one of them."""
        futures = [pool.submit(function, *arguments) for pool in self._pools]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
