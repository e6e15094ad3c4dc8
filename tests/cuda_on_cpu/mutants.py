"""Wrong CUDA kernels of the tables, each of which a test of test_relpos.py must notice: part of `make mutants`.

    python -m cuda_on_cpu.mutants asan    and tsan: in a process, and with CXXFLAGS, for that sanitizer

All of a sanitizer's are compiled at once, as in tests/native_mutants.py. What it notices ends the process: each mutant
has one of its own, forked from one that has imported everything. It is noticed where the cause is said that was to be.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from native_mutants import Mutant, plant

import cuda_on_cpu

TESTS = Path(__file__).parents[1] / "test_relpos.py"
TABLES, GRADIENT, DENSE = (
    "test_factors_multiply_to_the_positional_attention",
    "test_native_and_fallback_gradients_agree",
    "test_dense_table_is_the_attention_with_zero_padding",
)
# of the threads that leave their memory the first is reported: beyond its end, or farther, in what was freed
MEMORY = "AddressSanitizer: heap-(buffer-overflow|use-after-free)"
BOUNDS, RACE = "out of bounds for type", "ThreadSanitizer: data race"
BARRIER, RESULT = "threads of one block wait at lines", "AssertionError"
SECONDS = 60  # of a mutant, which may hang
# sanitizer -> (what must be said, mutant)
MUTANTS: dict[str, list[tuple[str, Mutant]]] = {
    "asan": [
        (
            MEMORY,
            Mutant("rows beyond the last are computed, too", TABLES, "index >= heads * (height + width)", "false"),
        ),
        (RESULT, Mutant("one block too few", TABLES, "kThreads - 1", "-1", "(height + width) + …) / kThreads")),
        (RESULT, Mutant("the column table in the row table's place", TABLES, "along_y ? rows : cols", "rows")),
        (
            BARRIER,
            Mutant(
                "a barrier for some of the threads alone",
                GRADIENT,
                "__syncthreads();",
                "if (threadIdx.x < half) { __syncthreads(); }",
                "…\n    if (threadIdx.x < half) {",
            ),
        ),
        (BOUNDS, Mutant("the tree begins beyond the sums", GRADIENT, "kThreads / 2", "kThreads", "half = …;")),
        (RESULT, Mutant("the tree ends early", GRADIENT, "half > 0", "half > 1")),
        (
            RESULT,
            Mutant("every head's gradient is the first one's", GRADIENT, "head * 3", "0", "gradient[… + threadIdx"),
        ),
        (
            MEMORY,
            Mutant("shared memory is one number short", DENSE, "(height + width)", "(height + width - 1)", "bytes = …"),
        ),
        (MEMORY, Mutant("one column too many", DENSE, "column < columns", "column <= columns")),
        (MEMORY, Mutant("the padding is computed, too", DENSE, "column < tokens", "true")),
        (
            RESULT,
            Mutant("the probabilities along y are left out", DENSE, "threadIdx.x == 32", "threadIdx.x == kThreads"),
        ),
        (RESULT, Mutant("y counts columns", DENSE, "query / width", "query % width", "height, …, along_y")),
    ],
    "tsan": [
        (
            RACE,
            Mutant(
                "no barrier between the tree's levels",
                GRADIENT,
                "__syncthreads();",
                ";",
                "…\n    if (threadIdx.x < half) {",
            ),
        ),
        (RACE, Mutant("no barrier after the tree", GRADIENT, "__syncthreads();", ";", "…\n  if (threadIdx.x < 3) {")),
        (RACE, Mutant("no barrier before the product", DENSE, "__syncthreads();", ";", "…\n  Out* row")),
        (RACE, Mutant("both axes in one place", DENSE, "along_x + width", "along_x")),
        (RACE, Mutant("all blocks write the first row", DENSE, "static_cast<int64_t>(blockIdx.x) * columns", "0")),
    ],
}


class Loop:
    """A plugin of pytest: in place of running each test once, those that a mutant names run with that mutant."""

    def __init__(self, mutants: list[tuple[str, Mutant]]) -> None:
        self.mutants = mutants
        cuda_on_cpu.ops()
        self.chosen = ctypes.c_int.in_dll(ctypes.CDLL(str(cuda_on_cpu.compiled())), "convit_mutant")

    def run(self, number: int, tests: list[pytest.Item]) -> tuple[bool, str]:
        """Whether all of these tests pass with a mutant, and what they said; number 0 is the right kernels."""
        with tempfile.TemporaryFile("w+") as said:
            process = os.fork()
            if process == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                signal.alarm(SECONDS)
                self.chosen.value = number
                for test in tests:
                    for report in runtestprotocol(test, log=False, nextitem=None):
                        if not report.passed:
                            print(f"{test.nodeid}\n{report.longreprtext}", flush=True)
                            os._exit(1)
                os._exit(0)
            _, status = os.waitpid(process, 0)
            said.seek(0)
            return status == 0, said.read()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        begin = time.perf_counter()

        def report(text: str) -> None:
            print(f"{time.perf_counter() - begin:4.0f} s  {text}", flush=True)

        tests: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            if item.callspec.params["kernels"] == "cuda.cu":
                tests.setdefault(item.originalname, []).append(item)
        passed, said = self.run(0, [item for items in tests.values() for item in items])
        if not passed:
            session.testsfailed += 1
            report(f"the right kernels fail: {said}")
            return True
        for number, (cause, mutant) in enumerate(self.mutants, 1):
            passed, said = self.run(number, tests[mutant.test])
            noticed = not passed and re.search(cause, said)
            session.testsfailed += not noticed
            report(f"{number:2} {f'noticed, {cause}' if noticed else 'SURVIVES'}: {mutant.what}")
            if not noticed and not passed:
                report(f"it was to be noticed otherwise: {said}")
        report(f"{session.testsfailed} failures" if session.testsfailed else "every mutant is noticed")
        return True


if __name__ == "__main__":
    name = sys.argv[1]
    copy = cuda_on_cpu.ROOT / "build" / "cuda_on_cpu" / name / "csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cuda_on_cpu.ROOT / "csrc", copy, ignore=shutil.ignore_patterns("*.cpp"))
    plant(copy / "tables", [mutant for _, mutant in MUTANTS[name]], "cuda.cu")
    cuda_on_cpu.SOURCE = copy / "tables" / "cuda.cu"
    named = sorted({f"{TESTS}::{mutant.test}" for _, mutant in MUTANTS[name]})
    small = "not (zero_padding and grid2)"  # the one that takes seconds under a sanitizer
    options = ["-s", "-p", "no:terminal", "-p", "no:cacheprovider", "-k", small]
    sys.exit(pytest.main([*options, *named], plugins=[Loop(MUTANTS[name])]))
