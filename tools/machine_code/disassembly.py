"""From a binary to its instructions: what the tools of Triton's wheel print, as basic blocks."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton


@functools.cache
def _tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(bundled) if bundled.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in Triton's wheel nor on the PATH")
    return path


def run_tool(name: str, binary: bytes, *flags: str) -> str:
    """What "nvdisasm" or "cuobjdump" prints about a cubin."""
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
    """Blocks of a program given as (label or None, opcode, jump target or None, kind). Block 0 is the entry.

    The kind is "" (goes on), "jump", "branch" (may jump), "end" (stops here) or "maybe_end".
    """
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
        instruction = _NVIDIA_LINE.search(text)
        if not inside or not instruction:
            continue
        predicate, opcode, operands = instruction.groups()
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
