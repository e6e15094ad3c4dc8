"""What the machine code of one kernel says: registers, spills, shared memory, occupancy, issued instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .compiled import DEVICES
from .counts import Loop, is_elected, issued, macs_per_warp, mix
from .disassembly import nvidia_blocks, run_tool


@dataclasses.dataclass(frozen=True)
class Report:
    """Units: bytes, 32-bit registers of a thread, instructions of one warp in one program."""

    kernel: str
    device: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int  # of local memory a thread; includes arrays that could not be kept in registers
    shared: int
    occupancy: int  # warps an SM (a CU)
    instructions: dict[str, int] | None = None  # see `counts.mix`; None where they were not counted
    macs: int | None = None  # matrix multiply-accumulates of one warp, see `counts.macs_per_warp`
    others: int | None = None  # instructions of each further warp, where one issues the matrix products for all

    @property
    def issued(self) -> int | None:
        """Instructions of all warps of one program."""
        if self.instructions is None:
            return None
        own = sum(self.instructions.values())
        return own + (self.warps - 1) * (own if self.others is None else self.others)

    @property
    def fits(self) -> bool:
        """Whether the device can launch it at all."""
        return self.shared <= DEVICES[self.device].shared_per_block and self.occupancy > 0


def occupancy(device: str, *, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Warps that fit one SM (CU) at once, by registers, shared and tensor memory and the limits on warps and blocks."""
    limits = DEVICES[device]
    blocks = min(limits.max_blocks, limits.max_warps // warps)
    if limits.backend == "cuda":
        # registers are given to a warp in units of 256, and each scheduler has its part of the file
        a_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
        blocks = min(blocks, limits.registers // limits.schedulers // a_warp * limits.schedulers // warps)
    else:
        # each SIMD has registers for some waves
        a_wave = math.ceil(max(registers, 1) / limits.lane_granule) * limits.lane_granule
        waves = min(limits.max_warps // limits.schedulers, limits.lane_registers // a_wave)
        blocks = min(blocks, waves * limits.schedulers // warps)
    blocks = min(blocks, limits.shared_per_sm // max(shared + limits.shared_reserved, 1))
    if tensor_memory:
        blocks = min(blocks, limits.tensor_memory // tensor_memory)
    return blocks * warps


def read(compiled: Any, device: str, trips: Callable[[Loop], int] | None = None) -> Report:
    """The report on what `compiled.compile_launch` returned for a device.

    Args:
        trips: as for `counts.issued`; without it, and on AMD, no instruction is counted.
    """
    name, metadata = compiled.metadata.name, compiled.metadata
    warps, shared = int(metadata.num_warps), int(metadata.shared)
    opcodes: Counter[str] | None = None
    others: int | None = None
    if DEVICES[device].backend == "cuda":
        binary = compiled.asm["cubin"]
        usage = run_tool("cuobjdump", binary, "-res-usage")
        numbers = dict(re.findall(r"(\w+):(\d+)", usage.split(f"Function {name}:", 1)[1].split("Function", 1)[0]))
        registers = int(numbers["REG"])
        spill_bytes = int(numbers["STACK"]) + int(numbers["LOCAL"])
        if trips is not None:
            blocks = nvidia_blocks(run_tool("nvdisasm", binary, "-c"), name)
            opcodes = issued(blocks, trips)
            if any(map(is_elected, opcodes)):
                others = issued(blocks, trips, elected=False).total()
    else:
        assembly = compiled.asm["amdgcn"]
        numbers = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE))
        # the count of vector registers includes the accumulators: one file of 512
        registers = int(numbers["vgpr_count"])
        spill_bytes = int(numbers["private_segment_fixed_size"])
    tensor_memory = int(getattr(metadata, "tmem_size", 0) or 0)
    return Report(
        kernel=name,
        device=device,
        warps=warps,
        stages=int(metadata.num_stages),
        registers=registers,
        spill_bytes=spill_bytes,
        shared=shared,
        occupancy=occupancy(device, warps=warps, registers=registers, shared=shared, tensor_memory=tensor_memory),
        instructions=None if opcodes is None else mix(opcodes),
        macs=None if opcodes is None else macs_per_warp(opcodes),
        others=others,
    )
