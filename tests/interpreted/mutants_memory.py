"""Kernels that are wrong in memory or in the order of programs: file, right text, wrong text, the kind of fault that
the guard must see, and the smallest of `test_guard.CALLS` that shows it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    kind: str
    call: str


READ, WRITE = "read out of bounds", "write out of bounds"
NEW, NEVER = "read of what nobody wrote", "never written"
TWO, LANES, RACE = "written by two programs", "written by two lanes", "read by one program, written by another"

F, B, C = "forward.py", "backward.py", "common.py"

ROWS = "rows, q.row, num_tokens, HEAD_DIM, SPLIT, "
TAIL = "HEAD_DIM, TAIL, PRECISION, CONTENT, POSITION, DENSE, DROPOUT, "
DV = "columns, dv.row, num_tokens"
THIRD = "    tl.store(partial_ptrs + 2 * size, ty * share)\n"
DC = "tl.store(row_dc_ptr + row, dc"
BLOCKS = "blocks(tokens, config_q.block_m) * config_q.block_m"

MEMORY = [
    Mutant(F, ROWS + "True)", ROWS + "False)", READ, "dense"),
    Mutant(C, "mask = columns[None, :] < HEAD_DIM", "mask = columns[None, :] < HEAD_DIM + 8", READ, "odd"),
    Mutant(F, "tl.minimum(rows, num_tokens - 1)", "rows", READ, "dense"),
    Mutant(F, "< position.columns - start", ">= 0", READ, "wide"),
    Mutant(C, "mask = columns[None, :] < num_tokens", "mask = columns[None, :] >= 0", READ, "factored"),
    Mutant(F, TAIL + "True,", TAIL + "CONTENT,", READ, "wide"),  # where a saturated gate skips content
    Mutant(F, "* LN2, mask=rows < num_tokens)", "* LN2)", WRITE, "dense"),
    Mutant(F, "num_tokens + rows\n", "num_tokens + rows // 2\n", LANES, "dense"),
    Mutant(F, "content_ptr + offset", "content_ptr", TWO, "heads"),
    Mutant(C, "tl.store(ptrs[1],", "tl.store(ptrs[1] - SPLIT[0],", NEVER, "heads"),
    Mutant(B, BLOCKS, "tokens", WRITE, "dense"),
    Mutant(B, "min(config_kv.block_m, config_q.block_m)", "config_kv.block_m", READ, "wide"),
    Mutant(B, "dq, dk, dv = heads_last(q)", "dq, dk, dv = k", RACE, "dense"),
    Mutant(B, DC, DC + ", mask=rows < num_tokens", NEW, "dense"),
    Mutant(B, "(columns[None, :] < position.columns)", "(columns[None, :] >= 0)", READ, "wide_keys"),
    Mutant(B, DV, DV + " + 1", WRITE, "dense"),
    Mutant(B, "tl.minimum(columns, num_tokens - 1)", "columns", READ, "dense"),
    Mutant(B, "size + program * BLOCK_M", "size", TWO, "dense"),
    Mutant(B, THIRD, "", NEW, "dense"),
    Mutant(B, "index < size - start", "index >= 0", READ, "dense"),
    Mutant(B, "tl.store(d_gate_ptr + head,", "tl.store(d_gate_ptr,", TWO, "heads"),
]
