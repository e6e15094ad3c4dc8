"""From the instructions to how often one warp issues each: loops, their trips, the longest path."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from .disassembly import Block


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
            dominating = set.intersection(*(dominators[before] for before in predecessors[node])) | {node}
            if dominating != dominators[node]:
                dominators[node], changed = dominating, True
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


_ELECTED = re.compile(r"UTC\w*MMA")


def is_elected(opcode: str) -> bool:
    """Whether one warp issues this instruction for the whole program (the matrix products of sm_100)."""
    return _ELECTED.match(opcode) is not None


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
    products = {index for index, block in enumerate(blocks) if any(map(is_elected, block.opcodes))}
    return [
        Block(block.opcodes, [onward for onward in block.successors if onward not in products] or block.successors)
        for block in blocks
    ]


@dataclasses.dataclass(frozen=True)
class Loop:
    """What tells the loops of a kernel apart: their place in the program, whether another loop is in it, and whether it
    has matrix products and special functions."""

    index: int
    outer: bool
    matrix: bool
    special: bool


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

    def has(header: int, kind: tuple[str, ...]) -> bool:
        return any(opcode.startswith(kind) for node in loops[header] for opcode in blocks[node].opcodes)

    trip = {
        header: trips(
            Loop(
                index=index,
                outer=any(other in loops[header] for other in loops if other != header),
                matrix=has(header, _MATRIX),
                special=has(header, _SPECIAL),
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
        if is_elected(base):
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
