"""Wrong kernels of the CPU's attention, each of which a test of test_cpu_attention.py must notice: `make mutants`.

All are compiled at once: at its place in a copy of csrc/, a mutant has the wrong text beside the right one, and the
variable `convit_mutant` says which of them runs. That is set from here, between runs of the tests.

    python tests/native_mutants.py FOLDER    plants the mutants in FOLDER/csrc, which is then built
    python tests/native_mutants.py           runs the tests on that build, the one that Python finds

What fails in the second is a mutant that passes the test it names, on any instruction set: the tests lack something.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from _pytest.runner import runtestprotocol

TESTS = Path(__file__).parent / "test_cpu_attention.py"


class Mutant(NamedTuple):
    """An expression or, with its semicolon, a statement of the sources, and what it is replaced by."""

    what: str
    test: str  # that must fail
    right: str
    wrong: str
    place: str = "…"  # text that stands there once, where … stands for `right`
    only: str = ""  # units whose names contain this alone have it

    @property
    def original(self) -> str:
        return self.place.replace("…", self.right)

    def planted(self, number: int) -> str:
        if self.right.endswith(";"):
            choice = f"if (convit_mutant == {number}) {{ {self.wrong} }} else {{ {self.right} }}"
        else:
            choice = f"(convit_mutant == {number} ? ({self.wrong}) : ({self.right}))"
        return self.place.replace("…", choice)


MUTANTS = [
    # the op: tensors, parameters, sums over images and parts
    Mutant(
        "the gate's sign",
        "TestEquivalence::test_grids",
        "-static_cast<double>(gates[head * gate.stride(0)])",
        "static_cast<double>(gates[head * gate.stride(0)])",
    ),
    Mutant(
        "the stride between images",
        "TestEquivalence::test_grids",
        "t.stride(0)",
        "t.size(1) * t.stride(1)",
        "(t.const_data_ptr()), …, t.stride(1)",
    ),
    Mutant(
        "channels that are apart, taken as adjacent",
        "TestLayout::test_any_strides",
        "t.stride(3) == 1 || t.size(3) == 1",
        "true",
    ),
    Mutant(
        "the parts' gradients of parameters: the first one's, again and again",
        "TestEquivalence::test_grids",
        "part",
        "0",
        "(image * p.heads + head) * parts + …]",
    ),
    Mutant(
        "the parts' dk and dv without the last one's",
        "TestEquivalence::test_grids",
        "part < count",
        "part + 1 < count",
    ),
    Mutant(
        "every head with the parameters of the first",
        "TestEquivalence::test_grids",
        "image_head % p.heads",
        "0",
        "head = …, tokens = p.height * p.width;\n  const int64_t channels",
    ),
    # storage formats
    Mutant(
        "bfloat16 results are truncated",
        "TestRounding::test_half_precision_rounds_to_nearest",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
        "rounded = …;",
    ),
    Mutant(
        "float16 results: ties away from zero",
        "TestRounding::test_half_precision_rounds_to_nearest",
        "magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)",
        "magnitude + 0x1000 - (112u << 23)",
    ),
    Mutant(
        "subnormal float16 results are rounded as normal ones",
        "TestRounding::test_half_precision_rounds_to_nearest",
        "magnitude < (113u << 23)",
        "false",
    ),
    Mutant(
        "subnormal float16 inputs are read as normal ones",
        "TestRounding::test_half_precision_rounds_to_nearest",
        "magnitude < 1u << 23",
        "false",
    ),
    Mutant(
        "infinite float16 inputs are read as 65536",
        "TestRounding::test_half_precision_rounds_to_nearest",
        "magnitude >= 0x7c00u << 13",
        "false",
    ),
    Mutant(
        "subnormal results are kept",
        "TestSubnormals::test_results_are_flushed",
        "before_ | kFlushToZero",
        "before_",
        "__builtin_ia32_ldmxcsr(…)",
    ),
    Mutant(
        "what the caller had set of subnormal numbers is lost",
        "TestSubnormals::test_no_thread_stays_changed",
        "__builtin_ia32_ldmxcsr(before_);",
        "__builtin_ia32_ldmxcsr(before_ | kFlushToZero);",
        only="portable",  # the last to run: what it leaves behind would fail the others
    ),
    # softmax
    Mutant(
        "a float32 coefficient of exp2 is wrong in its fifth digit",
        "TestRounding::test_a_softmax_in_float32",
        "polynomial[power]",
        "polynomial[power] * (sizeof(T) == 4 && kTerms == 6 && power == 1 ? T(1.00001) : T(1))",
    ),
    Mutant(
        "at_least with its operands swapped: exp2 loses NaN",
        "TestExtremes::test_non_finite_values_spread_as_in_the_reference_layer",
        "at_least(broadcast(E::kLowest), t)",
        "at_least(t, broadcast(E::kLowest))",
    ),
    Mutant(
        "the smallest score counts as the largest where the scale is negative",
        "TestBlocks::test_the_largest_logit_of_a_negative_scale",
        "factor < 0",
        "false",
        "if (…)",
    ),
    Mutant(
        "the sum of the last exponentials alone",
        "TestEquivalence::test_grids",
        "sum.at[vector] += part.at[vector];",
        "sum.at[vector] = part.at[vector];",
    ),
    Mutant(
        "lse: a logarithm of base 2",
        "TestOperator::test_the_log_sum_exp",
        "log2(m.sum[query]) * static_cast<T>(kLn2)",
        "log2(m.sum[query])",
    ),
    # position
    Mutant(
        "the weight of y along x",
        "TestEquivalence::test_grids",
        "pos_weight[0]",
        "pos_weight[1]",
        "fill_table(…, pos_weight[2], width_",
    ),
    Mutant(
        "the weight of y along an x that is long",
        "TestEquivalence::test_rows_of_any_length",
        "pos_weight[0]",
        "pos_weight[1]",
        "…, pos_weight[2], width_, columns",
    ),
    Mutant(
        "all blocks' queries in the grid's first rows",
        "TestEquivalence::test_grids",
        "begin / width_",
        "0",
        "y = …;",
    ),
    Mutant(
        "every block begins where a grid row does",
        "TestEquivalence::test_grids",
        "-x",
        "0",
        "run = 0, begin = …;",
    ),
    Mutant(
        "position is mixed in without the gate",
        "TestEquivalence::test_grids",
        "row_.at[vector] *= gate_",
        "row_.at[vector] *= 1",
    ),
    Mutant(
        "the offset's mean is left out of its gradient",
        "TestEquivalence::test_grids",
        "offset - mean",
        "offset",
        "value * (…))",
    ),
    Mutant(
        "the squares' mean is left out of their gradient",
        "TestEquivalence::test_grids",
        "offset * offset - mean_square",
        "offset * offset",
    ),
    # borders of tiles, blocks and chunks
    Mutant(
        "the last row of a tile that is not whole is dropped",
        "TestEquivalence::test_grids",
        "minimum(kTileRows, rows - row)",
        "minimum(kTileRows, rows - row) - (rows - row < kTileRows)",
    ),
    Mutant(
        "blocks begin as if all were of one size",
        "TestEquivalence::test_grids",
        "minimum(block, vectors % count)",
        "0",
    ),
    Mutant(
        "the last key is masked",
        "TestEquivalence::test_grids",
        "minimum(size, tokens - begin)",
        "minimum(size, tokens - begin - 1)",
    ),
    Mutant(
        "every chunk of keys with the first one's values",
        "TestEquivalence::test_grids",
        "memory_.values + begin / Operands::kGroup * memory_.channels",
        "memory_.values",
    ),
    # many tokens: chunks of keys
    Mutant(
        "every panel's queries in the first one's place",
        "TestEquivalence::test_many_tokens_in_float64",
        "m.transposed + at.begin * m.depth",
        "m.transposed",
    ),
    Mutant(
        "the gate is not applied to content",
        "TestEquivalence::test_many_tokens_in_float64",
        "(1 - gate) / m.sum[query]",
        "1 / m.sum[query]",
    ),
    Mutant(
        "every chunk of keys begins in the grid's first row",
        "TestEquivalence::test_many_tokens_in_float64",
        "key / p.width",
        "0",
        "m.factors.row + … * columns",
    ),
    Mutant(
        "the maximum does not run: it is the chunk's own",
        "TestBlocks::test_the_largest_logit_in_any_of_many_chunks",
        "largest_of(scores, panel.columns, keys, factor, before)",
        "largest_of(scores, panel.columns, keys, factor, load_lanes<vectors>(scores))",
    ),
    Mutant(
        "the running maximum of a negative scale begins at the wrong end",
        "TestBlocks::test_the_largest_logit_in_any_of_many_chunks",
        "factor < 0",
        "false",
        "const T lowest = … ?",
    ),
    Mutant(
        "sums of exponentials are not brought to a new maximum",
        "TestEquivalence::test_many_tokens_in_float64",
        "load(m.sum + column) * shrink + part.at[vector]",
        "load(m.sum + column) + part.at[vector]",
    ),
    Mutant(
        "sums of values are not brought to a new maximum",
        "TestEquivalence::test_many_tokens_in_float64",
        "key > 0",
        "false",
        "if (…)",
    ),
    Mutant(
        "sums that are not finite are not computed anew",
        "TestExtremes::test_values_whose_sum_overflows",
        "!is_finite()",
        "false",
    ),
    # backward
    Mutant(
        "dk without the scale",
        "TestEquivalence::test_grids",
        "static_cast<T>(p.scale)",
        "T(1)",
        "write(sum, …, p.dk)",
    ),
    Mutant(
        "dq of the last chunk of keys alone",
        "TestEquivalence::test_grids",
        "key == 0",
        "true",
        "add_dq = … ?",
    ),
    Mutant(
        "dk and dv of a later block overwrite those before",
        "TestBlocks::test_several_in_every_accumulator",
        "block == block_begin",
        "true",
    ),
    Mutant(
        "the softmax's gradient without its mean",
        "TestEquivalence::test_grids",
        "load(d_map + v * kLanes<T>) - content_sum.at[v]",
        "load(d_map + v * kLanes<T>)",
    ),
    Mutant(
        "the map of the backward without the gate on position",
        "TestEquivalence::test_grids",
        "gate",
        "T(1)",
        "p.width, weight, …);",
    ),
    Mutant(
        "the gate's gradient: a sign",
        "TestEquivalence::test_grids",
        "position_sum.at[v][lane] - content_sum.at[v][lane]",
        "position_sum.at[v][lane] + content_sum.at[v][lane]",
    ),
    Mutant(
        "the gradient along y is given to the weight of x",
        "TestEquivalence::test_grids",
        "along_x.at[v][lane]",
        "along_y.at[v][lane]",
    ),
    # pairs of bfloat16 numbers
    Mutant(
        "the map is truncated to bfloat16",
        "TestRounding::test_the_rows_of_the_map_sum_to_one",
        "NarrowPair(even.at[vector], odd.at[vector]).pairs",
        "reinterpret_cast<Vector<uint32_t>>(even.at[vector]) >> 16 |"
        " (reinterpret_cast<Vector<uint32_t>>(odd.at[vector]) & 0xffff0000u)",
        only="bf16",
    ),
    Mutant(
        "the map of the backward is truncated to bfloat16",
        "TestRounding::test_the_columns_of_the_map_are_not_truncated",
        "row.map = mix(e);",
        "row.map = mix(e); for (Vector<T>& part : row.map.at) { part = reinterpret_cast<Vector<T>>("
        "reinterpret_cast<Vector<uint32_t>>(part) & (sizeof(T) == 4 ? 0xffff0000u : ~0u)); }",
        only="bf16",
    ),
    Mutant(
        "a query beyond an odd last one counts",
        "TestExtremes::test_a_key_that_no_query_sees",
        "queries % 2 != 0",
        "false",
        only="bf16",
    ),
    Mutant(
        "an odd last channel is dropped",
        "TestRounding::test_half_precision_errs_by_two_roundings",
        "(head_dim - 2 * whole)",
        "(head_dim / 2 * 2 - 2 * whole)",
        only="bf16",
    ),
    Mutant(
        "the last key is dropped where it is the second of a pair",
        "TestEquivalence::test_grids",
        "key + 1 < keys",
        "key + 2 < keys",
        "odd = … ? next()",
        only="bf16",
    ),
    # tiles
    Mutant(
        "sums that are to be added to begin at zero",
        "TestEquivalence::test_grids",
        "kAdd",
        "false",
        "if (…) {\n      load_tile",
        only="amx",
    ),
    Mutant(
        "the map's columns beyond the last query are not zero",
        "TestExtremes::test_a_key_that_no_query_sees",
        "pair < round_up(queries, kSteps) / 2",
        "false",
        only="amx",
    ),
    Mutant(
        "every step with the next pairs of the same row",
        "TestEquivalence::test_grids",
        "left.data += left.step;",
        "left.data += kTileSide;",
        only="amx",
    ),
    Mutant(
        "the right operand stays at the first step",
        "TestEquivalence::test_grids",
        "right += kTileSide * right_stride;",
        ";",
        only="amx",
    ),
    Mutant(
        "at a turn the left tile of the other end is taken",
        "TestEquivalence::test_grids",
        "decltype(up)::value > 0",
        "false",
        "column == 0 || …",
        only="amx",
    ),
    Mutant(
        "all columns of a block with its first sums",
        "TestEquivalence::test_grids",
        "tile % kAcross * kTileSide",
        "0",
        "c_stride + …);",
        only="amx",
    ),
    Mutant(
        "every group of values is the first",
        "TestEquivalence::test_grids",
        "from + row * stride + channel",
        "from + channel",
        only="amx",
    ),
    Mutant(
        "a group of values is not transposed",
        "TestEquivalence::test_grids",
        "transpose_rows(pairs, kTileSide, kTileSide, to, kTileSide);",
        "__builtin_memcpy(to, pairs, sizeof(pairs));",
        only="amx",
    ),
    Mutant(
        "rows of the backward's map end with their last query",
        "TestEquivalence::test_grids",
        "round_up(columns, kSteps) / 2",
        "columns / 2",
        "{map, …, kTileSide}",
        only="amx",
    ),
    Mutant(
        "all queries' sums are scaled as the first one's",
        "TestEquivalence::test_many_tokens",
        "load(factors + at)",
        "broadcast(factors[query])",
        only="amx",
    ),
    Mutant(
        "every panel's sums in the first one's place",
        "TestEquivalence::test_many_tokens",
        "sums + query",
        "sums",
        "map, columns, …, all_columns",
        only="amx",
    ),
    Mutant(
        "software tiles without the odd numbers",
        "TestEquivalence::test_grids",
        "even[column] + odd[column]",
        "even[column]",
        only="amx_bf16_emulated",
    ),
]


def plant(folder: Path, mutants: list[Mutant], defined_in: str) -> None:
    """Plants all mutants in the sources of `folder`, and the variable's definition in one of them."""
    sources = {path: path.read_text() for path in folder.rglob("*.*")}
    places: dict[Path, list[tuple[int, int, Mutant]]] = {path: [] for path in sources}
    for number, mutant in enumerate(mutants, 1):
        there = [path for path, source in sources.items() for _ in range(source.count(mutant.original))]
        assert len(there) == 1, f"{mutant.what}: in {folder} there is not once: {mutant.original}"
        places[there[0]].append((sources[there[0]].index(mutant.original), number, mutant))
    for path, planted in places.items():
        source = sources[path]
        end = len(source)
        for begin, number, mutant in sorted(planted, reverse=True):
            after = begin + len(mutant.original)
            assert after <= end, f"{mutant.what}: its place is another's, too: {mutant.original}"
            source = source[:begin] + mutant.planted(number) + source[after:]
            end = begin
        if planted:
            path.write_text(f'extern "C" __attribute__((visibility("default"))) int convit_mutant;\n{source}')
    with (folder / defined_in).open("a") as source_file:
        source_file.write("\nint convit_mutant = 0;\n")


class Loop:
    """A plugin of pytest: in place of running each test once, those that a mutant names run with that mutant."""

    def __init__(self) -> None:
        library = importlib.import_module("convit_kernels._C")
        self.chosen = ctypes.c_int.in_dll(ctypes.CDLL(library.__file__), "convit_mutant")

    def failure(self, number: int, tests: Iterable[pytest.Item]) -> str | None:
        """Of the first of these tests that fails with a mutant; number 0 is the right kernels."""
        self.chosen.value = number
        for test in tests:
            for report in runtestprotocol(test, log=False, nextitem=None):
                if report.failed:
                    return f"{test.nodeid}\n{report.longreprtext}"
        return None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        begin = time.perf_counter()

        def report(text: str) -> None:
            print(f"{time.perf_counter() - begin:4.0f} s  {text}", flush=True)

        instruction_sets = importlib.import_module("convit_kernels.extension").instruction_sets()
        instruction_sets.sort(key=lambda name: name == "portable")  # last: see the mutant that only that has
        for name in instruction_sets:
            os.environ["CONVIT_KERNELS_ISA"] = name  # for tests that choose none
            tests: dict[str, list[pytest.Item]] = {}
            for item in session.items:
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                if parameters.get("instruction_set", name) == name:
                    tests.setdefault(f"{item.parent.name}::{item.originalname}", []).append(item)
            if failure := self.failure(0, itertools.chain(*tests.values())):
                report(f"{name}: the right kernels fail {failure}")
                session.testsfailed += 1
                continue
            for number, mutant in enumerate(MUTANTS, 1):
                if mutant.only in name:
                    survives = self.failure(number, tests[mutant.test]) is None
                    session.testsfailed += survives
                    report(f"{name}  {number:2} {'SURVIVES' if survives else 'noticed'}: {mutant.what}")
        found = f"{session.testsfailed} failures" if session.testsfailed else "every mutant is noticed"
        report(f"{found} on {', '.join(instruction_sets)}")
        return True


if __name__ == "__main__":
    if len(sys.argv) > 1:
        plant(Path(sys.argv[1]) / "csrc" / "attention", MUTANTS, "op.cpp")
    else:
        named = sorted({f"{TESTS}::{mutant.test}" for mutant in MUTANTS})
        sys.exit(pytest.main(["-s", "-p", "no:terminal", "-p", "no:cacheprovider", *named], plugins=[Loop()]))
