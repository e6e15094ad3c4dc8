"""What the compiled kernels are, read from their machine code: no GPU is needed, and none is used.

A launch is recorded from the very launcher that runs on a GPU (`recorded_launches`), compiled for a device that need
not be there (`compile_launch`), disassembled with the tools of Triton's wheel and read (`read`): registers, spills,
shared memory, occupancy, and the number of instructions that one warp issues in one program.

How the instructions are counted
    The machine code becomes a graph of basic blocks. Back edges give its natural loops; the trip count of each is known
    from the shape (ceil(N / BLOCK_N)). The count is that of the longest path, each loop taken as often as it runs. So
    of two exclusive branches the longer counts: the ordinary head, which needs content and position, not the one whose
    gate is saturated. On sm_100 one warp of a program issues the matrix products and the others branch around them:
    each of the two kinds has a path of its own. Loops that only wait (for a barrier) count as not entered: the wait
    succeeds at the first try. An instruction whose
    predicate is false takes its issue slot and counts. `Report.macs` is a check on all of this: the matrix
    multiply-accumulates on the path must equal what the tile's arithmetic asks for. On AMD nothing is counted: its code
    walks through all branches in turn with lanes switched off, so its graph does not tell which exclude each other.

What such counts say, and what they do not
    They say how much work the schedulers must issue, whether values fit the registers, and how two kernels of the same
    tile compare in that. They say nothing of time spent in waiting: memory and L2 latency, bank conflicts, barriers,
    dependent instructions, or which units run side by side. One matrix instruction counts as one, though it keeps its
    unit busy for many cycles (`convit_kernels.triton.time_model` weighs them). A ratio of counts is therefore a bound
    on what the position adds to the *issued* work, not a prediction of the ratio of times. Only a GPU measures time.

Under ``TRITON_INTERPRET=1`` the kernels are interpreter objects that cannot be compiled: use a process without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import configs

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """The limits of one architecture. CUDA: CUDA C++ programming guide, "Compute capabilities"; AMD: the CDNA 3 and 4
    white papers. ``shared_*`` in bytes, registers are 32-bit."""

    backend: str
    arch: int | str
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int  # what the runtime takes of it for each block
    max_warps: int
    max_blocks: int
    registers: int = 65536
    tensor_memory: int = 0  # columns, sm_100 only

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


DEVICES = {
    "sm_80": Device("cuda", 80, 163 * KIB, 164 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_86": Device("cuda", 86, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=16),
    "sm_89": Device("cuda", 89, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "sm_90": Device("cuda", 90, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32),
    "sm_100": Device("cuda", 100, 227 * KIB, 228 * KIB, KIB, max_warps=64, max_blocks=32, tensor_memory=512),
    "sm_120": Device("cuda", 120, 99 * KIB, 100 * KIB, KIB, max_warps=48, max_blocks=24),
    "gfx942": Device("hip", "gfx942", 64 * KIB, 64 * KIB, 0, max_warps=32, max_blocks=32),
    "gfx950": Device("hip", "gfx950", 160 * KIB, 160 * KIB, 0, max_warps=32, max_blocks=32),
}


# ---- from a launch to a binary ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as the launcher made it: the kernel, its arguments by name, the grid and the compiler's options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@contextlib.contextmanager
def recorded_launches(architecture: str | None = None) -> Iterator[list[Launch]]:
    """Within this context launches of Triton kernels are recorded in the yielded list, and not run.

    ``architecture`` also sets `configs.target`. Tensors may live on any device: nothing reads or writes them.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("machine code needs compiled kernels: start a process without TRITON_INTERPRET")
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kernel.arg_names if name in kwargs})
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        options = {name: value for name, value in kwargs.items() if name not in arguments}
        cells = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel, arguments, tuple(cells), options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        with configs.target(architecture) if architecture else contextlib.nullcontext():
            yield launches
    finally:
        JITFunction.run = original


def _specialize(launch: Launch, backend: str) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """The signature, the constants and the attributes that Triton's own launch would derive from the arguments.

    Pointers count as aligned to 16 bytes when the recorded ones are, integers are constants when 1 and carry their
    divisibility by 16. Parameters that the kernel asks not to specialize stay plain.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[Any]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        found: list[Any] = []
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if aligned and value.data_ptr() % 16 == 0:
                found.append(["tt.divisibility", 16])
            if backend == "hip" and not parameter.do_not_specialize and value.untyped_storage().size() <= 2**31 - 1:
                found.append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if aligned and value % 16 == 0:
                found.append(["tt.divisibility", 16])
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            raise TypeError(f"{launch.name}: cannot specialize {name} = {value!r}")
        if found:
            attributes[index,] = found
    return signature, constants, attributes


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def compile_launch(launch: Launch, device: str) -> Any:
    """Compiles one recorded launch for ``device``, a key of `DEVICES`: Triton's CompiledKernel, never loaded."""
    limits = DEVICES[device]
    signature, constants, attributes = _specialize(launch, limits.backend)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=limits.target, options=dict(launch.options))


# ---- from the binary to its instructions -----------------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's wheel nor on the PATH")
    return found


def _run_tool(name: str, binary: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([_tool(name), *flags, file.name], check=True, capture_output=True, text=True).stdout


@dataclasses.dataclass
class Block:
    """A basic block: its opcodes, and the blocks that may follow (none: the program ends)."""

    opcodes: list[str] = dataclasses.field(default_factory=list)
    successors: list[int] = dataclasses.field(default_factory=list)


_NVIDIA_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*[\w.]*)\s*(.*?)\s*;")
_NVIDIA_TARGET = re.compile(r"`\(([^)]+)\)")
_LABEL = re.compile(r"^([.$\w]+):")


def _basic_blocks(lines: Sequence[tuple[str | None, str, str | None, str]]) -> list[Block]:
    """Blocks of a program given as (label or None, opcode, jump target or None, kind) where kind is one of "" (goes
    on),
    "jump", "branch" (may jump), "end" (stops here), "maybe_end". Block 0 is the entry."""
    starts = {0}
    labels: dict[str, int] = {}
    for position, (label, _, _, kind) in enumerate(lines):
        if label is not None:
            starts.add(position)
            labels[label] = position
        if kind:
            starts.add(position + 1)
    order = sorted(start for start in starts if start < len(lines))
    number = {start: index for index, start in enumerate(order)}
    blocks = []
    for index, start in enumerate(order):
        stop = order[index + 1] if index + 1 < len(order) else len(lines)
        block = Block([opcode for _, opcode, _, _ in lines[start:stop] if opcode])
        _, _, goal, kind = lines[stop - 1]
        if kind in ("jump", "branch"):
            if goal not in labels:
                raise ValueError(f"a jump to {goal}, which is no label of this kernel")
            block.successors.append(number[labels[goal]])
        if kind in ("", "branch", "maybe_end") and index + 1 < len(order):
            block.successors.append(index + 1)
        blocks.append(block)
    return blocks


def nvidia_blocks(disassembly: str, name: str) -> list[Block]:
    """The basic blocks of kernel ``name`` in the output of ``nvdisasm -c``."""
    lines: list[tuple[str | None, str, str | None, str]] = []
    pending: list[str] = []
    inside = False
    for text in disassembly.splitlines():
        stripped = text.strip()
        label = _LABEL.match(stripped)
        if label:
            inside = inside or label[1] == name
            if label[1].startswith((".text", ".nv", ".debug")) and label[1] != f".text.{name}":
                inside = False
            pending.append(label[1])
            continue
        found = _NVIDIA_LINE.search(text)
        if not inside or not found:
            continue
        predicate, opcode, operands = found.groups()
        base = opcode.split(".")[0]
        target = _NVIDIA_TARGET.search(operands)
        goal, kind = None, ""
        if base in ("EXIT", "RET"):
            kind = "maybe_end" if predicate else "end"
        elif base == "BRA" and ".DIV" in opcode:
            kind = ""  # taken when the lanes of a warp have parted, which uniform control flow excludes
        elif (base in ("BRA", "JMP") or opcode == "CALL.REL.NOINC") and target and not target[1].startswith("$"):
            # ptxas also writes a jump as a call without return
            condition = _NVIDIA_TARGET.sub("", operands).strip(" ,")
            goal, kind = target[1], "branch" if (predicate or condition) else "jump"
        elif base in ("BRX", "JMX"):
            raise ValueError(f"{name} has an indirect branch, whose trip counts cannot be known")
        for extra in pending[:-1]:
            lines.append((extra, "", None, ""))
        lines.append((pending[-1] if pending else None, opcode, goal, kind))
        pending = []
    if not lines:
        raise ValueError(f"no code of {name} in the disassembly")
    return _basic_blocks(lines)


# ---- from the instructions to how often each is issued
# ----------------------------------------------------------------


def _reachable(blocks: Sequence[Block]) -> list[int]:
    """The blocks that the entry reaches, each before its successors unless an edge goes back (reverse postorder)."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        node, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def _loops(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """Header -> body (header included) of every natural loop.

    Raises:
        ValueError: when a cycle has two entries, for which trip counts mean nothing.
    """
    order = _reachable(blocks)
    rank = {node: index for index, node in enumerate(order)}
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for successor in blocks[node].successors:
            predecessors[successor].append(node)
    dominators = {node: set(order) for node in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            found = set.intersection(*(dominators[before] for before in predecessors[node])) | {node}
            if found != dominators[node]:
                dominators[node], changed = found, True
    loops: dict[int, set[int]] = {}
    for node in order:
        for header in blocks[node].successors:
            if rank[header] > rank[node]:
                continue
            if header not in dominators[node]:
                raise ValueError("the control flow is irreducible: a loop has two entries")
            body = loops.setdefault(header, {header})
            work = [node]
            while work:
                inner = work.pop()
                if inner not in body:
                    body.add(inner)
                    work += predecessors[inner]
    return loops


# What one warp issues for the whole program.
_ELECTED = re.compile(r"UTC\w*MMA")

_WAITING = ("SYNCS", "NANOSLEEP", "UTCATOMSWS", "YIELD")


def _without_waiting(blocks: Sequence[Block]) -> list[Block]:
    """The same program where every wait succeeds at once: no edge leads into a loop that only waits."""
    spins = {
        header
        for header, body in _loops(blocks).items()
        if sum(len(blocks[node].opcodes) for node in body) < 16
        and any(opcode.startswith(_WAITING) for node in body for opcode in blocks[node].opcodes)
    }
    kept = []
    for index, block in enumerate(blocks):
        onward = [successor for successor in block.successors if successor not in spins]
        kept.append(Block(block.opcodes, onward if onward and index not in spins else list(block.successors)))
    return kept


def _around_elected(blocks: Sequence[Block]) -> list[Block]:
    """The same program as a warp sees it that issues no product for all: at a fork it never goes where one is."""
    products = {index for index, block in enumerate(blocks) if any(map(_ELECTED.match, block.opcodes))}
    return [
        Block(block.opcodes, [onward for onward in block.successors if onward not in products] or block.successors)
        for block in blocks
    ]


@dataclasses.dataclass(frozen=True)
class Loop:
    """What tells the loops of a kernel apart: their place in the program, whether one lies in it, whether it
    multiplies.
    """

    index: int
    outer: bool
    matrix: bool


def issued(blocks: Sequence[Block], trips: Callable[[Loop], int], *, elected: bool = True) -> Counter[str]:
    """Opcode -> how often one warp issues it on the longest path through the program.

    Args:
        blocks: of the whole kernel.
        trips: how often a loop runs each time it is entered. Loops that only wait are not asked for.
        elected: whether this is the warp that issues the matrix products where one warp does so for all (sm_100);
            otherwise it takes every branch around them.
    Raises:
        ValueError: for an irreducible control flow.
    """
    blocks = _without_waiting(blocks)
    loops = _loops(blocks)
    trip = {
        header: trips(
            Loop(
                index=index,
                outer=any(other in loops[header] for other in loops if other != header),
                matrix=any(opcode.startswith(_MATRIX) for node in loops[header] for opcode in blocks[node].opcodes),
            )
        )
        for index, header in enumerate(sorted(loops))
    }
    order = _reachable(blocks)
    if not elected:
        blocks = _around_elected(blocks)

    def longest(entry: int, region: set[int]) -> dict[int, Counter[str]]:
        """Block -> what the longest path from ``entry`` to its end issues, within ``region``, not back to ``entry``."""
        arriving: dict[int, Counter[str]] = {entry: Counter()}
        ends: dict[int, Counter[str]] = {}

        def finish(node: int, path: Counter[str], inside: set[int]) -> None:
            ends[node] = path
            for successor in blocks[node].successors:
                onward = successor in region and successor not in inside and successor != entry
                if onward and (successor not in arriving or path.total() > arriving[successor].total()):
                    arriving[successor] = path

        for node in order:
            if node not in region or node in ends or node not in arriving:
                continue
            body = loops.get(node, set())
            if not body < region:  # the loop that ``region`` is has its trips counted by the caller
                body = set()
            if not body:
                finish(node, arriving[node] + Counter(blocks[node].opcodes), set())
                continue
            within = longest(node, body)
            latches = {inside for inside in within if node in blocks[inside].successors}
            iteration = max((within[latch] for latch in latches), key=Counter.total)
            for inside in within:
                # a loop that tests late leaves from its last iteration, one that tests early from the start of one more
                late = 2 * within[inside].total() > iteration.total()
                full = trip[node] - 1 if late else trip[node]
                before = Counter({opcode: number * full for opcode, number in iteration.items()})
                finish(inside, arriving[node] + before + within[inside], body)
        return ends

    ends = longest(0, set(order))
    return max((path for node, path in ends.items() if not blocks[node].successors), key=Counter.total)


def macs_per_warp(opcodes: Mapping[str, int]) -> int | None:
    """Matrix multiply-accumulates of the issued instructions; None where an opcode does not tell its shape (sm_100)."""
    total = 0
    for opcode, number in opcodes.items():
        base = opcode.split(".")[0]
        if _ELECTED.match(base):
            return None
        if base == "HMMA":  # HMMA.16816 is m16 n8 k16, HMMA.1688 m16 n8 k8
            shape = opcode.split(".")[1]
            total += number * 16 * 8 * int(shape[3:])
        elif base == "HGMMA":  # m64 for the four warps of a group
            rows, columns, depth = map(int, opcode.split(".")[1].split("x"))
            total += number * rows * columns * depth // 4
    return total


_MATRIX = (
    "HMMA",
    "HGMMA",
    "IMMA",
    "DMMA",
    "QMMA",
    "QGMMA",
    "OMMA",
    "UTCHMMA",
    "UTCQMMA",
    "UTCOMMA",
    "v_mfma",
    "v_smfmac",
)
_SPECIAL = ("MUFU",)
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDTM", "STTM", "LD.", "ST.", "ATOM", "RED.", "UBLK", "UTMA")
_FLOAT = ("FFMA", "FMUL", "FADD")


def mix(opcodes: Mapping[str, int]) -> dict[str, int]:
    """The issued instructions by what executes them: matrix, special functions, memory, float32, the rest."""
    kinds = {"matrix": _MATRIX, "special": _SPECIAL, "memory": _MEMORY, "float": _FLOAT, "rest": ("",)}
    total = dict.fromkeys(kinds, 0)
    for opcode, number in opcodes.items():
        total[next(kind for kind, prefixes in kinds.items() if opcode.startswith(prefixes))] += number
    return total


def requested_bytes(opcodes: Mapping[str, int]) -> int:
    """Bytes of global memory that one warp's loads and stores name: every lane's, even if masked or in the L1 cache."""
    total = 0
    for opcode, number in opcodes.items():
        base, *modifiers = opcode.split(".")
        if base in ("LDG", "LDGSTS", "STG"):
            widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
            total += number * 32 * next((widths[modifier] for modifier in modifiers if modifier in widths), 4)
    return total


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one kernel says. Bytes, 32-bit registers a thread, instructions of one warp in one
    program.
    """

    kernel: str
    device: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int  # of local memory a thread; includes arrays that could not be kept in registers
    shared: int
    occupancy: int  # warps an SM (a CU)
    instructions: dict[str, int] | None = None  # see `mix`; None where they were not counted
    macs: int | None = None  # matrix multiply-accumulates of one warp, see `macs_per_warp`
    requested: int | None = None  # see `requested_bytes`
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
    """Warps that fit one SM (CU) at once, by registers, shared memory, tensor memory and the limits on warps and
    blocks.
    """
    limits = DEVICES[device]
    blocks = min(limits.max_blocks, limits.max_warps // warps)
    if limits.backend == "cuda":
        # registers are given to a warp in units of 256, and each of four schedulers has a quarter of the file
        a_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
        blocks = min(blocks, limits.registers // 4 // a_warp * 4 // warps)
    else:
        # 512 registers a lane of each of four SIMDs, in units of 8, at most eight waves a SIMD
        waves = min(8, 512 // (math.ceil(max(registers, 1) / 8) * 8))
        blocks = min(blocks, waves * 4 // warps)
    blocks = min(blocks, limits.shared_per_sm // max(shared + limits.shared_reserved, 1))
    if tensor_memory:
        blocks = min(blocks, limits.tensor_memory // tensor_memory)
    return blocks * warps


def read(compiled: Any, device: str, trips: Callable[[Loop], int] | None = None) -> Report:
    """Reads what `compile_launch` made. ``trips`` as in `issued`; without it, and on AMD, nothing is counted."""
    name, metadata = compiled.metadata.name, compiled.metadata
    warps, shared = int(metadata.num_warps), int(metadata.shared)
    opcodes: Counter[str] | None = None
    others: int | None = None
    if DEVICES[device].backend == "cuda":
        binary = compiled.asm["cubin"]
        usage = _run_tool("cuobjdump", binary, "-res-usage")
        numbers = dict(re.findall(r"(\w+):(\d+)", usage.split(f"Function {name}:", 1)[1].split("Function", 1)[0]))
        registers = int(numbers["REG"])
        spill_bytes = int(numbers["STACK"]) + int(numbers["LOCAL"])
        if trips is not None:
            blocks = nvidia_blocks(_run_tool("nvdisasm", binary, "-c"), name)
            opcodes = issued(blocks, trips)
            if any(map(_ELECTED.match, opcodes)):
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
        requested=None if opcodes is None else requested_bytes(opcodes),
        others=others,
    )
