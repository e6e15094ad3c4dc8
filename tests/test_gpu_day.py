"""The ten minutes on a GPU: no step takes the time of another, nothing that was found is lost. Made-up steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_day import plan
from tools.gpu_day.__main__ import chosen
from tools.gpu_day.runner import Group, Outcome, Run, Step, of_tests, read

HANGS = "import time; print('begun', flush=True); time.sleep(30)"
IGNORES = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + HANGS


def step(name: str, code: str, limit: float = 20.0, **environment: str) -> Step:
    return Step(name, [sys.executable, "-S", "-c", code], limit, environment)


def done(out: Path, *groups: Group, seconds: float = 60.0, grace: float = 0.3) -> tuple[int, dict[str, Outcome]]:
    """The exit code, and what each step came to by the file for programs."""
    run = Run(out, seconds, lambda found: [f"found {found}"], say=lambda line: None, grace=grace)
    run.run(groups)
    results = json.loads((out / "results.json").read_text())
    assert results["code"] == run.code
    return run.code, {found["name"]: Outcome(**found) for found in results["steps"]}


def test_all_is_well(tmp_path):
    code, steps = done(
        tmp_path, Group([step("a", "print('of a')"), step("b", "import os; print(os.environ['X'])", X="of b")])
    )
    assert code == 0
    assert {name: one.outcome for name, one in steps.items()} == {"a": "passed", "b": "passed"}
    log = (tmp_path / "log.txt").read_text()
    assert log.index("of a") < log.index("of b")
    assert "2 steps in" in (tmp_path / "summary.txt").read_text()
    assert not list((tmp_path / "running").iterdir())


def test_a_step_that_fails_stops_no_other_and_is_told_first(tmp_path):
    code, steps = done(tmp_path, Group([step("bad", "raise SystemExit(3)")]), Group([step("good", "")]))
    assert code == 1
    assert (steps["bad"].outcome, steps["bad"].code, steps["good"].outcome) == ("failed", 3, "passed")
    assert (tmp_path / "summary.txt").read_text().startswith("failed")


def test_a_program_that_is_not_there_is_a_failure_like_others(tmp_path):
    code, steps = done(tmp_path, Group([Step("gone", ["/no/such/program"], 5.0), step("good", "")]))
    assert code == 1
    assert "/no/such/program" in steps["gone"].failures[0]
    assert steps["good"].outcome == "passed"


def test_an_earlier_run_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    done(tmp_path, Group([step("first", "")]))
    _, steps = done(tmp_path, Group([step("second", "")]))
    assert list(steps) == ["second"]
    assert "first" not in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "mine.json").exists()


@pytest.mark.parametrize("code", [HANGS, IGNORES], ids=["interrupted", "killed"])
def test_a_step_that_hangs_is_cut_at_its_limit_with_all_that_it_has_printed(tmp_path, code):
    begin = time.monotonic()
    result, steps = done(tmp_path, Group([step("hangs", code, limit=0.7)]), Group([step("next", "")]))
    assert time.monotonic() - begin < 30
    assert result == 1
    assert (steps["hangs"].outcome, steps["next"].outcome) == ("cut", "passed")
    assert "begun" in (tmp_path / "log.txt").read_text()


def test_what_a_step_has_started_ends_with_it(tmp_path):
    child = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', {HANGS!r}]).pid, flush=True)"
    _, steps = done(tmp_path, Group([step("parent", child)]))
    assert steps["parent"].outcome == "passed"
    pid = next(int(line) for line in (tmp_path / "log.txt").read_text().splitlines() if line.isdigit())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_begins_when_the_time_is_up(tmp_path):
    groups = [Group([step("hangs", HANGS)]), Group([step("late", "")])]
    code, steps = done(tmp_path, *groups, seconds=1.0)
    assert code == 1
    assert (steps["hangs"].outcome, steps["late"].outcome) == ("cut", "not run")


def test_steps_of_a_group_run_at_the_same_time_and_those_of_the_next_after_all_of_them(tmp_path):
    meets = "import pathlib, time; here = pathlib.Path({here!r}); here.touch(); other = pathlib.Path({other!r})\n"
    meets += "while not other.exists(): time.sleep(0.02)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    pair = Group([step("a", meets.format(here=a, other=b)), step("b", meets.format(here=b, other=a))], at_once=2)
    last = Group([step("last", f"import os; raise SystemExit(not (os.path.exists({a!r}) and os.path.exists({b!r})))")])
    code, _ = done(tmp_path / "out", pair, last)
    assert code == 0


def test_what_a_step_finds_is_kept_to_the_last_whole_line(tmp_path):
    path = tmp_path / "running" / "finds.json"
    code = f"file = open({str(path)!r}, 'w'); file.write('[1]\\n{{\"a\": 2}}\\n{{\"b\": '); file.close()\n{HANGS}"
    _, steps = done(tmp_path, Group([step("finds", code, limit=0.7)]))
    assert steps["finds"].found == [[1], {"a": 2}]
    assert "found {'finds': [[1], {'a': 2}]}" in (tmp_path / "summary.txt").read_text()


def test_one_document_of_several_lines_is_one_finding(tmp_path):
    (tmp_path / "x.json").write_text('{\n "a": 1\n}\n')
    assert read(tmp_path / "x.json") == [{"a": 1}]
    assert read(tmp_path / "none.json") == []


PROGRAM = """
import sys, signal, pathlib
from tools.gpu_day.runner import Group, Run, Step
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
steps = [[sys.executable, "-S", "-c", code] for code in sys.argv[2:]]
Run(pathlib.Path(sys.argv[1]), 60.0).run([Group([Step(f"step-{n}", command, 60.0)]) for n, command in enumerate(steps)])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_there_stays_when_the_whole_run_is_ended(tmp_path, number):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "print('of the first')", HANGS, "print('never')"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    log = tmp_path / "running" / "step-1.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.wait(timeout=60)
    outcomes = {one["name"]: one["outcome"] for one in json.loads((tmp_path / "results.json").read_text())["steps"]}
    assert "of the first" in (tmp_path / "log.txt").read_text()
    if number == signal.SIGTERM:
        assert outcomes == {"step-0": "passed", "step-1": "cut", "step-2": "not run"}
    else:
        assert outcomes == {"step-0": "passed"}
        assert log.read_text() == "begun\n"


class TestCounts:
    WHOLE = """
tests/test_a.py::test_x[1] PASSED                                        [ 50%]
tests/test_a.py::test_y FAILED                                           [100%]
=========================== short test summary info ============================
FAILED tests/test_a.py::test_y - assert 1 == 2
==================== 1 failed, 1 passed, 3 warnings in 0.52s ====================
"""

    def test_are_pytest_s_own(self):
        assert of_tests(self.WHOLE) == (
            "1 failed, 1 passed, 3 warnings",
            ["FAILED tests/test_a.py::test_y - assert 1 == 2"],
        )

    def test_are_those_of_the_lines_where_it_was_cut(self):
        assert of_tests("\n".join(self.WHOLE.split("\n")[:3])) == ("1 passed, 1 failed", [])

    def test_there_are_none_of_other_output(self):
        assert of_tests("=== built in 3 s\nERRORS\n") == ("", [])


HERE = {"capability": [7, 5], "sanitizer": "/usr/bin/compute-sanitizer"}


class TestPlan:
    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_a_rehearsal_has_the_steps_of_a_gpu(self, device, tmp_path):
        groups = list(plan.plan(device, tmp_path, HERE if device == "cuda" else {"capability": None}))
        names = [step.name for group in groups for step in group.steps]
        assert names[:2] == ["build", "selfcheck"]
        assert {"tests-triton_forward", "tests-attention", "benchmarks-bfloat16", "tune", "profile"} <= set(names)
        assert ("memcheck" in names) == (device == "cuda")
        assert len(set(names)) == len(names)

    def test_the_library_is_built_for_the_gpu_at_hand(self, tmp_path):
        build = next(plan.plan("cuda", tmp_path, HERE)).steps[0]
        assert build.environment["TORCH_CUDA_ARCH_LIST"] == "7.5"
        assert build.environment["CONVIT_KERNELS_CUDA"] == "1"

    def test_what_is_timed_runs_alone(self, tmp_path):
        for group in plan.plan("cuda", tmp_path, HERE):
            assert group.at_once == 1 or not {"tune", "profile"} & {step.name for step in group.steps}

    def test_a_part_can_be_chosen_and_limits_be_stretched(self, tmp_path):
        groups = list(chosen(plan.plan("cuda", tmp_path, HERE), "tests-triton,tune", stretch=2.0))
        steps = {step.name: step for group in groups for step in group.steps}
        assert set(steps) == {*(f"tests-{name}" for name in plan.KERNEL_TESTS), "tune"}
        whole = {step.name: step.limit for group in plan.plan("cuda", tmp_path, HERE) for step in group.steps}
        assert all(step.limit == 2 * whole[name] for name, step in steps.items())

    def test_every_file_of_tests_is_there(self):
        for name in (
            *(f"interpreted/test_{name}.py" for name in plan.KERNEL_TESTS),
            *(f"test_{n}.py" for n in plan.TESTS),
        ):
            assert (Path(__file__).parent / name).is_file()
